"""The critic that a run's PPO has trained, from its last checkpoint."""

from __future__ import annotations

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.errors import UserError
from rlhf_ray.models.critic import Critic, build_critic
from rlhf_ray.models.trained_part import load_trained, plain_name
from rlhf_ray.models.wire import load_named
from rlhf_ray.ppo.checkpoint import last_good, read_role, read_state
from rlhf_ray.runs.run_folder import RunFolder, start_model

_BODY, _HEAD = "backbone.", "value_head."


def trained_critic(run: RunFolder) -> tuple[Critic, int]:
    """-> the critic in float32, in evaluation mode, and the PPO steps that have trained it. UserError where there is none."""
    recipe = load_recipe(str(run.recipe))
    if not recipe.ppo.has_critic:
        raise UserError(f"the run {run.path} has no critic: its advantages need none")
    checkpoint = last_good(run.stage("ppo").checkpoints)
    if checkpoint is None:
        raise UserError(f"the run {run.path} keeps no checkpoint of PPO, and the critic is nowhere else")
    start = str(run.stage("reward").model) if recipe.ppo.critic_init == "reward" else start_model(recipe, run)
    critic = build_critic(start, recipe.ppo.critic_init, trust_remote_code=recipe.model.trust_remote_code).float().eval()
    state, _ = read_role(checkpoint, "critic")
    weights = {plain_name(name.removeprefix("weight/")): one for name, one in state.items() if name.startswith("weight/")}
    body = {name.removeprefix(_BODY): one for name, one in weights.items() if name.startswith(_BODY)}
    load_trained(critic.backbone, body, lora=recipe.ppo.critic_lora, freeze_layers=recipe.ppo.critic_freeze_layers)
    head = {name.removeprefix(_HEAD): one for name, one in weights.items() if name.startswith(_HEAD)}
    load_named(critic.value_head, head)
    return critic, read_state(checkpoint)["step"]
