"""The sections `resources` and `tracking`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.base import LONGEST_S, MOST_ACTORS, MOST_THREADS, Section, check_reserved, option


class RoleConfig(Section):
    """How many Ray actors a role has and what each reserves."""

    actors: int = option(1, "Ray actors of this role", gt=0, le=MOST_ACTORS)
    cpus: float = option(0.3, "CPUs reserved for each", ge=0)
    gpus: float = option(
        0.0, "GPUs reserved for each: whole ones, or a share of one, which roles have together by with", ge=0
    )
    # `with` is a word of Python's: a field of that name can't be written as the others are.
    locals()["with"] = option(
        None, "the role on whose GPUs these actors stand, the first on its first one's, and so on; null: anywhere"
    )
    __annotations__["with"] = "Literal['generation', 'reward', 'reference', 'policy', 'critic'] | None"
    threads: int | None = option(
        None,
        "torch threads of each; results depend on it to the bit; null: a share of the node's cores, kept in the run's recipe.yaml",
        gt=0,
        le=MOST_THREADS,
    )

    @property
    def host(self) -> str | None:
        """The role that `with` names."""
        return vars(self)["with"]

    @model_validator(mode="after")
    def _gpus_are_whole_or_a_share(self):
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(
                f"gpus = {self.gpus:g} is neither a share of one GPU nor whole ones; give one of up to 1, or a whole number"
            )
        if self.host is not None and not 0 < self.gpus < 1:
            raise ValueError(
                f"with is '{self.host}', but gpus = {self.gpus:g} is no share of a GPU; give a share between 0 and 1, such that "
                "the shares of all roles on it are at most 1"
            )
        return self

    @field_validator("cpus", "gpus")
    @classmethod
    def _can_be_reserved(cls, value: float) -> float:
        return check_reserved(value)


class GroupConfig(RoleConfig):
    """A DeepSpeed group: `actors` is its number of ranks."""

    zero_stage: Literal[0, 1, 2, 3] = option(0, "DeepSpeed ZeRO stage")
    offload_optimizer: bool = option(
        False,
        "with zero_stage 1, 2 or 3: gradients and moments in the host's memory, where the optimiser is",
    )
    offload_param: bool = option(
        False, "with zero_stage 3: a rank's weights in the host's memory, copied to its GPU layer by layer"
    )

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self):
        problem = offload_problem(self.zero_stage, self.offload_optimizer, self.offload_param)
        if problem is not None:
            raise ValueError(problem)
        return self


def offload_problem(zero_stage: int, offload_optimizer: bool, offload_param: bool) -> str | None:
    """Why DeepSpeed can't do so, with the remedy."""
    if offload_optimizer and zero_stage == 0:
        return "offload_optimizer is true and zero_stage is 0, at which DeepSpeed offloads nothing; set zero_stage to 1, 2 or 3"
    if offload_param and zero_stage < 3:
        return f"offload_param is true and zero_stage is {zero_stage}, at which each rank holds all weights; set zero_stage to 3"
    return None


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
        "all on CPUs); as handles of one GPU's memory, which policy and generation share (without ppo.steps_ahead); auto: the "
        "latter two where GPUs allow",
    )
    start_timeout_s: float = option(300.0, "longest wait for actors or workers to start", gt=0, le=LONGEST_S)
    call_timeout_s: float = option(
        1800.0, "longest wait for any one call to an actor, and for a step of a supervised stage", gt=0, le=LONGEST_S
    )

    upload_timeout_s: float = option(
        600.0, "run folder in a store (s3://...): longest wait at the end for what is not uploaded yet", gt=0, le=LONGEST_S
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


TRAINERS = ("policy", "critic")  # in the order that they are placed in, before all others


def sharing_problem(roles: Mapping[str, RoleConfig], tensor_parallel: int) -> str | None:
    """Why the roles of PPO can't have their GPUs so, one sentence with the remedy."""
    for name, role in roles.items():
        key = f"resources.{name}"
        parallel = tensor_parallel if name == "generation" else 1
        if parallel > 1 and role.gpus != parallel:
            return (
                f"generation.tensor_parallel = {parallel} splits each generator over {parallel} whole GPUs, but {key}.gpus = "
                f"{role.gpus:g}; set it to {parallel}, or tensor_parallel to 1"
            )
        if parallel == 1 and role.gpus > 1:
            more = "generation.tensor_parallel too" if name == "generation" else f"{key}.actors to more"
            return f"{key}.gpus = {role.gpus:g}, but each of its actors computes on one GPU; set it to 1, and {more}"
        if role.host is not None and (problem := _host_problem(name, role.host, roles)) is not None:
            return problem
        shared = [other for other, config in roles.items() if config.host == name]
        shares = role.gpus + sum(roles[other].gpus for other in shared)
        if shared and shares > 1 + 1e-9:
            parts = " + ".join(f"{other} {roles[other].gpus:g}" for other in (name, *shared))
            return (
                f"the roles on one GPU of {name} need {shares:g} of it ({parts}); lower resources.*.gpus so that they make up at "
                "most 1"
            )
        if name in TRAINERS and role.actors > 1 and 0 < role.gpus <= 0.5 and role.host is None and not shared:
            return (
                f"{key}.gpus = {role.gpus:g} lets two of its {role.actors} ranks stand on one GPU, where NCCL ends with an error; "
                f"set it to 1, or name the roles that share each rank's GPU: resources.generation.with: {name}"
            )
    return None


def _host_problem(name: str, host: str, roles: Mapping[str, RoleConfig]) -> str | None:
    key, role = f"resources.{name}.with", roles[name]
    if host not in roles:
        return f"{key} is '{host}', but this recipe's PPO has no {host} actors; name another role, or set it to null"
    if host == name:
        return f"{key} is '{host}', the role itself; name another role, or set it to null"
    there = roles[host]
    if there.host is not None:
        return f"{key} is '{host}', which stands with '{there.host}' itself; set it to {there.host}"
    if not 0 < there.gpus < 1:
        return (
            f"{key} is '{host}', but resources.{host}.gpus = {there.gpus:g} leaves nothing of its GPUs; "
            f"give {host} a share between 0 and 1"
        )
    if role.actors > there.actors:
        return (
            f"{key} is '{host}', but resources.{name}.actors = {role.actors} is more than its {there.actors}; "
            f"set it to {there.actors} or less"
        )
    return None


class TrackingConfig(Section):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = option(True, "write TensorBoard event files")
    wandb: str | None = option(None, "Weights & Biases project (needs the extra 'wandb')")
    mlflow: str | None = option(None, "MLflow experiment (needs the extra 'mlflow')")
