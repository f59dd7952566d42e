"""An error is told whole: the last line never hides the sentence before it."""

import subprocess
import sys

import pytest

from rlhf_ray.actors.supervised import _explained
from rlhf_ray.config import SftConfig
from rlhf_ray.errors import LONGEST_MESSAGE, whole_message
from rlhf_ray.runs.run_folder import RunFolder

RAISING = {
    "ValueError: GenerationConfig is invalid: - `temperature`: unset it - `top_p`: unset it If you use a pretrained model, see it.":
        "raise ValueError('GenerationConfig is invalid: \\n- `temperature`: unset it\\n- `top_p`: unset it\\nIf you use a "
        "pretrained model, see it.')",
    "KeyError: 'x'": "{}['x']",
    "RuntimeError: first line the indented second last": "raise RuntimeError('first line\\n    the indented second\\n\\nlast')",
    "OSError: the outer one":
        "try:\n        {}['x']\n    except KeyError as error:\n        raise OSError('the outer one') from error",
    "AssertionError": "assert False",
}  # fmt: skip


def traceback_of(statement):
    """What Python itself prints."""
    code = f"def inner():\n    {statement}\ndef outer():\n    inner(\n    )\nouter()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize("expected, statement", RAISING.items(), ids=list(RAISING))
def test_a_tracebacks_message_is_whole(expected, statement, tmp_path):
    script = tmp_path / "raises.py"
    script.write_text(f"def inner():\n    {statement}\ndef outer():\n    inner(\n    )\nouter()\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    for text in (done.stderr, traceback_of(statement), f"Training failed:\n[Rank 0]:\n\x1b[36mray::f()\x1b[39m\n{done.stderr}"):
        assert whole_message(text) == expected
        assert whole_message(RuntimeError(text)) == expected


def test_an_errors_own_words_are_whole():
    assert whole_message(ValueError("one\ntwo\n\n  three ")) == "one two three"
    assert whole_message(KeyError()) == "KeyError"
    long = whole_message(ValueError("the reason. " + "x" * 9000 + " the remedy"))
    assert long.startswith("the reason. xxx") and long.endswith("the remedy") and len(long) < LONGEST_MESSAGE + 10


def test_a_failed_stage_tells_the_reason_and_the_remedy(tmp_path):
    from ray.train import WorkerGroupError

    text = traceback_of("raise ValueError('the reason\\n- a detail\\nthe remedy')")
    error = WorkerGroupError(f"Training failed due to worker errors:\n{text}", {0: ValueError(text)})
    told = str(_explained(error, RunFolder(tmp_path), "sft", SftConfig(), 60.0))
    assert "with: ValueError: the reason - a detail the remedy; its log is" in told


def test_a_stage_that_rays_memory_guard_ended_tells_the_host_and_the_memory(tmp_path):
    from ray.exceptions import OutOfMemoryError
    from ray.train import WorkerGroupError

    words = "1 worker(s) were killed. Memory on the node (IP: 10.0.0.7, ID: 82fa) was 22.88GB used / 23.59GB limit\nTop 10: ..."
    error = WorkerGroupError("Training failed due to worker errors", {0: OutOfMemoryError(words)})
    told = str(_explained(error, RunFolder(tmp_path), "sft", SftConfig(), 60.0))
    assert "with: Ray's memory guard ended it: 22.9 of 23.6 GB were in use on the host 10.0.0.7; end what else runs" in told
    assert "Top 10" not in told
