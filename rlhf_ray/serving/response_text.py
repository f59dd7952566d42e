"""Token ids of one response in, text that is safe to send out: whole characters, nothing of a stop string."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_ray.config.sampling_params import TokenLogprobs
from rlhf_ray.models.tokenizer import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompt tokens decoded in front of the response: some tokenizers drop the space of a text's first word.
_CONTEXT_TOKENS = 5
_WINDOW_TOKENS = 16  # decoded anew with each token, at most: so often is a new window begun, which costs a decoding of its own


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token as the API shows it."""

    token: str
    logprob: float | None
    """None: the first of a prompt, which follows nothing."""
    offset: int
    """Where its text starts, in characters: in the response, or in the prompt for a token of the prompt."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens in its place, in order."""


class ResponseText:
    """Incremental decoding. After a stop string is complete, `stopped` is True and `text` ends before it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: list[int],
        stop: tuple[str, ...],
        *,
        min_tokens: int = 0,
        drop_first_space: bool = False,
        tells_tokens: bool = True,
        in_pieces: bool = True,
    ):
        """min_tokens: the text of fewer tokens holds no stop string. tells_tokens: whether `take` gives any.

        in_pieces: `take` is called before the end.
        """
        self._tokenizer = tokenizer
        self._stop = stop
        self._drop_first_space = drop_first_space
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._window = 0  # decoding starts here: earlier tokens no longer change the text of later ones
        self._read = len(self._ids)  # tokens whose text is in self.text
        self._known: str | None = None  # text of the window's tokens that are read; None: not decoded yet
        self._pushed, self._tells_tokens = 0, tells_tokens
        self._decodes_each = in_pieces or tells_tokens or bool(stop)
        self._tokens: list[TokenText] = []
        self._sent_tokens = 0
        self._sent = 0
        self._min_tokens, self._stops_from = min_tokens, 0
        self.text = ""
        self.stopped = False

    def push(
        self,
        token_id: int,
        logprob: float | None,
        top: tuple[tuple[int, float], ...] = (),
        *,
        silent: bool = False,
    ) -> None:
        """silent: the token is reported and has no text (a stop token)."""
        if self.stopped:
            return
        self._pushed += 1
        if self._tells_tokens:
            alternatives = tuple((self._token(each), one) for each, one in top)
            self._tokens.append(TokenText(self._token(token_id), logprob, len(self.text), alternatives))
        if not silent:
            self._ids.append(token_id)
            if self._decodes_each:
                self._decode(final=False)
        if self._pushed <= self._min_tokens:
            self._stops_from = len(self.text)

    def _token(self, token_id: int) -> str:
        return decode(self._tokenizer, [token_id], special_tokens=True)

    def take(self, *, final: bool) -> tuple[str, list[TokenText]]:
        """The text and tokens that can be sent now; with `final`, all that is left."""
        if final and not self.stopped:
            self._decode(final=True)
        end = len(self.text) if final or self.stopped else len(self.text) - self._held_back()
        # A token goes out with the text it starts in front of; the last one (EOS) has none.
        upto = self._sent_tokens
        while upto < len(self._tokens) and (self._tokens[upto].offset < end or (final and not self.stopped)):
            upto += 1
        piece, tokens = self.text[self._sent : end], self._tokens[self._sent_tokens : upto]
        self._sent, self._sent_tokens = max(end, self._sent), upto
        return piece, tokens

    def _decode(self, *, final: bool) -> None:
        if self._known is None:
            self._known = self._words(self._ids[self._window : self._read])
        now = self._words(self._ids[self._window :])
        if final:
            now = now.rstrip("\N{REPLACEMENT CHARACTER}")  # the answer was cut inside a character
        if len(now) <= len(self._known) or now.endswith("\N{REPLACEMENT CHARACTER}"):
            return  # nothing new, or the token ends inside a character
        before = len(self.text)
        self.text += now[len(self._known) :].removeprefix(" " if self._drop_first_space else "")
        self._drop_first_space = False
        if len(self._ids) - self._window > _WINDOW_TOKENS:
            self._window, self._known = self._read, None
        else:
            self._known = now
        self._read = len(self._ids)
        self._find_stop(before)

    def _words(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, special_tokens=False)

    def _find_stop(self, before: int) -> None:
        if self._pushed <= self._min_tokens:
            return
        starts = {stop: max(self._stops_from, before - len(stop) + 1) for stop in self._stop}
        found = [at for stop, start in starts.items() if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """Length of the longest end of the text that may be the start of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0) - 1
        for size in range(min(longest, len(self.text) - self._sent), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], scores: list[TokenLogprobs | None]
) -> list[TokenText]:
    """A prompt's tokens with their log-probs; the first one's is None."""
    text = ResponseText(tokenizer, [], ())
    for token_id, score in zip(prompt_ids, scores, strict=True):
        text.push(token_id, None if score is None else score.logprob, () if score is None else score.top)
    return text.take(final=True)[1]
