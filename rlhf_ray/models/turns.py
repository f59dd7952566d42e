"""What roles that share a GPU hold of it while others work, turn by turn of a PPO step.   Bytes.

Without `ppo.steps_ahead` the roles take turns: everything is drawn, and scored chunk by chunk meanwhile; then the policy is
updated; then the critic, which waits for it where both share GPUs. Who shares one gives back what it needs for its own turn alone
(`training.resting_state`; an engine sleeps; torch's free memory goes back after each call).
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.config import GroupConfig, Recipe, RoleConfig

ROLLOUT = "rollout"
MOMENTS = 8.0  # bytes per trained weight, in float32


def update_of(role: str) -> str:
    return f"{role} update"


def takes_turns(recipe: Recipe, role: RoleConfig) -> bool:
    return 0 < role.gpus < 1 and recipe.ppo.steps_ahead == 0


def turns_of(recipe: Recipe) -> tuple[str, ...]:
    """In order; () where no role shares a GPU."""
    if not any(takes_turns(recipe, role) for role in recipe.ppo_roles.values()):
        return ()
    return ROLLOUT, *(update_of(name) for name in ("policy", "critic") if name in recipe.ppo_roles)


def updates_in_turn(recipe: Recipe) -> bool:
    """Whether the critic's update waits for the policy's: at once both would need their optimisers on one GPU, and be no faster."""
    roles = recipe.ppo_roles
    return "critic" in roles and all(takes_turns(recipe, roles[name]) for name in ("policy", "critic"))


def resting(trained: int, role: GroupConfig) -> dict[str, float]:
    """In the host's memory from the start, where a rank's state rests between updates."""
    if role.offload_optimizer:
        return {}
    share = role.actors if role.zero_stage >= 1 else 1
    gradients = {"resting gradients": 4.0 * trained / share} if role.zero_stage == 3 and not role.offload_param else {}
    return {"resting moments": MOMENTS * trained / share} | gradients


def trainer_turns(
    recipe: Recipe, name: str, role: GroupConfig, trained: int, parts: Mapping[str, float], forward: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """parts: of its own update. forward: what a pass without a backward pass takes beside the weights."""
    kept = dict(parts)
    kept.pop("gradients", None)
    if "optimiser" in kept:
        kept["optimiser"] -= resting(trained, role).get("resting moments", 0.0)
    stays = {part: kept[part] for part in ("weights", "optimiser", "shared weights") if part in kept}
    rollout = kept if recipe.ppo.reuse_forward else stays | dict(forward)
    others = [turn for turn in turns_of(recipe) if turn not in (ROLLOUT, update_of(name))]
    return {ROLLOUT: rollout} | dict.fromkeys(others, stays)


def idle_in_updates(recipe: Recipe, parts: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Of a role that only draws or scores. parts: what stays."""
    return {turn: dict(parts) for turn in turns_of(recipe) if turn != ROLLOUT}
