"""The PPO stage: starts the actors, runs the loop over them, writes what it leaves behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from rlhf_ray.actors.budgets import Budget, Failure, in_short, tells_of_end
from rlhf_ray.actors.calls import Handle, Member
from rlhf_ray.actors.checkpointing import Checkpoints, publish_best
from rlhf_ray.actors.checks import precisions_of
from rlhf_ray.actors.groups import (
    AdapterOff,
    CriticGroup,
    ExperienceHandle,
    GenerationGroup,
    PolicyGroup,
    RayRoles,
    ReferenceGroup,
    RewardGroup,
)
from rlhf_ray.actors.layout import bundle_of, in_words
from rlhf_ray.actors.placement import Placement
from rlhf_ray.actors.publishing import Publishing
from rlhf_ray.actors.recovery import Recovery, state_in
from rlhf_ray.actors.role_actors import (
    ExperienceActor,
    GenerationActor,
    InFlightGenerationActor,
    ReferenceActor,
    RewardActor,
)
from rlhf_ray.actors.session import worker_environment
from rlhf_ray.actors.stragglers import Stragglers, tells_of_copy
from rlhf_ray.actors.token_checks import check_tokens
from rlhf_ray.actors.trainer_actors import CriticActor, PolicyActor, SendingPolicyActor
from rlhf_ray.actors.wait import ActorDied, Deadline, Waiter
from rlhf_ray.actors.weight_meeting import connect_weights
from rlhf_ray.actors.worker_start import forked_actors
from rlhf_ray.config import GroupConfig, Recipe, RoleConfig
from rlhf_ray.data.role_files import check_columns, count_rows
from rlhf_ray.errors import NotFinite, RunFailed, UserError
from rlhf_ray.models.card import model_card
from rlhf_ray.models.turns import updates_in_turn
from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.loop import LoopHooks, LoopState, PPOLoop
from rlhf_ray.ppo.stage_end import closing_figures, rolls_back
from rlhf_ray.ppo.step import check_enough
from rlhf_ray.runs.elsewhere import take_in
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.metrics import MetricsWriter, Sample
from rlhf_ray.runs.run_folder import RunFolder, reference_of, start_model

Progress = Callable[[dict], None]


def give_up(failure: Failure) -> None:
    raise failure


@contextmanager
def ray_roles(
    recipe: Recipe, folder: RunFolder, waiter: Waiter, on_lost: Callable[[Failure], None] = give_up
) -> Iterator[RayRoles]:
    """All actors of the recipe, ready to work; they end with the `with`.

    on_lost: hears of one that dies or hangs at the start; unless it raises, all are started once more.
    """
    resources, start = recipe.resources, start_model(recipe, folder)
    critic_start = str(folder.stage("reward").model) if recipe.ppo.critic_init == "reward" else start
    spins = recipe.ppo.steps_ahead == 0
    with forked_actors(worker_environment(spins=spins)) as runtime_env, Placement(
        recipe.ppo_roles, waiter, strategy=resources.placement, timeout_s=resources.start_timeout_s,
        alone="generation" if spins else None, runtime_env=runtime_env,
    ) as placement:  # fmt: skip

        def group(kind, role: str, config: RoleConfig, *args, word: str = "actor") -> list[Member]:
            return [
                Member(role, number, partial(
                    kind.options(**placement.options(role, number)).remote, f"{role}-{number}", recipe, folder, config,
                    *(part(number) if callable(part) else part for part in args),
                ), word, in_words(bundle_of(config)))
                for number in range(config.actors)
            ]  # fmt: skip

        def ranks(kind, role: str, config: GroupConfig) -> list[Member]:
            return group(kind, role, config, lambda rank: rank, config.actors, word="rank")

        in_flight = recipe.ppo.weights_in_flight
        # Other roles compute on the same GPU once everything is drawn.
        sleeps = 0 < resources.generation.gpus < 1 and recipe.ppo.steps_ahead == 0
        generator = InFlightGenerationActor if in_flight else GenerationActor
        generation = group(generator, "generation", resources.generation, start)
        reward = group(RewardActor, "reward", resources.reward, start)
        reference = []
        if "reference" in recipe.ppo_roles:
            reference = group(ReferenceActor, "reference", resources.reference, reference_of(recipe, folder))
        trainer = SendingPolicyActor if recipe.ppo.steps_ahead > 0 else PolicyActor
        policy = PolicyGroup(ranks(trainer, "policy", resources.policy))
        policy.start, critic = Path(start), None
        if recipe.ppo.has_critic:
            critic = CriticGroup(ranks(CriticActor, "critic", resources.critic))
            critic.start = Path(critic_start)
            critic.turn_after = policy if updates_in_turn(recipe) else None
        make_experience = ExperienceActor.options(num_cpus=0, runtime_env=runtime_env).remote
        experience = Member(
            "experience", 0, partial(make_experience, "experience-0", recipe, folder, RoleConfig(threads=1))
        )
        roles = RayRoles(
            GenerationGroup(generation, in_flight, sleeps), RewardGroup(reward),
            ReferenceGroup(reference) if reference else AdapterOff(policy), policy, critic,
            ExperienceHandle(
                experience, resources.policy.actors, resources.critic.actors if critic else 0, recipe.ppo.samples_per_prompt
            ), waiter,
        )  # fmt: skip
        try:
            while True:
                try:
                    roles.start(roles.members, roles.trained, resources.start_timeout_s)
                    connect_weights(policy, roles.generation, waiter, resources, waits=recipe.ppo.steps_ahead == 0)
                    break
                except (ActorDied, Deadline, RayTaskError) as failure:
                    on_lost(failure)
                    for member in roles.members:
                        member.calls.clear()
                        member.make_again()
            yield roles
        finally:
            for member in roles.members:
                ray.kill(member.actor)


def _in_bfloat16(recipe: Recipe) -> bool:
    """Whether the policy computes in it, as far as this process can tell: its machine may have no GPU."""
    precisions = precisions_of(recipe)
    return (precisions.ppo_gpu if recipe.resources.policy.gpus > 0 else precisions.ppo) == 2


def run_ppo(recipe: Recipe, folder: RunFolder, progress: Progress) -> None:
    """Run the PPO stage to its end, or from its last good checkpoint. Raises StageStopped when asked to stop."""
    stage, ppo = folder.stage("ppo"), recipe.ppo
    stage.checkpoints.mkdir(parents=True, exist_ok=True)
    for left_over in stage.checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(left_over)

    def on_wait(name: str, seconds: float, what: str) -> None:
        progress({"stage": "ppo", "waiting_for": name, "waiting_s": seconds, "phase": what})

    waiter = Waiter(
        recipe.resources.call_timeout_s,
        "raise resources.call_timeout_s, or look in the run folder's logs/ for what holds it up",
        on_wait,
    )
    check_columns(recipe, folder)  # e.g. of data that an older run prepared
    prompts, eval_prompts = count_rows(folder, "prompts"), count_rows(folder, "eval_prompts")
    check_enough(prompts, ppo.rollout_batch_size)
    state = LoopState(kl_coef=ppo.kl_coef)
    last = checkpoint.last_good(stage.checkpoints, lambda message: _tell_of_damage(folder, message))
    if last is not None:
        state = state_in(last, ppo)
        progress({"stage": "ppo", "goes_on_from": state.step})
        publish_best(folder, state, only=True)  # where the run died between the two
    check_tokens(recipe, folder)
    events = EventLog(folder.events)
    budget = Budget(recipe.resources.restarts, tells_of_end(events, progress, "ppo"))
    on_lost = _starts_again(budget, events, progress, state.step)
    with ray_roles(recipe, folder, waiter, on_lost) as roles, MetricsWriter(
        stage.metrics, stage.path / "tensorboard" if recipe.tracking.tensorboard else None,
        # -1: from step 0 on everything is written again, whatever a run that died before its first checkpoint left.
        recipe.tracking.wandb, recipe.tracking.mlflow, resume_step=state.step or -1, run_name=recipe.name,
    ) as metrics:  # fmt: skip
        recovery = Recovery(recipe, roles, waiter, stage.checkpoints, budget=budget, events=events, progress=progress)
        waiter.mend = recovery.mend
        waiter.stragglers = Stragglers(
            roles.let_move(), lambda: roles.members, waiter.answered, waiter.failure_of, tells_of_copy(events, progress, "ppo")
        )
        checkpoints = Checkpoints(recipe, folder, roles.trained, waiter.get, progress)

        def train(state: LoopState) -> PPOLoop:
            """The stage from a state of policy and critic on."""
            checkpoints.abandon()
            hooks = _hooks(recipe, folder, roles, metrics, progress, recovery, checkpoints, lambda: loop.state)
            loop = PPOLoop(
                roles, ppo, hooks, state, prompts=prompts, eval_prompts=min(ppo.eval_prompts, eval_prompts),
                chunk_size=recipe.generation.chunk_size, seed=recipe.ppo_seed, bfloat16=_in_bfloat16(recipe),
                temperature=recipe.generation.temperature,
            )  # fmt: skip
            metrics.drop_after(state.step or -1)
            if state.step > 0 and checkpoint.step_folder(stage.checkpoints, state.step) not in checkpoint.complete(
                stage.checkpoints
            ):
                hooks.save(state)  # the loop takes it that a state of an earlier step is that of a checkpoint
            try:
                ended = loop.run()
            except (NotFinite, UserError):  # the ranks live, and what they are writing is of a step before
                with suppress(RunFailed):
                    checkpoints.finish()
                raise
            if ended and not rolls_back(loop.state, ppo):
                adapter = stage.path / "adapter" if ppo.lora is not None else None
                _save_model(recipe, folder, roles, waiter, stage.model, loop.state, adapter)
            checkpoints.finish()
            return loop

        loop = recovery.run(train, state, last)
        if not loop.finished:
            raise checkpoints.stopped(loop.state, ppo.steps)
    publish_best(folder, loop.state, only=True)  # where there was no room for the last checkpoint
    if rolls_back(loop.state, ppo):
        copy_model(folder.best_model, stage.model)
    stage.finish(closing_figures(loop.state, ppo))


def _starts_again(budget: Budget, events: EventLog, progress: Progress, step: int) -> Callable[[Failure], None]:
    """What is done when an actor is lost before all are ready: one try of the budget, an event, a line."""
    starting = time.monotonic()

    def on_lost(failure: Failure) -> None:
        nonlocal starting
        budget.charge_start(failure, "start of the actors")
        lost_s, starting = time.monotonic() - starting, time.monotonic()
        done = "all actors were started again"
        what, seen = "an actor was lost at the start", in_short(failure)
        events.add(what, done, lost_s, stage="ppo", step=step, phase="start", seen=seen, steps_lost=0)
        progress({"stage": "ppo", "say": f"{what}: {seen}; {done}; {lost_s:.1f} s lost", "warns": True})

    return on_lost


def _tell_of_damage(folder: RunFolder, message: str) -> None:
    EventLog(folder.events).add(message, "read the one before it", stage="ppo")


def copy_model(source: Path, target: Path) -> None:
    """Whole or not at all; what stood at `target` goes."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _of_all(roles: RayRoles, method: str, *args) -> list[Handle]:
    return [handle for group in roles.trained for handle in group.call(method, *args)]


