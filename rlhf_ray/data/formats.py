"""Turns raw columns into the columns of a role.   Rows come out as dicts of text:

    sft       prompt, response              pairs     prompt, chosen, rejected
    prompts   prompt                        scores    prompt, response, score

and, beside these, `key` (the uncut prompt, or the text where there is none; it decides what is held out),
`messages` (the prompt's messages where there were any, else None) and `columns` (the other columns that stay, by name).
Texts are marked where they name control tokens (`models.control_tokens`), unless the recipe allows special tokens.
"""

from __future__ import annotations

import difflib
import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from jinja2 import TemplateError

from rlhf_ray.data.chat import ChatFormat, as_messages, shared_prompt, split_reply
from rlhf_ray.errors import UserError

Role = Literal["sft", "pairs", "scores", "prompts"]
HH_CUE = "\n\nAssistant:"  # Anthropic's dialogues are one text; a reply follows this


@dataclass(frozen=True, slots=True)
class Form:
    """Columns that make a row of a role."""

    needs: tuple[str, ...]
    may: tuple[str, ...] = ()


FORMS: dict[str, tuple[Form, ...]] = {  # the first whose columns all exist is taken
    "sft": (
        Form(("messages",)), Form(("conversations",)), Form(("prompt", "response")), Form(("prompt", "completion")),
        Form(("chosen", "rejected"), ("prompt",)), Form(("prompt", "chosen")), Form(("text",)),
    ),
    "pairs": (Form(("chosen", "rejected"), ("prompt",)),),
    "scores": (
        Form(("response", "score"), ("prompt",)), Form(("completion", "score"), ("prompt",)),
        Form(("messages", "score")), Form(("text", "score")),
    ),
    "prompts": (
        Form(("chosen", "rejected"), ("prompt",)), Form(("messages",)), Form(("conversations",)), Form(("prompt",)),
        Form(("text",)),
    ),
}  # fmt: skip
#: the form that is named where a data set has no column of any
USUAL = {
    "sft": FORMS["sft"][2], "pairs": FORMS["pairs"][0], "scores": FORMS["scores"][0], "prompts": FORMS["prompts"][3],
}  # fmt: skip
REPLIES = {"sft": ("response",), "pairs": ("chosen", "rejected"), "scores": ("response",), "prompts": ()}
NAMES = tuple(sorted({name for forms in FORMS.values() for form in forms for name in (*form.needs, *form.may)}))


def detect(columns: Iterable[str], renamed: Mapping[str, str], role: Role, where: str) -> dict[str, str]:
    """Which column holds what: our name -> the data set's column. Raises UserError if no form of the role fits."""
    columns = list(columns)
    if problems := _misnamed(columns, renamed):
        usual = [name for name in USUAL[role].needs if name not in (*columns, *renamed)]
        problems += [f"no column '{name}'" for name in usual if role == "pairs"]  # which has one form only
        raise UserError(f"{where}.columns: {'; '.join(problems)}; there are {', '.join(columns)}")
    taken = set(renamed.values()) - set(renamed)
    names = {name: name for name in columns if name not in taken} | dict(renamed)
    for form in FORMS[role]:
        used = (*form.needs, *form.may)
        if all(name in names for name in form.needs) and set(renamed) <= set(used):
            return {name: names[name] for name in used if name in names}
    raise UserError(f"{where}: {_no_form(columns, names, renamed, role)}")


def _misnamed(columns: list[str], renamed: Mapping[str, str]) -> list[str]:
    problems = [
        f"'{ours}' is not a known name{_nearest(ours, NAMES)}; known are {', '.join(NAMES)}"
        for ours in renamed if ours not in NAMES
    ]  # fmt: skip
    # No nearest column here: 'worse' is the nearest to 'chosen', and would train the reward model backwards.
    problems += [f"no column '{theirs}' for {ours}" for ours, theirs in renamed.items() if theirs not in columns]
    sources = list(renamed.values())
    problems += [f"'{theirs}' stands for two names" for theirs in dict.fromkeys(sources) if sources.count(theirs) > 1]
    return problems


def _no_form(columns: list[str], names: Mapping[str, str], renamed: Mapping[str, str], role: Role) -> str:
    """All that is missing, and all that is there. Which column is which is the user's to say: nothing is guessed."""
    forms = ", or ".join(" and ".join(form.needs) for form in FORMS[role])
    nearly = max(FORMS[role], key=lambda form: (sum(name in names for name in form.needs), form == USUAL[role]))
    missing = [name for name in nearly.needs if name not in names]
    if not missing:
        return f"columns {', '.join(renamed)} do not go together; {role} rows are {forms}"
    other = {"pairs": "scores", "scores": "pairs"}.get(role)
    if other is not None and any(all(name in names for name in form.needs) for form in FORMS[other]):
        return (
            f"these are rows for the objective '{other}' (columns {', '.join(columns)}), but the recipe says '{role}'; "
            f"set objective: {other}" + (", or give pairs, which DPO needs" if role == "pairs" else "")
        )
    unnamed = [name for name in nearly.may if name not in names]
    said = [f"{name}: COLUMN" for name in (*unnamed, *missing)]
    return (
        f"no column {', '.join(map(repr, missing))}; there are {', '.join(columns)}; {role} rows need {forms}; say which column is "
        f"which with columns: {{{', '.join(said)}}}" + (f" ({', '.join(unnamed)} may be left out)" if unnamed else "")
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1, cutoff=0.5)
    return f" (nearest: '{near[0]}')" if near else ""


