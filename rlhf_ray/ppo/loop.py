"""The controller: steps, evaluations and checkpoints in order, from wherever a run stands. No Ray here (see `step`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rlhf_ray.algorithms.kl import adapt_kl_coef
from rlhf_ray.algorithms.schedule import linear_anneal
from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import UserError
from rlhf_ray.messages import Chunk
from rlhf_ray.ppo.ahead import Ahead
from rlhf_ray.ppo.gates import OwnLimits, check_mismatch
from rlhf_ray.ppo.step import (
    PhaseTimer,
    Redraw,
    Roles,
    StepConfig,
    cut_chunks,
    other_prompts,
    ppo_step,
    step_prompts,
    sync_weights,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """All that the controller knows; it is in every checkpoint."""

    step: int = 0  # steps finished; also the policy's version and the data position
    kl_coef: float
    best_score: float = float("-inf")  # by the reward or by the judge (ppo.best_by)
    best_step: int = -1
    worse_since: int = 0  # evaluations since the best one, of a policy that had moved
    moved: bool = False  # whether the policy differs from the model that it started from

    def to_json(self) -> dict[str, Any]:
        state = asdict(self)
        return state | {"best_score": None if self.best_step < 0 else self.best_score}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> LoopState:
        """UserError for a key that is unknown, or a value that is not a finite number."""
        unknown = sorted(state.keys() - {each.name for each in fields(cls)})
        if unknown:
            raise UserError(f"the checkpoint's state has the unknown key '{unknown[0]}'; go on with the version that wrote it")
        values: dict[str, Any] = {"moved": state["step"] != 0} | state  # earlier versions did not write `moved`
        bad = [name for name, value in values.items() if not (_is_number(value) or (name, value) == ("best_score", None))]
        if bad:
            raise UserError(f"the checkpoint's state has {bad[0]} = {values[bad[0]]!r}; delete it to go on from the one before it")
        if values["best_score"] is None:
            values["best_score"] = float("-inf")
        return cls(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def judged_best(state: LoopState, value: float) -> LoopState:
    """The state after an evaluation of its step: whether that is the best policy so far, or how long ago that was.

    An evaluation of a policy that has not moved says nothing new: it is neither better nor worse than the start.
    """
    if state.best_step >= 0 and not state.moved:
        return state
    if value > state.best_score:
        return replace(state, best_score=value, best_step=state.step, worse_since=0)
    return replace(state, worse_since=state.worse_since + 1)


def moves_policy(config: StepConfig, metrics: dict[str, float]) -> bool:
    """Whether a step moved a policy that had not moved before: not in the critic's warm-up, nor where nothing was to learn
    from any of its rollouts. (Later a step without a gradient moves it too: Adam has momentum.)"""
    return config.trains_policy and metrics.get("policy/grad_norm") != 0.0


def out_of_patience(state: LoopState, config: PPOConfig) -> bool:
    """Whether ppo.patience ends the training: as many evaluations in a row found no better policy."""
    return config.patience is not None and state.worse_since >= config.patience


@dataclass(slots=True, kw_only=True)
class LoopHooks:
    """What the controller calls to save and report."""

    record: Callable[[int, dict[str, float]], None]  # metrics of a step
    samples: Callable[[int, list[tuple[str, str]], list[float]], None]  # a few held-out (prompt, response), scores
    save: Callable[[LoopState], bool]  # checkpoint; False: not now, come again
    save_best: Callable[[LoopState], None]
    publish: Callable[[LoopState], None] = field(default=lambda _: None)  # a version for a server
    stop_requested: Callable[[], bool] = field(default=lambda: False)


class PPOLoop:
    """Steps, evaluations and checkpoints in order, from wherever `state` stands."""

    def __init__(
        self,
        roles: Roles,
        config: PPOConfig,
        hooks: LoopHooks,
        state: LoopState,
        *,
        prompts: int,
        eval_prompts: int,
        chunk_size: int,
        seed: int,
        bfloat16: bool = False,
        temperature: float = 1.0,
    ):
        """bfloat16: what the policy computes in. temperature: that responses are drawn at."""
        self.roles, self.config, self.hooks, self.state = roles, config, hooks, state
        self.prompts, self.eval_prompts = prompts, eval_prompts
        self.chunk_size, self.seed, self.bfloat16 = chunk_size, seed, bfloat16
        self.temperature = temperature
        gap, kl = config.mismatch_limits(temperature)
        self.limits = OwnLimits(max_mismatch=gap, max_mismatch_kl=kl)
        self.ahead: Ahead | None = None
        if config.steps_ahead > 0:
            self.ahead = Ahead(
                roles, self._chunks, steps_ahead=config.steps_ahead, steps=config.steps, in_flight=config.weights_in_flight
            )  # fmt: skip
        self._last_save, self._owes_save = time.monotonic(), False
        self._saved_step = state.step or None  # a state that isn't fresh came from its checkpoint

    def run(self) -> bool:
        """True when there is no step left to do; False when asked to stop, with a checkpoint asked for either way."""
        sync_weights(self.roles, self.state.step)
        if self.state.step == 0:  # once more, where a run was stopped before its first step
            self.state = replace(self.state, best_score=float("-inf"), best_step=-1, worse_since=0)
            self._evaluate({})
        while not self.finished and not self.hooks.stop_requested():
            self._one_step()
        if self._saved_step != self.state.step:
            self._save()
        return self.finished

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.steps or out_of_patience(self.state, self.config)

    def _one_step(self) -> None:
        config, step = self.config, self.state.step
        anneal = linear_anneal(1.0, step, config.steps) if config.anneal else 1.0
        step_config = StepConfig(
            step=step, kl_coef=self.state.kl_coef, max_mismatch=self.limits.max_mismatch,
            max_mismatch_kl=self.limits.max_mismatch_kl,
            learning_rate=config.learning_rate * anneal, critic_learning_rate=config.critic_learning_rate * anneal,
            max_first_approx_kl=config.first_approx_kl_limit(bfloat16=self.bfloat16, temperature=self.temperature),
            trains_policy=step >= config.critic_warmup_steps, steps_ahead=config.steps_ahead,
        )  # fmt: skip
        started = time.perf_counter()
        if self.ahead is None:
            metrics = ppo_step(self.roles, self._chunks(step), step_config, self._redraw(step))
        else:
            metrics = self.ahead.step(step_config)
        kl_coef = self.state.kl_coef
        if config.adaptive_kl is not None and step_config.trains_policy:  # before that the KL is 0 by construction
            kl_coef = adapt_kl_coef(
                kl_coef,
                metrics["objective/kl"],
                target=config.adaptive_kl.target,
                horizon=config.adaptive_kl.horizon,
                episodes=config.rollouts_per_step,
            )
        moved = self.state.moved or moves_policy(step_config, metrics)
        self.state = replace(self.state, step=step + 1, kl_coef=kl_coef, moved=moved)
        metrics |= {
            "policy/learning_rate": config.learning_rate * anneal,
            "episodes": self.state.step * config.rollouts_per_step,
        }
        if self.state.step % config.eval_every == 0 or self.state.step == config.steps:
            self._evaluate(metrics)
        elif self.ahead is not None:
            self.ahead.fill(self.state.step)  # before a checkpoint is written: generators need not wait for that
        seconds = time.perf_counter() - started
        metrics |= {"time/step_s": seconds, "samples_per_s": config.rollouts_per_step / seconds}
        self.hooks.record(self.state.step, metrics)
        if config.publish_every is not None and self.state.step % config.publish_every == 0:
            self.hooks.publish(self.state)
        overdue = time.monotonic() - self._last_save > 60 * config.checkpoint_minutes
        if not self.finished and (self.state.step % config.checkpoint_every == 0 or overdue or self._owes_save):
            self._save()

    def _chunks(self, step: int) -> list[Chunk]:
        prompts = step_prompts(step, self.prompts, self.config.rollout_batch_size, self.seed)
        return cut_chunks(step, prompts, self.config.samples_per_prompt, self.chunk_size)

    def _redraw(self, step: int) -> Redraw | None:
        """Dynamic sampling, where the recipe has it."""
        config = self.config
        if config.dynamic_sampling_rounds == 0:
            return None
        prompts = step_prompts(step, self.prompts, config.rollout_batch_size, self.seed)
        others = other_prompts(step, self.prompts, prompts, self.seed)
        return Redraw(
            chunks=lambda start, count: cut_chunks(
                step, others[start : start + count], config.samples_per_prompt, self.chunk_size
            ),
            rounds=config.dynamic_sampling_rounds, prompts=config.rollout_batch_size, chunk_size=self.chunk_size,
        )  # fmt: skip

    def _save(self) -> None:
        self._owes_save = not self.hooks.save(self.state)
        if not self._owes_save:
            self._last_save, self._saved_step = time.monotonic(), self.state.step

    def _evaluate(self, metrics: dict[str, float]) -> None:
        """Held-out prompts, the same draws each time; adds eval/* to metrics, keeps the best policy."""
        clock, step, config = PhaseTimer(), self.state.step, self.config
        chunks = cut_chunks(step, range(self.eval_prompts), 1, self.chunk_size, evaluation=True)
        rollouts = self.roles.generation.generate(chunks)
        scores = self.roles.reward.score(rollouts)
        judged = self.roles.reward.judge(rollouts) if config.judge_evaluations else []
        ref_logprobs = self.roles.reference.logprobs(rollouts)
        figures = self.roles.experience.evaluate(rollouts, scores, ref_logprobs, judged)
        texts = self.roles.reward.texts(rollouts[0], 3)
        what = f"evaluation (step {step})"
        own, gaps = [], []
        if self.ahead is not None:
            # These are drawn with the policy's own weights, where training steps have older samples: the gate is here.
            own = self.roles.policy.logprobs(rollouts)
            gaps = [self.roles.experience.own_mismatch(rollouts, own)]
            self.ahead.fill(step)
            self.ahead.settle(step)
        self.roles.wait(rollouts, what)
        self.roles.wait([*scores, *judged, *ref_logprobs, *own], what)
        figures, texts, first_scores, *gaps = self.roles.get([figures, texts, scores[0], *gaps], what)
        for gap in gaps:
            check_mismatch(gap, self.limits)
            figures = figures | gap
        clock.lap("evaluate")
        self.state = judged_best(self.state, figures[f"eval/{config.best_by}"])
        metrics |= figures | {"eval/best_step": float(self.state.best_step)} | clock.laps
        self.hooks.samples(step, texts, [float(score) for score in first_scores.total[: len(texts)]])
        if step == 0:
            self.hooks.record(0, metrics)
        # The policy of step 0 is the model that PPO started from: a copy is of use only to go back to.
        if self.state.best_step == step and (step > 0 or config.roll_back):
            self.hooks.save_best(self.state)
