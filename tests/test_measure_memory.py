"""What a supervised stage holds while it measures the model that it has saved."""

import gc
import os

import torch
from cats import STAGE, cats_folder, cats_tokenizer, recipe_of  # noqa: F401 - fixtures
from ranks import on_ranks

from rlhf_ray.config import Recipe
from rlhf_ray.runs.run_folder import RunFolder


def live_bytes():
    """Of all tensors of this process, each memory once."""
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def work(rank, world, values, path):
    """{stage: (bytes while it measures, bytes of the model that it measures)}"""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    from rlhf_ray.supervised import sft

    results, measure = {}, sft.heldout_loss

    def watched(model, *args, **options):
        results[len(results)] = live_bytes(), sum(each.numel() * each.itemsize for each in model.parameters())
        return measure(model, *args, **options)

    sft.heldout_loss = watched
    run = RunFolder(path)
    for recipe in map(Recipe.model_validate, values):
        run.stage("sft").path.mkdir(parents=True, exist_ok=True)
        sft.train_sft(recipe, run, "sft")
    return results


def test_moments_gradients_and_the_trained_copy_are_gone(folder, tmp_path):
    """A run of AdamW holds four times the weights; of a run before, nothing may be left either."""
    path = tmp_path / "run"
    path.mkdir()
    os.symlink(folder.path / "data", path / "data")
    recipes = [
        recipe_of(sft=STAGE | {"max_steps": 2} | more).model_dump(mode="json")
        for more in ({"zero_stage": 0}, {"zero_stage": 2})
    ]
    (results,) = on_ranks(work, 1, recipes, path)
    assert len(results) == 2
    for held, model in results.values():
        assert held < 1.6 * model, results
