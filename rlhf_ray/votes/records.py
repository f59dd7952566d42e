"""What is judged, and what was said of it: plain values that check themselves.

Times are seconds since 1970 (UTC). A text of a value here can be stored in every database: it holds no NUL and no half
characters.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from rlhf_ray.errors import UserError

Messages = list[dict[str, Any]]
Prompt = str | Messages
Name = Literal["a", "b"]  # of a comparison's two answers, wherever they are shown
Choice = Literal["left", "right", "tie", "both_bad"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "both_bad")
Judged = Literal["a", "b", "tie", "both_bad"]  # a choice, said of the answers and not of the sides
RATINGS = range(1, 6)
LARGEST_SEED = 2**63 - 1
LONGEST_NAME = 200  # characters of an id, a rater, a key


class VoteRefused(UserError):
    """A vote, or what should be judged, that is not stored: the sentence says why, and what to do."""


class UnknownComparison(VoteRefused):
    """There is no comparison with this id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer, and what wrote it."""

    text: str
    model: str
    version: str
    sampling: Mapping[str, Any] = field(default_factory=dict)  # temperature, max_tokens, ...: what JSON can hold
    seed: int | None = None

    def __post_init__(self):
        check_text("an answer's text", self.text, empty=True)
        check_text("an answer's model", self.model)
        check_text("an answer's version", self.version)
        json_of("an answer's sampling parameters", self.sampling)
        if self.seed is not None and not (_is_integer(self.seed) and -LARGEST_SEED <= self.seed <= LARGEST_SEED):
            raise VoteRefused(f"an answer's seed is {self.seed!r}; give an integer of at most 63 bits, or None")

    @property
    def writer(self) -> str:
        """'ppo@7': the model and its version."""
        return f"{self.model}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two answers to one prompt."""

    id: str
    prompt: Prompt
    a: Answer
    b: Answer
    made_at: float

    def answer(self, name: Name) -> Answer:
        return self.a if name == "a" else self.b


@dataclass(frozen=True, slots=True, kw_only=True)
class Showing:
    """A comparison as a rater sees it. Every tab and every reload of the rater shows the same."""

    comparison: Comparison
    rater: str
    left_name: Name
    shown_at: float  # for the first time

    @property
    def left(self) -> Answer:
        return self.comparison.answer(self.left_name)

    @property
    def right(self) -> Answer:
        return self.comparison.answer("b" if self.left_name == "a" else "a")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """A rater's vote on a comparison that was shown to them. Two are equal where all but `key` and `seconds` agree."""

    comparison: str  # its id
    rater: str
    key: str  # made by the client once per click; a repeated request has the same
    choice: Choice
    seconds: float | None = None  # taken, by the client's clock; None: from the first showing to the vote
    rating: int | None = None  # how much better: 1 (hardly) to 5 (far)
    reason: str | None = None
    edit_of: Literal["left", "right"] | None = None
    edit: str | None = None  # the answer on that side as it should have been
    flag: str | None = None  # why this comparison should train nothing

    def __post_init__(self):
        for name, value in (("comparison", self.comparison), ("rater", self.rater), ("key", self.key)):
            check_name(f"a vote's {name}", value)
        for name, value in (("reason", self.reason), ("edit", self.edit), ("flag", self.flag)):
            if value is not None:
                check_text(f"a vote's {name}", value)
        if self.choice not in CHOICES:
            raise VoteRefused(f"a vote is {self.choice!r}; it can be {', '.join(CHOICES)}")
        if self.seconds is not None and not (isinstance(self.seconds, (int, float)) and 0 <= self.seconds < math.inf):
            raise VoteRefused(f"a vote's seconds are {self.seconds!r}; give a number, 0 or more, or None")
        if self.rating is not None and not (_is_integer(self.rating) and self.rating in RATINGS):
            raise VoteRefused(f"a vote's rating is {self.rating!r}; give {RATINGS[0]} to {RATINGS[-1]}, or None")
        if self.edit_of not in (None, "left", "right") or (self.edit is None) != (self.edit_of is None):
            raise VoteRefused(
                f"a vote has edit_of {self.edit_of!r} and edit {self.edit!r}; give a side and its text, or neither"
            )

    @property
    def said(self) -> tuple[object, ...]:
        """What the vote says: equal for a vote that is sent again."""
        return (self.choice, self.rating, self.reason, self.edit_of, self.edit, self.flag)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What the store holds of a vote once it is asked to."""

    new: bool  # False: it was stored before, by this request or another one that said the same
    vote: Vote
    voted_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A stored vote with all that it is about."""

    showing: Showing
    vote: Vote
    voted_at: float
    seconds: float

    @property
    def judged(self) -> Judged:
        """The vote, said of the comparison's answers."""
        if self.vote.choice == "tie" or self.vote.choice == "both_bad":
            return self.vote.choice
        return self.name_on(self.vote.choice)

    def name_on(self, side: Literal["left", "right"]) -> Name:
        """Which answer was shown there."""
        return "a" if (side == "left") == (self.showing.left_name == "a") else "b"

    @property
    def comparison(self) -> Comparison:
        return self.showing.comparison


def check_prompt(prompt: Prompt) -> None:
    """VoteRefused for what is neither a text nor messages with a role and a content that are texts."""
    if isinstance(prompt, str):
        return check_text("a prompt", prompt)
    if not isinstance(prompt, list) or not prompt:
        raise VoteRefused(f"a prompt is {str(prompt)[:80]!r}; give a text, or a list of messages")
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise VoteRefused(f"a message of a prompt is {str(message)[:80]!r}; give {{role: user, content: text}}")
        check_text("a message's role", message["role"])
        check_text("a message's content", message["content"], empty=True)
    json_of("a prompt", prompt)


def turns(prompt: Prompt) -> Messages:
    """The prompt as messages: a text is what a user said."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def check_text(what: str, value: object, *, empty: bool = False) -> None:
    """VoteRefused for what is no text, or one that a database can't hold."""
    if not isinstance(value, str) or not (value or empty):
        raise VoteRefused(f"{what} is {value!r}; give a text")
    if "\0" in value:
        raise VoteRefused(f"{what} holds a NUL character; take it out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise VoteRefused(
            f"{what} holds half of a character ({value[error.start]!r}); write whole characters"
        ) from error


def check_name(what: str, value: str) -> None:
    """VoteRefused for what is no text, or one too long to be looked up by."""
    check_text(what, value)
    if len(value) > LONGEST_NAME:
        raise VoteRefused(f"{what} has {len(value)} characters; give at most {LONGEST_NAME}")


def json_of(what: str, value: object) -> str:
    """The value as JSON, the same text for equal values. VoteRefused where it is none."""
    if isinstance(value, Mapping):
        value = dict(cast(Mapping[str, Any], value))
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise VoteRefused(f"{what} can't be written as JSON ({error})") from error
    check_text(what, text)
    return text


def prompt_key(prompt: Prompt) -> str:
    """Equal for prompts of the same words: case and spacing don't count, and a text is one message of a user. 64 hex digits."""
    plain = [
        [turn["role"], " ".join(unicodedata.normalize("NFC", turn["content"]).casefold().split())]
        for turn in turns(prompt)
    ]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()


def is_held_out(key: str, share: float) -> bool:
    """Whether a prompt with this key is in the held-out share: by the key alone, whoever asks and whenever."""
    return int(key[:16], 16) < share * 2**64


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
