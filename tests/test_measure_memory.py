"""What a supervised stage holds while it measures the model that it has saved: nothing of the training."""

import gc
import os

import pytest
import torch
from cats import STAGE, cats_folder, cats_tokenizer, recipe_of  # noqa: F401 - fixtures
from ranks import on_ranks
from safetensors.torch import load_file

from rlhf_ray.config import Recipe
from rlhf_ray.runs.run_folder import RunFolder

STEPS = STAGE | {"max_steps": 2}
LLAMA = {"from_scratch": {"architecture": "llama", "layers": 2, "width": 32, "heads": 2, "positions": 96, "vocab_size": 300}}


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
    """[(stage, bytes when it has trained, bytes while it measures, bytes of the model that it measures)]"""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    from rlhf_ray.supervised import dpo, reward_model, sft, stage

    results, trained, weights = [], [], stage.trained_weights

    def measured(name, plain):
        def watched(model, *args, **options):
            size = sum(each.numel() * each.itemsize for each in model.parameters())
            results.append((name, trained[-1], live_bytes(), size))
            return plain(model, *args, **options)

        return watched

    def at_the_end(trainer):
        trained.append(live_bytes())
        return weights(trainer)

    stage.trained_weights = at_the_end
    sft.heldout_loss = measured("sft", sft.heldout_loss)
    reward_model.heldout_scores = measured("reward", reward_model.heldout_scores)
    dpo.heldout_figures = measured("dpo", dpo.heldout_figures)
    run, trainers = RunFolder(path), {"sft": sft.train_sft, "reward": reward_model.train_reward, "dpo": dpo.train_dpo}
    for name, recipe in values:
        run.stage(name).path.mkdir(parents=True, exist_ok=True)
        trainers[name](Recipe.model_validate(recipe), run, name)
    return results


@pytest.mark.thorough
def test_moments_gradients_and_the_trained_copy_are_gone(folder, tmp_path):
    """Weights and two moments stand until the end of the training (gradients go with each step), and one copy of the weights is
    left; of a run before, nothing may be left either. (Of DPO the reference stands beside the model.)"""
    path = tmp_path / "run"
    path.mkdir()
    os.symlink(folder.path / "data", path / "data")
    jobs = [("sft", {"sft": STEPS | {"zero_stage": zero_stage}}) for zero_stage in (0, 2, 3)]
    jobs += [("reward", {"reward": STEPS | {"normalise_samples": 0}}), ("dpo", {"dpo": STEPS})]
    jobs.append(("sft", {"sft": STEPS | {"zero_stage": 3, "precision": "bfloat16"}, "model": LLAMA}))
    values = [(name, recipe_of(**sections).model_dump(mode="json")) for name, sections in jobs]
    (results,) = on_ranks(work, 1, values, path)
    assert [name for name, *_ in results] == [name for name, _ in jobs]
    for name, trained, measuring, model in results:
        models = 2 if name == "dpo" else 1
        assert measuring < (models + 0.6) * model, results
        assert trained - measuring > 1.9 * model, results  # Adam's two moments, at least
    saved = load_file(path / "sft" / "model" / "model.safetensors")  # gathered in 16 bits for forward passes, but not for this
    weight = saved["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
