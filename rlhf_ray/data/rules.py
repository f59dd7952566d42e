"""The rules that drop or cut rows. Every dropped or cut row is counted under its rule's name.

dropped   refused_by_template, empty_reply, empty_prompt, no_score, tie (both replies are the same, as they came or once they
          are cut), special_token (only where the recipe allows special tokens), duplicate, over_long, in_eval_prompts,
          in_held_out_votes (`data.votes` holds the prompt out), surplus_of_mix
cut       prompt (long prompt shortened), reply (long reply shortened), eos_text (an EOS written at a reply's end, which
          is added anyway), text (plain text that the trainer will cut at max_length)
plain     rows that name a control token in what people wrote: its name is encoded as plain text
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.base import LARGEST
from rlhf_ray.data.chat import ChatFormat, drop_oldest_turn
from rlhf_ray.data.formats import REPLIES, Role
from rlhf_ray.data.tokens import cut_text, encode_prompts, encode_texts
from rlhf_ray.models.control_tokens import BREAK, is_marked, marker_of


@dataclass(slots=True)
class Tally:
    """What became of the rows of one source."""

    read: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    cut: Counter = field(default_factory=Counter)
    plain: int = 0

    def as_dict(self) -> dict:
        counts = {"read": self.read, "kept": self.kept, "dropped": dict(self.dropped), "cut": dict(self.cut)}
        return counts | ({"plain": self.plain} if self.plain else {})

    def in_words(self) -> str:
        """'tie: 3, over_long: 4'."""
        return ", ".join(f"{rule}: {count}" for rule, count in self.dropped.most_common()) or "none dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """What fits, in tokens of the role's own tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat  # of the model that is tuned: a shortened conversation is rendered again
    max_prompt_tokens: int
    max_length: int  # prompt, reply and EOS together; not for prompts alone
    truncate_prompt: Literal["left", "right", "drop"]
    truncate_reply: Literal["left", "right", "drop"] = "drop"
    drop_duplicates: bool = True
    # What happens to an SFT text without a prompt that is longer than max_length: it is dropped like any row, left to
    # the trainer, which cuts it (counted here), or packed with others, without loss.
    plain_text: Literal["dropped", "trainer_cuts", "packed"] = "dropped"


def apply_rules(rows: list[dict], role: Role, limits: RowLimits, tally: Tally) -> list[dict]:
    """The rows that stay, shortened where the limits say so. Counts into `tally`."""
    tally.read += len(rows)
    replies = REPLIES[role]
    rows = drop(rows, tally, "refused_by_template", lambda row: "refused" in row)
    if role == "prompts":
        rows = drop(rows, tally, "empty_prompt", lambda row: not row["prompt"].strip())
    else:
        _strip_eos(rows, replies, limits.tokenizer, tally)
        rows = drop(rows, tally, "empty_reply", lambda row: any(not row[name].strip() for name in replies))
    if role == "scores":
        for row in rows:
            row["score"] = _number(row["score"])
        rows = drop(rows, tally, "no_score", lambda row: row["score"] is None)
    if role == "pairs":
        rows = drop(rows, tally, "tie", _is_tie)
    special = [str(token) for token in (limits.tokenizer.eos_token, limits.tokenizer.pad_token) if token]
    # Unmarked (the recipe allows special tokens) it would encode to the token itself and end the reply early.
    rows = drop(rows, tally, "special_token", lambda row: any(
        token in row[name].replace(BREAK + token, "") for name in replies for token in special
    ))  # fmt: skip
    if role == "prompts":
        rows = _fit_prompts(rows, limits, tally)
    elif role == "sft":
        texts = [row for row in rows if row["prompt"] == ""] if limits.plain_text != "dropped" else []
        if limits.plain_text == "trainer_cuts":
            _count_cut_texts(texts, limits, tally)
        whole = {id(row) for row in texts}
        fitting = {id(row) for row in _fit_rows([row for row in rows if id(row) not in whole], replies, limits, tally)}
        rows = [row for row in rows if id(row) in whole or id(row) in fitting]
    else:
        rows = _fit_rows(rows, replies, limits, tally)
    if role == "pairs":  # what told them apart may have been cut
        rows = drop(rows, tally, "tie", _is_tie)
    if limits.drop_duplicates:
        seen: set[tuple] = set()
        columns = ("prompt", *replies, *(("score",) if role == "scores" else ()))
        rows = drop(rows, tally, "duplicate", lambda row: _seen_before(tuple(row[name] for name in columns), seen))
    tally.kept += len(rows)
    tally.plain += sum(any(is_marked(row[name]) for name in ("prompt", *replies)) for row in rows)
    return rows


