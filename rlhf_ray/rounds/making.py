"""A round from its votes to its outcome: plan, train, decide, publish. What stopped goes on where it was."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config import Recipe, VotesConfig
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.data.paths import absolute_paths
from rlhf_ray.data.voted import filters_of
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.outcome import read_summary
from rlhf_ray.evaluation.verdict import standing_of
from rlhf_ray.publish.client import dropped_if_refused, kept_copy, publish
from rlhf_ray.publish.servers import server_of
from rlhf_ray.rounds.decision import decide
from rlhf_ray.rounds.round_folders import FurtherRound, RoundOutcome, VotesUsed, round_at, rounds_of, run_of
from rlhf_ray.rounds.round_recipe import is_kept, round_recipe
from rlhf_ray.runs.resume import recorded_recipe
from rlhf_ray.runs.run_folder import RunFolder, folder_path, held
from rlhf_ray.runs.start_from import link_tree
from rlhf_ray.votes.database import Database
from rlhf_ray.votes.reading import read_judgements

Train = Callable[[Recipe, Path], object]  # all stages of the recipe in a run folder, from where that stands


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What a round builds on."""

    number: int  # the last round that ended, better or not: 1 is the run itself
    policy: Path  # of the last round that was better
    newest: float  # when the newest vote of any round so far was cast, seconds since 1970


def make_round(
    run_dir: str | Path,
    votes: str | None,
    overrides: Sequence[str] = (),
    *,
    train: Train,
    again: bool = False,
    share: float = 1.0,
    say: Callable[[str], None],
) -> FurtherRound:
    """The next round of a run, or the one that was begun. again: that one from its beginning. share: of the server's requests.

    UserError for a run without a policy, for no votes or too few new ones, a damaged round, and what `train` raises.
    """
    run = RunFolder(folder_path(run_dir, "RUN"))
    first = recorded_recipe(run)
    if first is None or run_of(run) != run:
        own = f"; its run is {run_of(run).path}" if run_of(run) != run else ""
        why = " (it has no recipe.yaml)" if run.path.is_dir() else f": there is no folder {run.path}"
        raise UserError(f"'{run_dir}' is no run folder that rounds can follow{own or why}")
    ended = [each for each in rounds_of(run) if each.done]
    begun = [each for each in rounds_of(run) if not each.done]
    before = _before(run, ended)
    if begun and (len(begun) > 1 or begun[0].number < before.number):
        raise UserError(
            f"{begun[0].folder.path} has no round.json, and later rounds are there: it is damaged; put the file back, or "
            "delete the folder"
        )
    this = begun[0] if begun else round_at(run, before.number + 1)
    if again and begun:
        with held(this.folder):
            shutil.rmtree(this.folder.path)
    recipe = _recipe(first, run, this, before, votes, overrides)
    assert recipe.data.votes is not None, "round_recipe sets it"
    if not this.folder.stage("data").done:
        _check_votes(recipe.data.votes, recipe.rounds.least_new_votes, before, run)
    with held(this.folder):
        for name in ("fluency", "judge"):
            source, target = run.stage(name), this.folder.stage(name)
            if is_kept(recipe, name) and source.done and not target.path.exists():
                link_tree(source.path, target.path)
    say(f"Round {this.number} of {run.path}, from {before.policy}")
    try:
        train(recipe, this.folder.path)
    except UserError as error:
        if not this.folder.stage("data").done:
            raise
        raise UserError(
            f"{error}\nround {this.number} stands where it was; the same command with --again begins it from its start, with the "
            "votes that are there by then"
        ) from error
    this.finish(_outcome(run, this, recipe, before, share))
    return this


def _before(run: RunFolder, ended: Sequence[FurtherRound]) -> Basis:
    outcomes = {each.number: each.outcome() for each in ended}
    better = [each for each in ended if outcomes[each.number].verdict.better]
    policy = better[-1].policy if better else run.stage("ppo").model
    if not better and not run.stage("ppo").done:
        raise UserError(f"{run.path} has no policy yet, which a round could start from; finish the run first: rlhf-ray run")
    if not policy.is_dir():
        raise UserError(f"{policy} is not there, and the next round starts from it; put it back, or delete the rounds after it")
    newest = [outcome.votes.newest for outcome in outcomes.values()]
    if not newest and run.stage("data").done:
        newest = [float((run.stage("data").summary().get("votes") or {}).get("newest", 0.0))]
    return Basis(number=max(outcomes, default=1), policy=policy, newest=max(newest, default=0.0))


