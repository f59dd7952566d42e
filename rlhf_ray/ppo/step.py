"""One PPO step in verbs. No Ray here: a role is any object with the methods below. `loop` takes step after step.

A handle is what a method returns before its result is there: an ObjectRef over actors, the value itself in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_ray.algorithms.schedule import draw_seed, epoch_permutation
from rlhf_ray.errors import UserError
from rlhf_ray.messages import Chunk
from rlhf_ray.ppo.gates import check_first_minibatch, check_mismatch, check_off_policy

Handle = Any
Handles = Sequence[Handle]
EVERYBODYS = ("grad_norm", "optimiser_steps")  # statistics of an update that are the same on every rank


class RolloutGeneration(Protocol):
    def generate(self, chunks: Sequence[Chunk]) -> list[Handle]: ...
    def load_weights(self, weights: Sequence[Handle], policy_version: int) -> list[Handle]: ...


class Scoring(Protocol):
    def score(self, rollouts: Sequence[Handle]) -> list[Handle]: ...
    def judge(self, rollouts: Sequence[Handle]) -> list[Handle]: ...
    def texts(self, rollout: Handle, count: int) -> Handle: ...


class ReferenceLogprobs(Protocol):
    def logprobs(self, rollouts: Sequence[Handle]) -> list[Handle]: ...


class Policy(Protocol):
    def logprobs(self, rollouts: Sequence[Handle]) -> list[Handle]: ...
    def update(self, shards: Sequence[Handle], learning_rate: float, kl_coef: float, /) -> list[Handle]: ...
    def weights(self) -> list[Handle]: ...


class CriticValues(Protocol):
    def values(self, rollouts: Sequence[Handle]) -> list[Handle]: ...
    def update(self, shards: Sequence[Handle], learning_rate: float, /) -> list[Handle]: ...


class Experience(Protocol):
    def assemble(
        self, rollouts: Handles, scores: Handles, ref_logprobs: Handles, old_logprobs: Handles, old_values: Handles,
        kl_coef: float,
    ) -> tuple[Handle, list[Handle], list[Handle]]: ...  # fmt: skip
    def evaluate(self, rollouts: Handles, scores: Handles, ref_logprobs: Handles, judged: Handles) -> Handle: ...
    def own_mismatch(self, rollouts: Sequence[Handle], logprobs: Sequence[Handle]) -> Handle: ...
    def zero_variance(self, rollouts: Handles, scores: Handles) -> Handle: ...
    def pack(self, rollouts: Handles, scores: Handles, prompts: int, chunk_size: int) -> tuple[list[Handle], list[Handle]]: ...


class Roles(Protocol):
    """The roles, and the one way to wait for what they return."""

    @property
    def generation(self) -> RolloutGeneration: ...
    @property
    def reward(self) -> Scoring: ...
    @property
    def reference(self) -> ReferenceLogprobs: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def critic(self) -> CriticValues | None: ...  # None: the advantages need none
    @property
    def experience(self) -> Experience: ...

    def wait(self, handles: Sequence[Handle], what: str) -> None:
        """Until all are there, or a deadline has passed; `what` names the wait. A failed call raises here."""
        ...

    def get(self, handles: Sequence[Handle], what: str) -> list[Any]:
        """`wait`, then the values: numbers and a few texts, never tensors."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """What changes from step to step."""

    step: int
    kl_coef: float
    learning_rate: float
    critic_learning_rate: float
    max_mismatch: float
    max_mismatch_kl: float
    max_first_approx_kl: float
    trains_policy: bool = True  # False: a step that warms the critic up
    steps_ahead: int = 0  # by how many versions the samples may be older than the policy


def ppo_step(
    roles: Roles, chunks: Sequence[Chunk], config: StepConfig, redraw: Redraw | None = None
) -> dict[str, float]:
    """Rollout, targets, update, sync: one PPO iteration. Returns its metrics."""
    clock = PhaseTimer()
    rollouts = roles.generation.generate(chunks)
    scores = roles.reward.score(rollouts)
    drawn: dict[str, float] = {}
    if redraw is not None:
        rollouts, scores, drawn = draw_again(roles, rollouts, scores, redraw, config.step)
    metrics = train_on(roles, rollouts, scores, config, clock)
    sync_weights(roles, config.step + 1)
    clock.lap("sync")
    return metrics | drawn | clock.laps


def train_on(
    roles: Roles, rollouts: list[Handle], scores: list[Handle], config: StepConfig, clock: PhaseTimer
) -> dict[str, float]:
    """What an iteration does with its samples: targets and update. Returns its metrics."""
    ref_logprobs = roles.reference.logprobs(rollouts)
    old_logprobs = roles.policy.logprobs(rollouts)
    old_values = roles.critic.values(rollouts) if roles.critic is not None else []
    stats, policy_shards, critic_shards = roles.experience.assemble(
        rollouts, scores, ref_logprobs, old_logprobs, old_values, config.kl_coef
    )
    roles.wait(rollouts, f"generation (step {config.step})")
    clock.lap("generate")
    roles.wait([*scores, *ref_logprobs, *old_logprobs, *old_values], f"scoring and log-probs (step {config.step})")
    clock.lap("score")
    metrics = roles.get([stats], f"assembling (step {config.step})")[0]
    clock.lap("assemble")
    if config.steps_ahead == 0:
        check_mismatch(metrics, config)
    else:
        check_off_policy(metrics, config.steps_ahead, config)

    updates: dict[str, list[Handle]] = {}
    if config.trains_policy:
        updates["policy"] = roles.policy.update(policy_shards, config.learning_rate, config.kl_coef)
    if roles.critic is not None:
        updates["value"] = roles.critic.update(critic_shards, config.critic_learning_rate)
    for name, parts in updates.items():
        metrics |= sum_over_ranks(roles.get(parts, f"{name} update (step {config.step})"))
    clock.lap("update")
    check_first_minibatch(metrics, config.max_first_approx_kl)
    return metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Redraw:
    """DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2)."""

    chunks: Callable[[int, int], list[Chunk]]  # (other prompts drawn so far, how many more) -> what to draw
    rounds: int
    prompts: int  # of a step
    chunk_size: int


def draw_again(
    roles: Roles, rollouts: list[Handle], scores: list[Handle], redraw: Redraw, step: int
) -> tuple[list[Handle], list[Handle], dict[str, float]]:
    """Other prompts in place of those whose samples all score the same -> rollouts, scores, metrics.

    Each round draws as many as are missing, so there is never one too many and none that serves is thrown away. After the
    last round zero-variance groups fill the rest: they add nothing to a gradient, and the batch keeps its size.
    """
    what = f"drawing other prompts (step {step})"
    zero_variance: list[bool] = []
    missing = 0
    for number in range(redraw.rounds + 1):
        (zero_variance,) = roles.get([roles.experience.zero_variance(rollouts, scores)], what)
        missing = redraw.prompts - zero_variance.count(False)
        chunks = redraw.chunks(len(zero_variance) - redraw.prompts, missing) if missing and number < redraw.rounds else []
        if not chunks:
            break
        more = roles.generation.generate(chunks)
        rollouts, scores = [*rollouts, *more], [*scores, *roles.reward.score(more)]
    metrics = {"rollout/prompts_drawn": float(len(zero_variance)), "rollout/prompts_missing": float(missing)}
    if len(zero_variance) > redraw.prompts:
        roles.wait([*rollouts, *scores], what)
        rollouts, scores = roles.experience.pack(rollouts, scores, redraw.prompts, redraw.chunk_size)
    return rollouts, scores, metrics


def sync_weights(roles: Roles, policy_version: int) -> None:
    """The generators get the policy's weights. From now on their rollouts carry this version."""
    synced = send_weights(roles, policy_version)
    roles.wait(synced, f"weight sync (version {policy_version})")


