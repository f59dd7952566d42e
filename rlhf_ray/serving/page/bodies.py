"""The bodies of the page's requests and answers. Their texts hold no control characters except tabs and line ends."""

from __future__ import annotations

import datetime
import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from rlhf_ray.serving.request_parts import StrictBody

LONGEST_PROMPT = 20_000  # characters
LONGEST_NAME = 100


def clean_text(text: str) -> str:
    """With line ends as \\n; ValueError for a control character, which a reader of the data would not see."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n":
            raise ValueError(f"it holds the control character U+{ord(character):04X}; take it out")
    if not text.strip():
        raise ValueError("it holds nothing but spaces; write something, or leave it out")
    return text


def clean_name(name: str) -> str:
    """Composed (NFC), on one line, without characters that can't be seen: two names that look alike are one rater."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    hidden = [each for each in name if unicodedata.category(each) in ("Cc", "Cf", "Co", "Cs", "Cn")]
    if not name or hidden:
        raise ValueError("write a name of visible characters")
    return name


def day(text: object) -> object:
    """ValueError for what is no day as people write it: pydantic takes seconds since 1970, too."""
    if isinstance(text, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII) is None:
        raise ValueError("write a day as 2026-11-30")
    return text


Name = Annotated[
    str,
    Field(min_length=1, max_length=LONGEST_NAME, description="who votes; not needed beside a token"),
    AfterValidator(clean_name),
]
Prompt = Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT), AfterValidator(clean_text)]
Note = Annotated[str, Field(min_length=1, max_length=2_000), AfterValidator(clean_text)]
Edit = Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT), AfterValidator(clean_text)]
Id = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$")]
Side = Literal["left", "right"]
Temperature = Annotated[float, Field(ge=0, le=2)]
MaxTokens = Annotated[int, Field(ge=1, le=100_000)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]  # what JavaScript's numbers hold
Model = Annotated[str, Field(min_length=1, max_length=200)]
Day = Annotated[datetime.date, BeforeValidator(day)]


class ComparisonRequest(StrictBody):
    """Ask for two answers to judge. Without `prompt` the server chooses: a comparison that waits for this rater, or a new one."""

    rater: Name | None = None
    prompt: Prompt | None = None
    models: list[Model] | None = Field(
        None, min_length=2, max_length=2, description="a new comparison of these two; else of any two"
    )
    fresh: bool = Field(False, description="a new comparison, also where others wait for this rater")
    skip: list[Id] = Field([], max_length=100, description="ids of comparisons that are not wanted now")
    temperature: Temperature = 1.0
    max_tokens: MaxTokens | None = Field(
        None, description="longest answer; default: as in the training of the run that is served, else 256"
    )


class ShownAnswer(BaseModel):
    text: str


class ShownComparison(BaseModel):
    """What the rater sees. Which model wrote what is told by the answer to the vote, never before."""

    comparison: str
    prompt: str | list[dict[str, Any]]
    left: ShownAnswer
    right: ShownAnswer
    vote: dict[str, Any] | None = Field(description="the rater's vote, where there is one")


class VoteRequest(StrictBody):
    """A vote. Send it again with the same `key` where no answer came: it counts once."""

    rater: Name | None = None
    comparison: Id
    key: Id = Field(description="made by the client, new for each vote")
    choice: Literal["left", "right", "tie", "both_bad"]
    seconds: float | None = Field(
        None, ge=0, le=10_000_000, description="taken to decide; None: since it was first shown"
    )
    rating: int | None = Field(None, ge=1, le=5, description="how much better: 1 hardly, 5 far")
    reason: Note | None = None
    edit_of: Side | None = None
    edit: Edit | None = Field(None, description="the answer on the side `edit_of` as it should have been")
    flag: Note | None = Field(None, description="why this comparison should train nothing")
    replace: bool = Field(False, description="take the place of this rater's earlier vote")


class Writer(BaseModel):
    model: str
    version: str


class VoteAnswer(BaseModel):
    new: bool = Field(description="false: this vote was stored before")
    choice: str
    voted_at: float = Field(description="seconds since 1970")
    left: Writer
    right: Writer


class ChatBody(StrictBody):
    """Talk to one model; the answer is a stream of OpenAI's chunks."""

    model: Model
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=1_000)
    temperature: Temperature = 1.0
    max_tokens: MaxTokens = 512


class PlaygroundBody(StrictBody):
    """Answers of one or two models, token by token."""

    prompt: Prompt
    models: list[Model] = Field(min_length=1, max_length=2)
    reference: Model | None = Field(None, description="a model with the same tokenizer: each token's log-prob there")
    temperature: Temperature = 1.0
    max_tokens: MaxTokens = 128
    seed: Seed = 0


class ResultFilters(BaseModel):
    """Which votes count."""

    rater: list[Name] = Field([], max_length=100)
    version: list[Model] = Field([], max_length=100, description="of a model, or of MODEL@VERSION")
    since: Day | None = Field(None, description="day (UTC)")
    until: Day | None = None


class VoteList(ResultFilters):
    limit: int = Field(20, ge=1, le=200)
    before: str | None = Field(None, max_length=500, description="`next` of the page before")
    open_to: Name | None = Field(None, description="leave out what this rater has been shown and not judged yet")
