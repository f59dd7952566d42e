"""Models of which a part trains, for several test files."""

import pytest
from in_process import LocalRoles
from loops import Diary, real_loop
from tiny import tiny_recipe, write_start

from rlhf_ray.models.trained_part import (
    plain_name,
    train_only_part,
)
from rlhf_ray.runs.run_folder import RunFolder


def recipe_for(family, **sections):
    shape = {"architecture": family, "layers": 3}
    return tiny_recipe(**({"model": {"from_scratch": shape}} | sections))


@pytest.fixture(name="family", scope="module", params=["gpt2", "llama"])
def trained_family(request):
    return request.param


@pytest.fixture(name="folder", scope="module")
def trained_folder(family, tmp_path_factory):
    return write_start(recipe_for(family), RunFolder(tmp_path_factory.mktemp(family)))


@pytest.fixture(name="start")
def trained_start(folder):
    return folder.stage("sft").model


def part_of(model, lora=None, freeze_layers=0, gradient_checkpointing=False, seed=0):
    return train_only_part(
        model, lora=lora, freeze_layers=freeze_layers, gradient_checkpointing=gradient_checkpointing, seed=seed
    )


def trained_of(model):
    return {
        plain_name(f"model.{name}"): tensor.detach()
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    }


PARTS = {
    "lora": {"lora": {"rank": 3, "alpha": 6.0}, "critic_lora": {"rank": 2}, "learning_rate": 1e-2},
    "frozen": {"freeze_layers": 1, "critic_freeze_layers": 2},
}


def run_real(recipe, folder, **kwargs):
    roles, diary = LocalRoles(recipe, folder, **kwargs), Diary()
    real_loop(recipe, roles, diary).run()
    return roles, diary
