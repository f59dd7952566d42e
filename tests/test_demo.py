"""The demo in a short form, end to end through the command line: real Ray, TRL, DeepSpeed; then resume, Ctrl-C, export.

A plugin that lies in the working directory adds a stage to it: every process of the run has to import that.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import rlhf_ray
from processes import alive, descendants

from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

SHORT = {
    "model.from_scratch.layers": 2, "model.from_scratch.width": 64, "model.from_scratch.heads": 4,
    "model.from_scratch.vocab_size": 600, "model.from_scratch.positions": 128, "data.builder_args.sft_rows": 300,
    "data.builder_args.pairs": 120, "data.builder_args.prompts": 64, "data.builder_args.eval_prompts": 16,
    "data.builder_args.eval_rows": 40, "data.max_prompt_tokens": 64, "sft.max_steps": 6, "sft.max_length": 128,
    "fluency": "null", "reward.max_steps": 4, "reward.max_length": 128, "reward.normalise_samples": 16,
    "generation.max_new_tokens": 12, "generation.chunk_size": 8, "ppo.steps": 4, "ppo.rollout_batch_size": 16,
    "ppo.minibatch_size": 16, "ppo.microbatch_size": 8, "ppo.ppo_epochs": 2, "ppo.eval_every": 2, "ppo.eval_prompts": 8,
    "ppo.checkpoint_every": 2, "ppo.accept_weak_reward": "true", "evaluation.prompts": 16, "evaluation.bootstrap": 50,
    "evaluation.samples": 3,
    "sft.eval_rows": 16, "reward.eval_rows": 16, "evaluation.seeds": "[0]", "plugins": "[toy_plugin]", "toy.start": 16,
}  # fmt: skip


def arguments(verb: str, run_dir: Path, **changes) -> list[str]:
    settings = [f"--set={key}={value}" for key, value in (SHORT | changes).items()]
    return [verb, "demo", "--run-dir", str(run_dir), *settings]


def command(*args, **changes) -> list[str]:
    return [sys.executable, "-m", "rlhf_ray.cli.main", *arguments(*args, **changes)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Where the command is given: the plugin lies there."""
    here = tmp_path_factory.mktemp("demo")
    shutil.copy(Path(__file__).with_name("toy_plugin.py"), here)
    return here


@pytest.fixture
def table() -> Iterator[None]:
    """What the plugin registers in this process is gone after the test."""
    before = dict(STAGES)
    yield
    STAGES.clear()
    STAGES.update(before)
    sys.modules.pop("toy_plugin", None)


def gone(pids: set[int], within_s: float) -> set[int]:
    """Those still running after within_s."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and any(map(alive, pids)):
        time.sleep(0.5)
    return {pid for pid in pids if alive(pid)}


@pytest.fixture(scope="module")
def interrupted(workplace) -> tuple[Path, str, int, set[int]]:
    """A run that got Ctrl-C during PPO: its folder, what it printed, its exit code, processes it left behind."""
    run_dir = workplace / "run"
    process = subprocess.Popen(
        command("run", run_dir, **{"ppo.steps": 400}),
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        metrics = run_dir / "ppo" / "metrics.jsonl"
        deadline = time.monotonic() + 360
        while len(read_metrics(metrics)) < 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "PPO takes too long to start"
            time.sleep(0.2)
        below = descendants(process.pid)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()  # where a test run is interrupted; a process that has ended stays as it is
    return run_dir, output, process.returncode, gone(below, within_s=30)


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_leaves_no_process(interrupted):
    run_dir, output, code, left = interrupted
    assert code == 130, output
    assert "Traceback" not in output
    assert not left
    steps = read_metrics(run_dir / "ppo" / "metrics.jsonl")[-1]["step"]
    assert (run_dir / "ppo" / "checkpoints" / f"step_{steps:06d}" / "MANIFEST.json").exists()
    assert not (run_dir / "ppo" / "DONE").exists()


def test_the_same_command_goes_on_to_the_end(interrupted, workplace, table):
    run_dir, *_ = interrupted
    before = read_metrics(run_dir / "ppo" / "metrics.jsonl")
    steps = before[-1]["step"] + 1
    done = subprocess.run(command("run", run_dir, **{"ppo.steps": steps}), cwd=workplace, capture_output=True, text=True,
                          timeout=400, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    after = read_metrics(run_dir / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in after] == list(range(steps + 1))
    assert after[: len(before)] == before  # nothing was done twice

    folder = RunFolder(run_dir)
    stages = ("data", "sft", "reward", "toy", "ppo", "evaluation")
    assert all(folder.stage(stage).done for stage in stages)
    assert json.loads((run_dir / "timings.json").read_text()).keys() == set(stages)
    assert folder.stage("toy").summary() == {"steps": 4, "final_loss": 1.0}  # 16 halved four times
    for stage in ("sft", "reward", "ppo"):
        files = {file.name for file in folder.stage(stage).model.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]  # nothing pickled
    summary = json.loads((folder.stage("evaluation").path / "summary.json").read_text())
    assert set(summary["ppo"]["score"]) >= {"mean", "low", "high"}
    assert summary["win_rate"]["judge"]["mean"] is not None  # the true utility
    assert {"low", "mean", "high"} <= set(summary["ppo"]["trait/on_topic"]) and "on topic" in done.stdout
    page = folder.report.read_text()
    assert "<html" in page and "Toy stage" in page
    for line in ("report", "serve", "prompt", "win rate, judge"):
        assert line in done.stdout

    row = after[-1]
    for name in ("objective/score", "objective/kl", "objective/rlhf_reward", "policy/approx_kl", "policy/clip_frac",
                 "policy/entropy", "value/loss", "value/clip_frac", "value/explained_variance", "time/generate_s",
                 "bytes/generation", "eval/score"):  # fmt: skip
        assert isinstance(row[name], float), name
    assert all(abs(row["first_policy/ratio"] - 1) < 1e-3 for row in after[1:])

    changed = rlhf_ray(*arguments("run", run_dir, **{"ppo.steps": steps, "ppo.gae_lambda": 0.5, "seed": 3}), cwd=workplace)
    assert changed.returncode == 2
    assert "ppo.gae_lambda" in changed.stderr and "seed" in changed.stderr and "Traceback" not in changed.stderr
    again = rlhf_ray(*arguments("run", run_dir, **{"ppo.steps": steps}), cwd=workplace)
    assert again.returncode == 0 and "done before" in again.stdout

    target = run_dir.parent / "exported"
    checkpoint = sorted((run_dir / "ppo" / "checkpoints").glob("step_*"))[-1]
    exported = rlhf_ray("export", str(checkpoint), str(target))
    assert exported.returncode == 0, exported.stderr
    from safetensors.torch import load_file

    own, other = load_file(target / "model.safetensors"), load_file(folder.stage("ppo").model / "model.safetensors")
    assert own.keys() == other.keys() and all((own[name] == other[name]).all() for name in own)
