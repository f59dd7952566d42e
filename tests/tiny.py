"""A tiny run: its recipe, and the models and prompts that PPO starts from."""

from rlhf_ray.config import Recipe
from rlhf_ray.data.role_files import write_role
from rlhf_ray.models.load import build_causal_lm, build_reward_model
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.runs.run_folder import RunFolder

TEXTS = [f"please tell me about number {i}" for i in range(24)]


def tiny_recipe(**sections) -> Recipe:
    """Two layers of width 32; 16 prompts, 4 steps of 8 rollouts. `sections` are laid over it: ppo={"steps": 2}."""
    values = {
        "model": {"from_scratch": {"layers": 2, "width": 32, "heads": 2, "positions": 64, "vocab_size": 300}},
        "data": {"max_prompt_tokens": 16},
        "sft": {"max_length": 64},
        "reward": {"max_length": 64},
        # A random model hardly ever draws EOS; tokens with an "e" in them come often enough for ragged responses.
        "generation": {"max_new_tokens": 10, "chunk_size": 4, "stop": ("e",)},
        "ppo": {
            "steps": 4,
            "rollout_batch_size": 8,
            "minibatch_size": 4,
            "microbatch_size": 2,
            "ppo_epochs": 2,
            "eval_every": 2,
            "eval_prompts": 6,
            "checkpoint_every": 2,
            "precision": "float32",
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "missing_eos_penalty": 0.5,
            "accept_weak_reward": True,
        },
        "resources": {
            role: {"threads": 1, "cpus": 0.1} for role in ("generation", "reward", "reference", "policy", "critic")
        },
        "tracking": {"tensorboard": False},
    }
    for name, section in sections.items():
        values[name] = _laid_over(values[name], section) if name in values and section is not None else section
    return Recipe.model_validate({"name": "tiny", **values})


def _laid_over(below: dict, above: dict) -> dict:
    both = {
        key: _laid_over(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return {**below, **above, **both}


def write_start(recipe: Recipe, folder: RunFolder) -> RunFolder:
    """What the data, SFT and reward stages would leave: random models with the names and files of real ones."""
    tokenizer = train_tokenizer(TEXTS, 300, recipe.model.from_scratch.architecture)
    policy = build_causal_lm(recipe.model, tokenizer, seed=0)
    reward = build_reward_model(policy, tokenizer, seed=1)
    reward.config.reward_mean, reward.config.reward_std = 0.1, 0.5
    for name, model in (("sft", policy), ("reward", reward)):
        folder.stage(name).path.mkdir(parents=True)
        save_model(model, tokenizer, folder.stage(name).model, "a tiny test model")
    write_role(folder, "prompts", [{"prompt": text} for text in TEXTS[:16]], ("prompt",))
    write_role(folder, "eval_prompts", [{"prompt": text} for text in TEXTS[16:]], ("prompt",))
    return folder