def drop(rows: list[dict], tally: Tally, rule: str, is_bad: Callable[[dict], bool]) -> list[dict]:
    kept = [row for row in rows if not is_bad(row)]
    if len(kept) < len(rows):
        tally.dropped[rule] += len(rows) - len(kept)
    return kept


def _is_tie(row: dict) -> bool:
    return row["chosen"].strip() == row["rejected"].strip()


def _seen_before(row: tuple, seen: set[tuple]) -> bool:
    if row in seen:
        return True
    seen.add(row)
    return False


def _number(value: object) -> float | None:
    """`value` as a float that is finite in 32 bits; None where it is not one (an empty cell, NaN, a word, 1e39)."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # NaN is not


def _strip_eos(rows: list[dict], replies: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, tally: Tally) -> None:
    eos = tokenizer.eos_token
    assert isinstance(eos, str), "load_tokenizer lets no tokenizer without EOS through"
    written = (eos, marker_of(frozenset([eos]))(eos))
    for row in rows:
        ended = [name for name in replies if row[name].rstrip().endswith(written)]
        for name in ended:
            text = row[name].rstrip()
            row[name] = text.removesuffix(next(form for form in written if text.endswith(form)))
        tally.cut["eos_text"] += bool(ended)
    tally.cut += Counter()  # drops a zero count


def _count_cut_texts(texts: list[dict], limits: RowLimits, tally: Tally) -> None:
    ids = encode_texts(limits.tokenizer, [row["response"] for row in texts])
    if long := sum(len(row) >= limits.max_length for row in ids):
        tally.cut["text"] += long


def _fit_prompts(rows: list[dict], limits: RowLimits, tally: Tally) -> list[dict]:
    lengths = _lengths(limits.tokenizer, rows)
    return [
        row for row, length in zip(rows, lengths, strict=True)
        if length <= limits.max_prompt_tokens or _shorten_prompt(row, limits.max_prompt_tokens, limits, tally)
    ]  # fmt: skip


def _fit_rows(rows: list[dict], replies: tuple[str, ...], limits: RowLimits, tally: Tally) -> list[dict]:
    """Rows of at most max_length tokens. The prompt is cut first, down to max_prompt_tokens; then the replies."""
    prompt_lengths = _lengths(limits.tokenizer, rows)
    encoded = {name: encode_texts(limits.tokenizer, [row[name] for row in rows]) for name in replies}
    kept = []
    for index, (row, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        longest = max(len(encoded[name][index]) for name in replies)
        room = limits.max_length - 1 - longest  # for the prompt, beside the reply and its EOS
        floor = min(prompt_length, limits.max_prompt_tokens)
        if prompt_length <= room or (room >= floor and _shorten_prompt(row, room, limits, tally)):
            kept.append(row)
        elif room >= floor:
            continue  # _shorten_prompt has counted it
        elif limits.truncate_reply == "drop":
            tally.dropped["over_long"] += 1
        elif prompt_length <= floor or _shorten_prompt(row, floor, limits, tally):
            left = limits.max_length - 1 - len(encode_prompts(limits.tokenizer, [row["prompt"]])[0])
            for name in replies:
                row[name] = cut_text(limits.tokenizer, row[name], left, limits.truncate_reply)
            if all(row[name].strip() for name in replies):
                tally.cut["reply"] += 1
                kept.append(row)
            else:
                tally.dropped["over_long"] += 1
    return kept


def _shorten_prompt(row: dict, limit: int, limits: RowLimits, tally: Tally) -> bool:
    """Cut the row's prompt to `limit` tokens; False (and counted) where the row must be dropped instead.

    A conversation loses its oldest turns, because a template that is cut in the middle is broken. A conversation whose
    last turn alone is too long is dropped.
    """
    tokenizer = limits.tokenizer
    if limits.truncate_prompt != "drop" and row["messages"]:
        chat, messages = limits.chat, drop_oldest_turn(row["messages"])
        while messages is not None and len(encode_prompts(tokenizer, [chat.prompt(messages)])[0]) > limit:
            messages = drop_oldest_turn(messages)
        if messages is not None:
            row["prompt"], row["messages"] = chat.prompt(messages), messages
            tally.cut["prompt"] += 1
            return True
    elif limits.truncate_prompt != "drop":
        opening = len(encode_prompts(tokenizer, [""])[0])
        row["prompt"] = cut_text(tokenizer, row["prompt"], limit - opening, limits.truncate_prompt)
        if row["prompt"].strip():
            tally.cut["prompt"] += 1
            return True
    tally.dropped["over_long"] += 1
    return False


def _lengths(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[int]:
    return [len(ids) for ids in encode_prompts(tokenizer, [row["prompt"] for row in rows])]
