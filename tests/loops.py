"""Loops of PPO with scripted roles or with the real ones in one process."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from in_process import LocalRoles
from tiny import tiny_recipe, write_start

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import UserError
from rlhf_ray.messages import Scores
from rlhf_ray.ppo.loop import LoopHooks, LoopState, PPOLoop
from rlhf_ray.ppo.step import StepConfig
from rlhf_ray.runs.run_folder import RunFolder


@dataclass(eq=False)
class Handle:
    """A verb's result before it is there."""

    verb: str
    value: object = None


@dataclass
class ScriptedRoles:
    """Every role in one: writes down what is asked of it, and answers from the script."""

    mismatch: float = 0.0
    mismatch_kl: float = 0.0
    kl: float = 1.0
    eval_scores: list[float] = field(default_factory=lambda: [0.0] * 100)
    eval_judge: list[float] = field(default_factory=list)
    broken: str = ""  # waiting for this verb's handles fails
    events: list[tuple] = field(default_factory=list)
    handles: list[Handle] = field(default_factory=list)
    waits: list[list[Handle]] = field(default_factory=list)

    def __post_init__(self):
        self.generation = self.reward = self.reference = self.policy = self.critic = self.experience = self

    def _answer(self, verb, *values):
        made = [Handle(verb, value) for value in values]
        self.handles += made
        return made

    def _log(self, verb, *what):
        self.events.append((verb, *what))

    @property
    def waited(self):
        return [handle for handles in self.waits for handle in handles]

    def verbs(self):
        return [event[0] for event in self.events]

    def generate(self, chunks):
        self._log("generate", chunks)
        return self._answer("generate", *chunks)

    def load_weights(self, weights, policy_version):
        self._log("load_weights", policy_version)
        assert [handle.verb for handle in weights] == ["weights"]
        return self._answer("load_weights", policy_version)

    def score(self, rollouts):
        self._log("score")
        return self._answer("score", *(Scores(total=np.ones(1, np.float32)) for _ in rollouts))

    def judge(self, rollouts):
        self._log("judge")
        return self._answer("judge", *rollouts)

    def texts(self, rollout, count):
        return self._answer("texts", [("prompt", "response")])[0]

    def logprobs(self, rollouts):
        self._log("logprobs")
        return self._answer("logprobs", *rollouts)

    def values(self, rollouts):
        self._log("values")
        return self._answer("values", *rollouts)

    def assemble(self, rollouts, scores, ref_logprobs, old_logprobs, old_values, kl_coef):
        self._log("assemble", kl_coef)
        parts = rollouts, scores, ref_logprobs, old_logprobs, old_values
        verbs = [{handle.verb for handle in part} for part in parts]
        assert verbs == [{"generate"}, {"score"}, {"logprobs"}, {"logprobs"}, {"values"}]
        stats = {"policy/mismatch_p99": self.mismatch, "policy/mismatch_kl": self.mismatch_kl, "objective/kl": self.kl}
        return self._answer("assemble", stats)[0], ["policy shard"], ["critic shard"]

    def update(self, shards, learning_rate, kl_coef=None):
        self._log("update", *shards, learning_rate)
        return self._answer("update", {"policy/loss": 0.5})

    def weights(self):
        self._log("weights")
        return self._answer("weights", None)

    def evaluate(self, rollouts, scores, ref_logprobs, judged):
        self._log("evaluate")
        figures = {"eval/score": self.eval_scores.pop(0)}
        if judged:
            assert {handle.verb for handle in judged} == {"judge"}
            figures["eval/judge"] = self.eval_judge.pop(0)
        return self._answer("evaluate", figures)[0]

    def wait(self, handles, what):
        self.waits.append(list(handles))
        if any(handle.verb == self.broken for handle in handles):
            raise UserError(f"{self.broken} failed in {what}")

    def get(self, handles, what):
        self.wait(handles, what)
        return [handle.value for handle in handles]


@dataclass
class Diary:
    """Hooks that write down what the controller tells them."""

    records: list[tuple] = field(default_factory=list)
    saves: list[LoopState] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    stop_after: int | None = None

    def hooks(self):
        return LoopHooks(
            record=lambda step, metrics: self.records.append((step, dict(metrics))),
            samples=lambda step, texts, scores: self.samples.append(step),
            save=lambda state: self.saves.append(state) is None,
            save_best=lambda state: self.best.append(state.step),
            publish=lambda state: self.published.append(state.step),
            stop_requested=lambda: self.stop_after is not None and max(self.steps(), default=-1) >= self.stop_after,
        )

    def steps(self):
        return [step for step, _ in self.records]


def scripted_loop(roles, diary, state=None, prompts=10, **options):
    config = PPOConfig(
        **{
            "steps": 7,
            "rollout_batch_size": 4,
            "minibatch_size": 4,
            "microbatch_size": 4,
            "eval_every": 3,
            "eval_prompts": 3,
            "checkpoint_every": 2,
            **options,
        }
    )
    return PPOLoop(
        roles,
        config,
        diary.hooks(),
        state or LoopState(kl_coef=config.kl_coef),
        prompts=prompts,
        eval_prompts=3,
        chunk_size=3,
        seed=0,
    )


def options(**values):
    return StepConfig(
        **{
            "step": 4,
            "kl_coef": 0.1,
            "learning_rate": 0.5,
            "critic_learning_rate": 0.25,
            "max_mismatch": 0.5,
            "max_mismatch_kl": 0.01,
            "max_first_approx_kl": 1e-3,
            **values,
        }  # fmt: skip
    )


@pytest.fixture(name="folder", scope="module")
def loop_folder(tmp_path_factory):
    return write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("loop")))


def real_loop(recipe, roles, diary, state=None):
    return PPOLoop(
        roles,
        recipe.ppo,
        diary.hooks(),
        state or LoopState(kl_coef=recipe.ppo.kl_coef),
        prompts=16,
        eval_prompts=6,
        chunk_size=recipe.generation.chunk_size,
        seed=recipe.seed,
    )


def run_real(recipe, folder, **kwargs):
    roles, diary = LocalRoles(recipe, folder, **kwargs), Diary()
    real_loop(recipe, roles, diary).run()
    return roles, diary


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def count_t(prompts, responses):
    """A reward that is easy to raise: the share of one letter."""
    return [text.count("t") for text in responses]


def count_a_few(prompts, responses):
    """A reward that most prompts' samples share: whether two letters occur."""
    return [float("t" in text and "o" in text) for text in responses]


def words(prompts, responses):
    return [float(len(response.split())) for response in responses]
