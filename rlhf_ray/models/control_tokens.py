"""Text that names control tokens without meaning them: a user types "<|im_end|>", and it is no end of a turn.

Control tokens are the special tokens of a tokenizer, the tokens that end a response, and the added tokens that its chat
template writes. A name of one in a text that people or models wrote is *marked*: a BREAK stands inside it. `encode_marked`
encodes a marked name as plain text and an unmarked one as the token; `shown` is the text without marks. Most texts name
no control token: they are stored and encoded as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BREAK = "\ufdd0"  # one of Unicode's noncharacters, which programs may use inside
ENDS_KEY = "response_end_ids"  # in tokenizer_config.json: the tokens that end a response, where EOS is not the only one


def shown(text: str) -> str:
    """A marked text as people, functions and other programs read it."""
    return text.replace(BREAK, "") if BREAK in text else text


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of the chat template, of all of them where there are several; "": there is none."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def control_names(tokenizer: PreTrainedTokenizerBase, *, of_replies: bool = False) -> frozenset[str]:
    """What the tokenizer's control tokens are called.

    of_replies: without tags in pairs that are not special (<think>, </think>), which belong to a reply's text: models
    write them, and so do the replies that they learn from.
    """
    source, added = template_text(tokenizer), tokenizer.added_tokens_decoder
    ends = set(tokenizer.init_kwargs.get(ENDS_KEY, ()))
    plain = {str(token) for token in added.values() if not token.special}
    tags = {name for name in plain if _is_tag(name, plain)} if of_replies else set()
    names = {str(token) for number, token in added.items()
             if token.special or number in ends or (str(token) in source and str(token) not in tags)}  # fmt: skip
    return frozenset(name for name in {*names, *tokenizer.all_special_tokens} if name.strip())


def _is_tag(name: str, names: set[str]) -> bool:
    body = name.removeprefix("<").removeprefix("/")
    return name.startswith("<") and {f"<{body}", f"</{body}"} <= names


class Marker:
    """Marks the names of control tokens in a text.

    Upper and lower case count the same, because a template may change one into the other. Ends of a text that another
    text could make a whole name of are marked with `edges`.
    """

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)
        whole = sorted((name for name in self.names if len(name) > 1), key=len, reverse=True)
        letters = sorted(name for name in self.names if len(name) == 1)
        self._whole = re.compile(f"(?={'|'.join(map(re.escape, whole))})", re.IGNORECASE) if whole else None
        self._letters = re.compile(f"(?=[{re.escape(''.join(letters))}])") if letters else None
        self._firsts = {case for name in self.names for case in (name[0], name[0].lower(), name[0].upper())}
        self._heads = {name[:size].lower() for name in whole for size in range(1, len(name))}
        self._tails = {name[size:].lower() for name in whole for size in range(1, len(name))}
        self._longest = max(map(len, whole), default=1) - 1

    def __call__(self, text: str, *, edges: bool = False) -> str:
        text = text.replace(BREAK, "\N{REPLACEMENT CHARACTER}") if BREAK in text else text
        places: set[int] = set()
        if not self._firsts.isdisjoint(text):
            places |= {found.start() + 1 for found in self._whole.finditer(text)} if self._whole else set()
            places |= {found.start() for found in self._letters.finditer(text)} if self._letters else set()
        if edges:
            places |= self._edges(text)
        if not places:
            return text
        cuts = [0, *sorted(places), len(text)]
        return BREAK.join(text[start:end] for start, end in zip(cuts, cuts[1:], strict=False))

    def _edges(self, text: str) -> set[int]:
        """Templates strip space, so the ends that count are those without it."""
        stripped = text.strip()
        sizes = range(1, min(self._longest, len(stripped)) + 1)
        start = len(text) - len(text.lstrip())
        places = {start} if any(stripped[:size].lower() in self._tails for size in sizes) else set()
        if any(stripped[-size:].lower() in self._heads for size in sizes):
            places.add(start + len(stripped))
        return places


@cache
def marker_of(names: frozenset[str]) -> Marker:
    return Marker(names)


def marker(tokenizer: PreTrainedTokenizerBase, *, of_replies: bool = False) -> Marker:
    """The marker of a tokenizer's own control tokens."""
    return marker_of(control_names(tokenizer, of_replies=of_replies))