def send_weights(roles: Roles, policy_version: int) -> list[Handle]:
    """Returns when the policy has sent its weights. The handles tell when the generators have received them."""
    weights = roles.policy.weights()
    synced = roles.generation.load_weights(weights, policy_version)
    roles.wait(weights, f"weight sync (version {policy_version})")
    return synced


def sum_over_ranks(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each rank reports its share of a mean over tokens; gradient norm and number of steps are the same on all."""
    return {
        name: parts[0][name] if name.endswith(EVERYBODYS) else sum(part[name] for part in parts) for name in parts[0]
    }


class PhaseTimer:
    """Seconds of the phases of one step, as metrics time/<phase>_s."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{phase}_s"] = now - self._last
        self._last = now


# -- prompts ----------------------------------------------------------------------------------------------------------


def check_enough(prompts: int, batch: int) -> None:
    """UserError unless there are prompts for one step."""
    if prompts < batch:
        raise UserError(f"there are {prompts} prompts, fewer than ppo.rollout_batch_size = {batch}; lower it or add prompts")


def step_prompts(step: int, prompts: int, batch: int, seed: int) -> list[int]:
    """Rows of the prompt set for one step: each epoch a fresh permutation, its last incomplete batch left out.

    A pure function of the step, so the data position is the step number.
    """
    steps_per_epoch = prompts // batch
    epoch, place = divmod(step, steps_per_epoch)
    order = epoch_permutation(prompts, draw_seed(seed, "prompts", epoch))
    return order[place * batch : (place + 1) * batch]


def other_prompts(step: int, prompts: int, taken: Sequence[int], seed: int) -> list[int]:
    """The prompt set without `taken`, in an order of the step's own: where dynamic sampling draws from, front to back."""
    drawn = set(taken)
    return [row for row in epoch_permutation(prompts, draw_seed(seed, "other prompts", step)) if row not in drawn]


def cut_chunks(
    step: int, prompts: Sequence[int], samples: int, chunk_size: int, evaluation: bool = False
) -> list[Chunk]:
    """The step's rows (samples of a prompt side by side) in chunks of chunk_size."""
    rows = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    return [
        Chunk(
            step=step,
            index=chunk,
            prompt_indices=tuple(prompt for prompt, _ in rows[start : start + chunk_size]),
            sample_indices=tuple(sample for _, sample in rows[start : start + chunk_size]),
            evaluation=evaluation,
        )
        for chunk, start in enumerate(range(0, len(rows), chunk_size))
    ]
