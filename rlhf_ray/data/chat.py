"""Turns chat messages into text: with the tokenizer's chat template where it has one, else as "Role: text" lines."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

Messages = list[dict]

# ShareGPT's names for the same roles.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


def as_messages(value: list[dict]) -> Messages:
    """Messages with the keys role and content, content a string; empty keys (Parquet stores all keys) removed."""
    return [_message(item) for item in value]


def _message(item: dict) -> dict:
    role = item.get("role") or item.get("from") or "user"
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


def drop_oldest_turn(messages: Messages) -> Messages | None:
    """Without the oldest message (system messages stay) and the replies to it; None if there is only one turn."""
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"][1:]
    while turns and turns[0]["role"] != "user":
        turns = turns[1:]
    return system + turns if turns else None


class ChatFormat:
    """Renders messages for one tokenizer (None: the plain form)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self._tokenizer = tokenizer if tokenizer is not None and tokenizer.chat_template is not None else None

    def prompt(self, messages: Messages) -> str:
        """The text that a reply follows: it ends with the cue for the assistant."""
        if self._tokenizer is None:
            return _plain(messages) + "Assistant:"
        return _rendered(self._tokenizer, messages, cue=True)

    def reply(self, messages: Messages, reply: Messages) -> str:
        """The text of a reply to `messages` as it follows `prompt(messages)`, without EOS and the space around it."""
        if not reply:
            return ""
        if self._tokenizer is None:
            first, *others = reply
            return f" {first['content']}" + "".join(f"\n\n{_line(message)}" for message in others)
        prompt = self.prompt(messages)
        both = _rendered(self._tokenizer, messages + reply, cue=False)
        # A template may render earlier turns differently (drop reasoning, say): `both` then begins differently.
        text = both[len(prompt) :] if both.startswith(prompt) else "".join(message["content"] for message in reply)
        eos = self._tokenizer.eos_token
        return text.rstrip().removesuffix(eos).rstrip() if isinstance(eos, str) and eos in text else text.rstrip()


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, cue: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue)
    assert isinstance(text, str), "tokenize=False gives text"
    return text


def _plain(messages: Messages) -> str:
    return "".join(f"{_line(message)}\n\n" for message in messages)


def _line(message: dict) -> str:
    return f"{message['role'].capitalize()}: {message['content']}"
