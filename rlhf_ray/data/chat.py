"""Turns chat messages into text: with the tokenizer's chat template where it has one, else as "Role: text" lines."""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ray.models.chat_shape import ChatShape, chat_shape
from rlhf_ray.models.control_tokens import control_names, mark_all, marker_of, names_in

Messages = list[dict]

# ShareGPT's names for the same roles.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
KNOWN_ROLES = {"system", "user", "assistant", *ROLES}  # in any case; others are the template's own


def as_messages(value: list[dict]) -> Messages:
    """Messages with the keys role and content, content a string; empty keys (Parquet stores all keys) removed."""
    return [_message(item) for item in value]


def _message(item: dict) -> dict:
    role = item.get("role") or item["from"]
    role = role.lower() if role.lower() in KNOWN_ROLES else role
    content = item["content"] if item.get("content") is not None else item.get("value") or ""
    if isinstance(content, list):  # parts: text and, elsewhere, images
        content = "".join(part.get("text") or "" for part in content)
    rest = {
        key: value
        for key, value in item.items()
        if value is not None and key not in ("role", "from", "content", "value")
    }
    return {"role": ROLES.get(role, role), "content": content, **rest}


def split_reply(messages: Messages) -> tuple[Messages, Messages]:
    """(what the last reply answers, the reply); no reply: an empty list. What follows the last reply is left out."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant":
            return messages[:index], messages[index : index + 1]
    return messages, []


def shared_prompt(chosen: Messages, rejected: Messages) -> Messages:
    """The first messages that two conversations have in common."""
    shared = []
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared.append(one)
    return shared


def last_question(messages: Messages) -> str:
    """What the user said last; "" where the user said nothing."""
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def drop_oldest_turn(messages: Messages) -> Messages | None:
    """Without the oldest message (system messages stay) and the replies to it; None if there is only one turn."""
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"][1:]
    while turns and turns[0]["role"] != "user":
        turns = turns[1:]
    return system + turns if turns else None


class ChatFormat:
    """Renders messages for one tokenizer (None: the plain form), and marks what they and other texts hold.

    The names of control tokens in contents are marked, so that they are encoded as plain text; the template's own are
    tokens. allow_special_tokens: nothing is marked. readers: further tokenizers that will encode the texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        allow_special_tokens: bool = False,
        readers: Sequence[PreTrainedTokenizerBase] = (),
    ):
        self._tokenizer = tokenizer if tokenizer is not None and tokenizer.chat_template is not None else None
        shape = ChatShape() if self._tokenizer is None else chat_shape(self._tokenizer)
        all_readers = [] if allow_special_tokens else [each for each in (tokenizer, *readers) if each is not None]
        self._mark, self._mark_reply = (
            marker_of(frozenset().union(*(control_names(each, of_replies=of_replies) for each in all_readers)))
            for of_replies in (False, True)
        )
        self._end, self._edges = shape.end, shape.may_join(self._mark.names)

    def plain(self, text: str, *, reply: bool = False) -> str:
        """A text of a data row or a request, with the names of control tokens marked."""
        return (self._mark_reply if reply else self._mark)(text)

    def prompt(self, messages: Messages) -> str:
        """The text that a reply follows: it ends with the cue for the assistant."""
        marked = self._marked(messages)
        if self._tokenizer is None:
            return _plain(marked) + "Assistant:"
        return self._render(marked, cue=True)

    def reply(self, messages: Messages, reply: Messages) -> str:
        """The text of a reply to `messages` as it follows `prompt(messages)`, without the token that ends it (EOS, the end
        of a turn) and the space around that."""
        if not reply:
            return ""
        reply = self._marked(reply)
        if self._tokenizer is None:
            first, *others = reply
            return f" {first['content']}" + "".join(f"\n\n{_line(message)}" for message in others)
        prompt = self.prompt(messages)
        both = self._render(self._marked(messages) + reply, cue=False)
        text = both[len(prompt) :] if both.startswith(prompt) else _content(prompt, both, reply)
        text = text.rstrip()
        for end in dict.fromkeys((self._tokenizer.eos_token, self._end)):
            if isinstance(end, str) and text.endswith(end):
                return text.removesuffix(end).rstrip()
        return text

    def _marked(self, messages: Messages) -> Messages:
        return [
            {key: self._map_texts(value, self._mark_reply if message["role"] == "assistant" else self._mark)
             for key, value in message.items()}
            for message in messages
        ]  # fmt: skip

    def _render(self, marked: Messages, *, cue: bool) -> str:
        """The template's text for marked messages.

        A template may delete or replace characters of a content, and so make a control token's name of one that held none. Then it
        gets these contents with every character marked.
        """
        assert self._tokenizer is not None
        text = _rendered(self._tokenizer, marked, cue=cue)
        changed = _changed(text, marked) if self._mark.names else []
        if not changed:
            return text
        broken = [
            {key: value if key == "role" else self._map_texts(value, mark_all) for key, value in message.items()}
            if place in changed else message
            for place, message in enumerate(marked)
        ]  # fmt: skip
        guarded = _rendered(self._tokenizer, broken, cue=cue)
        own = Counter(names_in(guarded, self._mark.names))
        own.update(name for place in changed for part in _texts(marked[place]) for name in names_in(part, self._mark.names))
        return guarded if Counter(names_in(text, self._mark.names)) - own else text

    def _map_texts(self, value: Any, mark: Callable[..., str]) -> Any:
        """The value with every text in it marked."""
        if isinstance(value, str):
            return mark(value, edges=self._edges)
        if isinstance(value, Mapping):
            return {key: self._map_texts(part, mark) for key, part in value.items()}
        return [self._map_texts(part, mark) for part in value] if isinstance(value, list) else value


def _changed(text: str, messages: Messages) -> list[int]:
    """The messages that do not stand in the rendered text as they are, in order, except for the space around them. One with further
    texts than its content counts as changed."""
    changed, at = [], 0
    for place, message in enumerate(messages):
        content = (message.get("content") or "").strip()
        found = text.find(content, at)
        if found < 0 or len(_texts(message)) > 1:
            changed.append(place)
        at = at if found < 0 else found + len(content)
    return changed


def _texts(value: Any) -> list[str]:
    """All texts of a message but its role."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, part in value.items() if key != "role" for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []


def _content(prompt: str, both: str, reply: Messages) -> str:
    """The reply's own text, where a template renders the turns otherwise once there is a reply (it drops reasoning, say).

    A prompt may then end with the beginning of the reply (a "<think>" that the model is spared to write): that part goes.
    """
    text = "".join(message["content"] for message in reply)
    begun = prompt[len(os.path.commonprefix([prompt, both])) :]
    for start in (begun, begun.rstrip()):
        if start.strip() and text.startswith(start):
            return text.removeprefix(start)
    return text


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, cue: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue)
    assert isinstance(text, str), "tokenize=False gives text"
    return text


def _plain(messages: Messages) -> str:
    return "".join(f"{_line(message)}\n\n" for message in messages)


def _line(message: dict) -> str:
    return f"{message['role'].capitalize()}: {message['content']}"