def mark_all(text: str, **_: object) -> str:
    """With every character marked but space: no part of it spells a name, whatever is deleted from it or replaced."""
    return re.sub(r"(?=\S)", BREAK, shown(text))


def names_in(text: str, names: frozenset[str]) -> list[str]:
    """The control tokens that a marked text is encoded with."""
    spelled = _spelled(names)
    return spelled.findall(text) if spelled is not None else []


@cache
def _spelled(names: frozenset[str]) -> re.Pattern[str] | None:
    ordered = sorted(names, key=len, reverse=True)  # the longest name that begins at a place is the token
    alternatives = [re.escape(name) if len(name) > 1 else f"(?<!{BREAK}){re.escape(name)}" for name in ordered]
    return re.compile(f"({'|'.join(alternatives)})") if alternatives else None


def is_marked(text: str) -> bool:
    return BREAK in text


# -- encoding ---------------------------------------------------------------------------------------------------------


def encode_marked(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of marked texts, without special tokens around them."""
    twin = _TWINS.get(tokenizer)
    names = control_names(tokenizer)
    if twin is None or twin.names != names or twin.size != len(tokenizer):
        twin = _TWINS[tokenizer] = _Twin(tokenizer, names)
    return [twin.encode(text) for text in texts]


class _Twin:
    """A tokenizer whose control tokens have names that no text holds: all else in a text is plain to it.

    It is the same tokenizer otherwise, so the ids of what stands between control tokens are those that the tokenizer gives.
    Without a backend of the library `tokenizers`, texts are encoded piece by piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: frozenset[str]):
        self.names, self.size = names, len(tokenizer)
        self._names = _spelled(names)
        self._ids = {name: _id_of(tokenizer, name) for name in names}
        self._secret = {name: f"{BREAK}{number}{BREAK}" for number, name in enumerate(sorted(names))}
        self._backend, self._back, self._tokenizer = None, {}, tokenizer.__call__
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            source = tokenizer.backend_tokenizer
            self._backend = Tokenizer.from_str(_renamed(source.to_str(), self._secret))
            added = {token.content: number for number, token in source.get_added_tokens_decoder().items()}
            here = {name: self._backend.token_to_id(self._secret.get(name, name)) for name in added}
            self._back = {here[name]: number for name, number in added.items() if here[name] != number}

    def encode(self, text: str) -> list[int]:
        parts = self._names.split(text) if self._names is not None else [text]
        parts = [part if place % 2 else shown(part) for place, part in enumerate(parts)]
        if self._backend is None:
            return [token for place, part in enumerate(parts) for token in self._piece(part, control=bool(place % 2))]
        whole = "".join(self._secret[part] if place % 2 else part for place, part in enumerate(parts))
        return [self._back.get(token, token) for token in self._backend.encode(whole, add_special_tokens=False).ids]

    def _piece(self, part: str, *, control: bool) -> list[int]:
        if control:
            return [self._ids[part]]
        return self._tokenizer(part, add_special_tokens=False, split_special_tokens=True).input_ids if part else []


_TWINS: WeakKeyDictionary[PreTrainedTokenizerBase, _Twin] = WeakKeyDictionary()


def _id_of(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    found = tokenizer.convert_tokens_to_ids(name)
    assert isinstance(found, int), name
    return found


def _renamed(source: str, names: dict[str, str]) -> str:
    """The backend's JSON with other names for these tokens, in the vocabulary too: a piece that spells a name is none."""
    spec: dict[str, Any] = json.loads(source)
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = spec["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:  # Unigram: [piece, score], by place
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        # What would be made of such a piece can't come about either.
        model["merges"] = [merge for merge in model["merges"] if not names.keys() & _pieces(merge)]
    return json.dumps(spec)


def _pieces(merge: str | Sequence[str]) -> set[str]:
    """Both parts of a merge, and what they make."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return {*parts, "".join(parts)}