def _hooks(
    recipe: Recipe,
    folder: RunFolder,
    roles: RayRoles,
    metrics: MetricsWriter,
    progress: Progress,
    recovery: Recovery,
    checkpoints: Checkpoints,
    state_now: Callable[[], LoopState],
) -> LoopHooks:
    stage, waiter = folder.stage("ppo"), roles.waiter

    def record(step: int, values: dict[str, float]) -> None:
        values = values | waiter.take_totals() | recovery.budget.take_failures()
        metrics.write(step, values)
        checkpoints.look()
        recovery.step_done(state_now())
        progress({"stage": "ppo", "step": step, "total": recipe.ppo.steps, "metrics": values})

    def samples(step: int, texts: list[tuple[str, str]], scores: list[float]) -> None:
        rows = [Sample(*text, score) for text, score in zip(texts, scores, strict=True)]
        metrics.write_samples(step, rows)
        progress({"stage": "ppo", "samples": [{"step": step, **asdict(row)} for row in rows]})

    def save_best(state: LoopState) -> None:
        _save_model(recipe, folder, roles, waiter, folder.candidate(state.step), state)

    publishing = Publishing(recipe, folder, roles, progress)
    return LoopHooks(
        record=record, samples=samples, save=checkpoints.save, save_best=save_best, publish=publishing.publish,
        stop_requested=stage.stop_file.exists,
    )  # fmt: skip


def _save_model(
    recipe: Recipe,
    folder: RunFolder,
    roles: RayRoles,
    waiter: Waiter,
    target: Path,
    state: LoopState,
    adapter: Path | None = None,
) -> None:
    card = model_card(
        recipe, "ppo", {"steps": state.step, "best held-out score": state.best_score, "best step": state.best_step}
    )
    waiter.get(roles.policy.call("save_model", target, card, adapter), "writing the model")
    take_in(folder, target, *([] if adapter is None else [adapter]))
