"""Which kinds of rule replies follow, counted by hand."""

import json

import pandas as pd
import pytest

from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.rule_kinds import by_kind, main
from rlhf_ray.runs.run_folder import RunFolder

LOWER, TITLE = {"kind": "lower_case"}, {"kind": "title"}
ASKED = [("c", [LOWER, TITLE]), ("a", [LOWER]), ("b", [])]  # more than are evaluated, in another order
REPLIES = [
    ("a", "Rise up and go with us now.", "rise up and go with us now."),
    ("c", "<<Up>>\nUp the hill we all go now.", "up the hill we all go now."),
]


def answer(response: str) -> dict:
    return {"response": response, "score": None, "tokens": 3, "ended": True}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.data("eval_prompts").parent.mkdir()
    rows = [{"prompt": prompt, "rules": json.dumps(rules)} for prompt, rules in ASKED]
    pd.DataFrame(rows).to_parquet(folder.data("eval_prompts"))
    evaluation = folder.stage("evaluation").path
    evaluation.mkdir()
    (evaluation / "samples.jsonl").write_text("".join(
        json.dumps({"prompt": prompt, "index": index, "seed": 0, "sft": answer(sft), "ppo": answer(ppo)}) + "\n"
        for index, (prompt, sft, ppo) in enumerate(REPLIES)
    ))  # fmt: skip
    return folder


def test_shares_by_hand(run, capsys):
    assert by_kind(run) == {"lower_case": (2, {"sft": 0.0, "ppo": 1.0}), "title": (1, {"sft": 1.0, "ppo": 0.0})}
    assert main([str(run.path)]) == 0
    assert "| title (held out) | 1 | 1.00 | 0.00 |" in capsys.readouterr().out


def test_a_run_without_rules_is_refused_in_words(run, tmp_path, capsys):
    pd.DataFrame([{"prompt": "a"}]).to_parquet(run.data("eval_prompts"))
    with pytest.raises(UserError, match="no samples whose prompts have rules"):
        by_kind(run)
    assert main([str(tmp_path / "nothing")]) == 2 and "give a finished run" in capsys.readouterr().err