def normalise(
    rows: Iterable[Mapping], columns: Mapping[str, str], role: Role, chat: ChatFormat, keep: Sequence[str] = ()
) -> list[dict]:
    """All rows of the role (see top); `rules` drops the bad ones.

    keep: the other columns that stay with the row, by the data set's own names
    """
    make = {"sft": _sft, "pairs": _pair, "scores": _scored, "prompts": _prompt}[role]
    normalised = []
    for row in rows:
        try:
            out = make({ours: row[theirs] for ours, theirs in columns.items()}, chat)
        except TemplateError as error:  # templates refuse orders of roles that their model does not know
            out = {"prompt": "", "messages": None, "refused": str(error)} | dict.fromkeys(REPLIES[role], "")
        reply = out.get("response", out.get("chosen", ""))
        out["key"] = out["prompt"] or reply
        out["columns"] = {name: row[name] for name in keep}
        normalised.append(out)
    return normalised


def _sft(row: dict, chat: ChatFormat) -> dict:
    if "chosen" in row:
        if "rejected" in row:
            pair = _pair(row, chat)
            return {"prompt": pair["prompt"], "response": pair["chosen"], "messages": pair["messages"]}
        row = {"prompt": row["prompt"], "response": row["chosen"]}
    if "text" in row:
        return {"prompt": "", "response": chat.plain(row["text"] or "", reply=True), "messages": None}
    return _answered(row, chat)


def _scored(row: dict, chat: ChatFormat) -> dict:
    score = row.pop("score")
    if "text" in row:
        row = {"response": row["text"]}
    return _answered(row, chat) | {"score": score}


def _prompt(row: dict, chat: ChatFormat) -> dict:
    if "chosen" in row:
        pair = _pair(row, chat)
        return {"prompt": pair["prompt"], "messages": pair["messages"]}
    value = next(row[name] for name in ("messages", "conversations", "prompt", "text") if name in row)
    if isinstance(value, list):
        messages = as_messages(value)
        if messages and messages[-1]["role"] == "assistant":
            messages = split_reply(messages)[0]
        return {"prompt": chat.prompt(messages) if messages else "", "messages": messages}
    return {"prompt": chat.plain(value or ""), "messages": None}


def _answered(row: dict, chat: ChatFormat) -> dict:
    """prompt and response from whole messages, a prompt with its reply (text or messages), or a reply alone."""
    for name in ("messages", "conversations"):
        if name in row:
            messages, reply = split_reply(as_messages(row[name] or []))
            return {
                "prompt": chat.prompt(messages) if messages else "",
                "response": chat.reply(messages, reply),
                "messages": messages,
            }
    prompt, response = row.get("prompt"), row.get("response", row.get("completion"))
    if isinstance(prompt, list) or isinstance(response, list):
        messages, reply = _joined(prompt, response)
        return {"prompt": chat.prompt(messages), "response": chat.reply(messages, reply), "messages": messages}
    return {"prompt": chat.plain(prompt or ""), "response": chat.plain(response or "", reply=True), "messages": None}


def _pair(row: dict, chat: ChatFormat) -> dict:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) or isinstance(rejected, list):
        chosen, rejected = as_messages(chosen or []), as_messages(rejected or [])
        messages = as_messages(prompt) if isinstance(prompt, list) else shared_prompt(chosen, rejected)
        if not isinstance(prompt, list):
            # A reply that both share word for word is no prompt: the pair is a tie, which `rules` drops.
            while messages and messages[-1]["role"] == "assistant" and len(messages) in (len(chosen), len(rejected)):
                messages = messages[:-1]
            chosen, rejected = chosen[len(messages) :], rejected[len(messages) :]
            if prompt and not messages:  # replies alone, beside a prompt that is text
                messages = [{"role": "user", "content": prompt}]
        text = chat.prompt(messages) if messages else ""
        return {
            "prompt": text,
            "chosen": chat.reply(messages, chosen),
            "rejected": chat.reply(messages, rejected),
            "messages": messages,
        }
    if isinstance(prompt, list):
        messages = as_messages(prompt)
        replies = [[{"role": "assistant", "content": reply or ""}] for reply in (chosen, rejected)]
        return {"prompt": chat.prompt(messages), "chosen": chat.reply(messages, replies[0]),
                "rejected": chat.reply(messages, replies[1]), "messages": messages}  # fmt: skip
    chosen, rejected = cast(str, chosen or ""), cast(str, rejected or "")  # a pair is of one kind
    if prompt is None and "prompt" not in row:
        prompt, chosen, rejected = implicit_prompt(chosen, rejected)
    return {
        "prompt": chat.plain(prompt or ""),
        "chosen": chat.plain(chosen, reply=True),
        "rejected": chat.plain(rejected, reply=True),
        "messages": None,
    }


def _joined(prompt, response) -> tuple[list[dict], list[dict]]:
    messages = as_messages(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt or ""}]
    reply = as_messages(response) if isinstance(response, list) else [{"role": "assistant", "content": response or ""}]
    return messages, reply


def implicit_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts that begin alike.

    In Anthropic's dialogues the prompt ends with the last "Assistant:" that both share; elsewhere with the last whole
    word that both share (the replies then begin with the space, as a byte-level tokenizer expects).
    """
    shared = os.path.commonprefix([chosen, rejected])
    cue = shared.rfind(HH_CUE)
    if cue >= 0:
        end = cue + len(HH_CUE)
    else:
        spaces = [match.start() for match in re.finditer(r"\s+", shared)]
        end = max((at for at in spaces if chosen[at:].strip() and rejected[at:].strip()), default=0)
    return shared[:end], chosen[end:], rejected[end:]
