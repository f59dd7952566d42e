"""The rounds of a run: RUN/rounds/2, RUN/rounds/3, ..., each a run folder of its own. Round 1 is the run itself."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage import read_object, write_atomically

PARENT = "rounds"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class VotedShare(_Part):
    """A share of comparisons with its 95 % interval."""

    mean: float
    low: float
    high: float


class VotesUsed(_Part):
    """What the round's data stage read."""

    train: int
    held_out: int
    newest: float  # when the newest vote was cast, seconds since 1970
    new: int  # of all, those that the round before did not have


class Verdict(_Part):
    """Whether the round is better than what it started from."""

    scorer: str  # "judge" or "reward_model"
    win_rate: VotedShare  # by the scorer, over the policy that the round started from
    accuracy: VotedShare | None  # how often the scorer orders pairs as people do
    pairs: int  # that this was measured on
    measured_on: str  # "held-out votes", "held-out preferences" or "nothing"
    expected: VotedShare | None  # the share in which people are expected to prefer it
    better: bool
    why: str


class RoundOutcome(_Part):
    """round.json: what a round came to."""

    starts_from: str
    votes: VotesUsed
    reward_accuracy: str  # the reward model on held-out rows, in words
    verdict: Verdict
    version: str | None  # that was published
    share: float | None  # of the server's requests
    not_published: str | None  # why


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherRound:
    """One further round."""

    number: int
    folder: RunFolder

    @property
    def file(self) -> Path:
        return self.folder.path / "round.json"

    @property
    def done(self) -> bool:
        return self.file.exists()

    @property
    def policy(self) -> Path:
        return self.folder.stage("ppo").model

    def outcome(self) -> RoundOutcome:
        """UserError for a file that is gone or damaged."""
        remedy = "delete it, and the same command decides again"
        found = read_object(self.file, remedy)
        try:
            return RoundOutcome.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "it"
            raise UserError(f"{self.file} is damaged: {place}: {first['msg'].lower()}; {remedy}") from None

    def finish(self, outcome: RoundOutcome) -> None:
        write_atomically(self.file, json.dumps(outcome.model_dump(), indent=2, allow_nan=False) + "\n")


def round_at(run: RunFolder, number: int) -> FurtherRound:
    return FurtherRound(number=number, folder=RunFolder(run.path / PARENT / str(number)))


def rounds_of(run: RunFolder) -> list[FurtherRound]:
    """Those that were begun, in order."""
    parent = run.path / PARENT
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    return [round_at(run, number) for number in sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]*", name))]


def run_of(folder: RunFolder) -> RunFolder:
    """The run that a round belongs to; of another run folder, the folder itself."""
    path = folder.path
    return RunFolder(path.parents[1]) if path.parent.name == PARENT and path.name.isdigit() else folder