def _recipe(
    first: Recipe, run: RunFolder, this: FurtherRound, before: Basis, votes: str | None, overrides: Sequence[str]
) -> Recipe:
    """As the round recorded it; of a new one, that which follows from the run's."""
    recorded = recorded_recipe(this.folder)
    if recorded is None:
        return absolute_paths(round_recipe(first, run, this.number, before.policy, votes, overrides))
    values: dict[str, Any] = recorded.model_dump(mode="json")
    if votes is not None and isinstance(values["data"]["votes"], dict):
        values["data"]["votes"]["url"] = votes
    return absolute_paths(build_recipe(values, list(overrides), str(this.folder.recipe)))


def _check_votes(config: VotesConfig, least: int, before: Basis, run: RunFolder) -> None:
    """UserError where people have said too little since the round before."""
    database = Database(config.url)
    try:
        cast = [each.voted_at for each in read_judgements(database, filters_of(config))]
    finally:
        database.close()
    new = sum(at > before.newest for at in cast)
    remedy = f"collect more (rlhf-ray serve {run.path} --votes {config.url})"
    if not cast:
        raise UserError(f"{database.name} holds no votes that the filters let through; {remedy}")
    if not new:
        raise UserError(f"{database.name} holds no votes that round {before.number} did not have ({len(cast)} in all); {remedy}")
    if new < least:
        since = f" since round {before.number}" if before.newest else ""
        raise UserError(
            f"{database.name} holds {new} new votes{since}, and a round needs rounds.least_new_votes = {least}; {remedy}, or lower "
            "that"
        )


def _outcome(run: RunFolder, this: FurtherRound, recipe: Recipe, before: Basis, share: float) -> RoundOutcome:
    summary = read_summary(this.folder.stage("evaluation").path)
    verdict = decide(summary, recipe.rounds)
    standing = standing_of(summary, "reward_model")
    version, why_not = _published(run, this, share) if verdict.better else (None, verdict.why)
    return RoundOutcome(
        starts_from=recipe.model.name_or_path, votes=_votes_used(this, recipe, before),
        reward_accuracy="not measured" if standing is None else standing["figure_in_words"], verdict=verdict, version=version,
        share=None if version is None else share, not_published=why_not,
    )  # fmt: skip


def _votes_used(this: FurtherRound, recipe: Recipe, before: Basis) -> VotesUsed:
    read = this.folder.stage("data").summary().get("votes")
    if not isinstance(read, dict) or not {"train", "held_out", "newest"} <= read.keys() or recipe.data.votes is None:
        raise UserError(
            f"{this.folder.stage('data').done_file} does not say which votes were read; begin the round from its start: --again"
        )
    database = Database(recipe.data.votes.url)
    try:
        cast = [each.voted_at for each in read_judgements(database, filters_of(recipe.data.votes))]
    finally:
        database.close()
    new = sum(before.newest < at <= read["newest"] for at in cast)
    return VotesUsed(train=read["train"], held_out=read["held_out"], newest=float(read["newest"]), new=new)


def _published(run: RunFolder, this: FurtherRound, share: float) -> tuple[str | None, str | None]:
    """(the version, None), or (None, why not): a round that is better stays so, whatever the server says."""
    since = time.time() - 1  # file systems keep coarse times
    try:
        note = server_of(run.path)
        if note is None:
            return None, f"no server of this run is up; rlhf-ray serve {this.folder.path}"
        version = kept_copy(this.policy, this.folder.path / "published")
        with dropped_if_refused(Path(version.folder), since):
            publish(note, version, share=share)
    except UserError as error:
        return None, f"{error}; then rlhf-ray publish {this.folder.path}"
    return version.id, None
