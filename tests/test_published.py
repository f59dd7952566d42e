"""What a version is, and what training and server compute for it: expected values are transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from served_app import save_tiny
from transformers import AutoModelForCausalLM

from rlhf_ray.errors import UserError
from rlhf_ray.publish.client import kept_copy
from rlhf_ray.publish.rows import check_rows, read_rows
from rlhf_ray.publish.version import version_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


def test_a_version_is_named_by_what_its_files_hold(folder, tmp_path):
    copy = kept_copy(folder, tmp_path)
    assert copy.id == version_id(folder) == version_id(copy.folder) and len(copy.id) == 12
    (tmp_path / copy.id / "README.md").write_text("another card")
    copy.check()
    config = tmp_path / copy.id / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match="have changed"):
        copy.check()


def test_training_log_probs_are_transformers_own_and_a_changed_weight_is_found(folder, tmp_path):
    copy = kept_copy(folder, tmp_path)
    rows = read_rows(tmp_path / copy.id)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    with torch.no_grad():
        logprobs = model(torch.tensor(rows.ids)).logits.log_softmax(-1)
        expected = logprobs[:, :-1].gather(-1, torch.tensor(rows.ids)[:, 1:, None])[..., 0]
        np.testing.assert_allclose(rows.logprobs, expected, atol=1e-5)
        assert check_rows(rows, expected.tolist(), "float32") < 1e-5
        model.transformer.h[0].mlp.c_fc.weight += 1e-3
        moved = model(torch.tensor(rows.ids)).logits.log_softmax(-1)[:, :-1].gather(-1, torch.tensor(rows.ids)[:, 1:, None])[..., 0]
    with pytest.raises(UserError, match="differ from training's"):
        check_rows(rows, moved.tolist(), "float32")
