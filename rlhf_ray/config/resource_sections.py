"""The sections `resources` and `tracking`."""

from __future__ import annotations

from typing import Literal

from rlhf_ray.config.base import Section, option


class RoleConfig(Section):
    """How many Ray actors a role has and what each reserves."""

    actors: int = option(1, "Ray actors of this role", gt=0)
    cpus: float = option(0.3, "CPUs reserved for each", ge=0)
    gpus: float = option(0.0, "GPUs reserved for each", ge=0)
    threads: int | None = option(
        None,
        "torch threads of each; results depend on it to the bit; null: a share of the node's cores, kept in the run's recipe.yaml",
        gt=0,
    )


class GroupConfig(RoleConfig):
    """A DeepSpeed group: `actors` is its number of ranks."""

    zero_stage: Literal[0, 1, 2, 3] = option(0, "DeepSpeed ZeRO stage")


class ResourcesConfig(Section):
    """Placement of the PPO roles; the defaults fit on two cores."""

    generation: RoleConfig = option(RoleConfig(), "generation actors")
    reward: RoleConfig = option(RoleConfig(), "reward actors")
    reference: RoleConfig = option(RoleConfig(), "reference actors")
    policy: GroupConfig = option(GroupConfig(), "policy ranks")
    critic: GroupConfig = option(GroupConfig(), "critic ranks")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = option(
        "PACK", "Ray placement-group strategy"
    )
    weight_transport: Literal["auto", "object_store", "collective", "ipc"] = option(
        "auto",
        "how new weights reach the generation actors: through Ray's object store; by one broadcast, each on a GPU of its own (or "
        "all on CPUs); as handles of one GPU's memory, which policy and generation share; auto: the latter two where GPUs allow",
    )
    start_timeout_s: float = option(300.0, "longest wait for actors or workers to start", gt=0)
    call_timeout_s: float = option(
        1800.0, "longest wait for any one call to an actor, and for a step of a supervised stage", gt=0
    )

    restarts: int = option(
        5,
        "PPO and evaluation: how many actors in a row may be lost without progress between, each made again, before the run "
        "stops; 0: none",
        ge=0,
    )
    snapshot_every: int = option(
        1,
        "PPO: steps between two copies of the trained state in memory, which a lost rank of policy or critic goes back to",
        gt=0,
    )
    snapshot_gb: float = option(
        1.0,
        "most GB that these copies (two) may take; where they would take more, a lost rank goes back to the last checkpoint",
        ge=0,
    )

    @property
    def roles(self) -> dict[str, RoleConfig]:
        """Role -> its actors."""
        trained: dict[str, RoleConfig] = {"policy": self.policy, "critic": self.critic}
        return {"generation": self.generation, "reward": self.reward, "reference": self.reference} | trained


class TrackingConfig(Section):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = option(True, "write TensorBoard event files")
    wandb: str | None = option(None, "Weights & Biases project (needs the extra 'wandb')")
    mlflow: str | None = option(None, "MLflow experiment (needs the extra 'mlflow')")
