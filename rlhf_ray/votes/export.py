"""Votes as files of rows that TRL, and `data.preferences` of a recipe, read.

explicit             {"prompt": text, "chosen": text, "rejected": text}
implicit             {"chosen": prompt and answer, "rejected": prompt and answer}
explicit, messages   {"prompt": [messages], "chosen": [message], "rejected": [message]}
implicit, messages   {"chosen": [messages], "rejected": [messages]}
edits                {"prompt": text or [messages], "completion": text or [message]}: answers as raters rewrote them
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.runs.storage import write_atomically
from rlhf_ray.votes.reading import Pair
from rlhf_ray.votes.records import Judgement, Prompt, turns

Form = Literal["explicit", "implicit"]


def preference_rows(pairs: Sequence[Pair], form: Form = "explicit", *, messages: bool = False) -> list[dict[str, Any]]:
    """One row per pair. UserError for conversations where `messages` is off: only a chat template makes texts of them."""
    _check_texts([pair.comparison.prompt for pair in pairs], messages)
    return [
        _row(pair.comparison.prompt, {"chosen": pair.chosen.text, "rejected": pair.rejected.text}, form, messages)
        for pair in pairs
    ]


def edit_rows(judgements: Iterable[Judgement], *, messages: bool = False) -> list[dict[str, Any]]:
    """One row per answer that a rater rewrote. Raises as `preference_rows`."""
    edited = [(each.comparison.prompt, each.vote.edit) for each in judgements if each.vote.edit is not None]
    _check_texts([prompt for prompt, _ in edited], messages)
    return [_row(prompt, {"completion": edit}, "explicit", messages) for prompt, edit in edited]


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """JSON lines, whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise RunFailed(f"'{path}' can't be written ({error.strerror}); make room, or name another file") from error


def _row(prompt: Prompt, texts: dict[str, str], form: Form, messages: bool) -> dict[str, Any]:
    if messages:
        replies = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
        if form == "implicit":
            return {name: [*turns(prompt), *reply] for name, reply in replies.items()}
        return {"prompt": turns(prompt), **replies}
    assert isinstance(prompt, str), "checked before"
    return {name: prompt + text for name, text in texts.items()} if form == "implicit" else {"prompt": prompt, **texts}


def _check_texts(prompts: Sequence[Prompt], messages: bool) -> None:
    conversations = sum(not isinstance(prompt, str) for prompt in prompts)
    if conversations and not messages:
        raise UserError(
            f"{conversations} of {len(prompts)} rows have a conversation as their prompt, and only a chat template makes a text of "
            "that; write messages (--messages)"
        )
