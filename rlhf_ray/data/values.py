"""Whether the columns of a role hold what the role needs: text, chat messages, numbers.   The first that does not is one sentence.

What is missing (null, an empty cell, NaN as a score) is no mistake: `rules` drops and counts it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from rlhf_ray.errors import UserError

TEXT_OR_MESSAGES = ("prompt", "response", "completion", "chosen", "rejected")
MESSAGES = ("messages", "conversations")
TEXT_PARTS = (None, "text", "input_text", "output_text")
#: columns of CSV and TSV that hold numbers, whatever they are for, where each of their cells is one
NUMBERS = ("score", "label", "weight")
WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?|[+-]?\.\d+([eE][+-]?\d+)?", re.ASCII)


def check_values(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], place: Callable[[int], str]) -> None:
    """UserError for the first value of a role's columns (our name -> the data set's) that is of another kind.

    place: of the row with this number, for the message
    """
    for index, row in enumerate(rows):
        for ours, theirs in columns.items():
            problem = _problem(ours, row[theirs])
            if problem is not None:
                raise UserError(f"{place(index)}: '{theirs}' {problem}")
        chosen, rejected = (row[columns[name]] if name in columns else None for name in ("chosen", "rejected"))
        if {str, list} == {type(chosen), type(rejected)}:
            raise UserError(
                f"{place(index)}: '{columns['chosen']}' is {kind_of(chosen)} and '{columns['rejected']}' is {kind_of(rejected)}; "
                "write both as text, or both as chat messages"
            )


def check_not_written_out(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], place: Callable[[int], str]
) -> None:
    """UserError for a column of text or messages whose every text is a list of messages in JSON, or as Python prints one."""
    first = {theirs: -1 for ours, theirs in columns.items() if ours in TEXT_OR_MESSAGES}
    for index, row in enumerate(rows):
        for name in [name for name in first if row[name]]:
            if not isinstance(row[name], str) or not WRITTEN_OUT.match(row[name]):
                del first[name]
            elif first[name] < 0:
                first[name] = index
        if not first:
            return
    for name, index in first.items():
        if index >= 0:
            raise UserError(
                f"{place(index)}: '{name}' holds chat messages that are written out as text; write them as lists of "
                "{role, content} (in pandas: rows[column].map(json.loads), or ast.literal_eval for Python's own form)"
            )


def check_one_type(rows: Sequence[Mapping[str, Any]], names: Iterable[str], place: Callable[[int], str]) -> None:
    """UserError for a column, of those that stay with the prompts, whose values are of several types."""
    for name in names:
        first: tuple[int, str] | None = None
        for index, row in enumerate(rows):
            value = row[name]
            if value is None:
                continue
            kind = "a number beyond 64 bits" if _is_long(value) else kind_of(value).partition(" (")[0]
            first = first or (index, kind)
            if kind != first[1] or _is_long(value):
                raise UserError(
                    f"{place(index)}: the column '{name}' holds {kind} here, and {first[1]} in the row before ({place(first[0])}); "
                    "give its values one type, or leave the column out"
                    if kind != first[1]
                    else f"{place(index)}: the column '{name}' holds {kind}; write it as text, or leave the column out"
                )


def as_numbers(rows: Sequence[dict[str, Any]], names: Iterable[str]) -> None:
    """Turn these columns' cells into numbers, in place, where all of a column's filled cells are numbers."""
    for name in names:
        cells = [row[name] for row in rows]
        if all(isinstance(cell, str) and (not cell.strip() or NUMBER.fullmatch(cell.strip())) for cell in cells):
            for row, cell in zip(rows, cells, strict=True):
                row[name] = None if not cell.strip() else int(cell) if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", cell) else float(cell)


def _problem(ours: str, value: object) -> str | None:
    if value is None:
        return None
    if ours == "score":
        return _no_number(value)
    if ours in MESSAGES:
        return _no_messages(value)
    if isinstance(value, str):
        return None
    if ours in TEXT_OR_MESSAGES and isinstance(value, list):
        return _no_messages(value)
    words = "text, or chat messages (a list of {role, content})" if ours in TEXT_OR_MESSAGES else "text"
    quote = "; write it in quotes" if isinstance(value, (int, float)) else ""
    return f"is {kind_of(value)}, and should be {words}{quote}"


def _no_number(value: object) -> str | None:
    remedy = "; correct it, or leave it empty, and the row is dropped"
    if isinstance(value, str):
        if not value.strip():
            return None
        if "_" in value or not _reads_as_number(value):
            return f"is {kind_of(value)}, and should be a number{remedy}"
    elif isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return f"is {kind_of(value)}, and should be a number{remedy}"
    try:
        infinite = math.isinf(float(value))
    except OverflowError:
        infinite = True
    return f"is {kind_of(value)}, which is not a finite number{remedy}" if infinite else None


def _reads_as_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def _no_messages(value: object) -> str | None:
    """What is wrong with chat messages."""
    form = "a message is {role: user, content: text}"
    if not isinstance(value, list):
        return f"is {kind_of(value)}, and should be chat messages: a list, where {form}"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return f"has {kind_of(message)} as item {number}, and should be chat messages or text; {form}"
        for key in ("role", "from"):
            if not isinstance(message.get(key), (str, type(None))):
                return f"has {kind_of(message[key])} as the {key} of message {number}, and should have text; {form}"
        for key, names in (("content", {"content", "value", "tool_calls"}), ("role", {"role", "from"})):
            if not message.keys() & names or (key == "role" and not any(message.get(name) for name in names)):
                return (
                    f"has no {key} in message {number} (its keys are {', '.join(map(str, message)) or 'none'}); {form}"
                )
        for key in ("content", "value"):
            content = message.get(key)
            parts = content if isinstance(content, list) else [{"text": content}]
            for part in parts:
                text = part.get("text") if isinstance(part, dict) else part
                if not isinstance(part, dict) or not isinstance(text, (str, type(None))):
                    return f"has {kind_of(text)} as the {key} of message {number}, and should have text; {form}"
                if part.get("type") not in TEXT_PARTS:
                    return f"has a part of type {part['type']!r} in message {number}, and only text is read; take such rows out"
    return None


def kind_of(value: object) -> str:
    """What a value is, in words: 'a number (2)'."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        return f"text ({value[:40]!r})"
    if isinstance(value, bool):
        return f"true or false ({str(value).lower()})"
    if isinstance(value, int) and value.bit_length() > 1000:  # Python does not write very long ones
        return f"a number (of {int(value.bit_length() * math.log10(2)) + 1} digits)"
    if isinstance(value, (int, float)):
        return f"a number ({value})"
    return f"a {type(value).__name__} ({str(value)[:40]})"


def _is_long(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() > 63
