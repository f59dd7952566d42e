"""From a request's prompt or messages to token ids that the model takes, or an ApiError that says why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.tokens import encode_prompt
from rlhf_ray.models.tokenizer import bos_id, decode, eos_id
from rlhf_ray.serving.api_errors import bad_request
from rlhf_ray.serving.config import Limits
from rlhf_ray.serving.request_bodies import ChatRequest, CompletionRequest, GenerationRequest
from rlhf_ray.serving.request_parts import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In a plain dialogue the next turn ends a reply that EOS has not ended.
PLAIN_CHAT_STOPS = ("\n\nUser:",)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """Reads prompts for one model. `positions` is its longest sequence, None where it has no limit."""

    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    vocab_size: int
    limits: Limits
    stops: tuple[str, ...] = ()
    """What ended responses in training, beside EOS."""
    allow_special_tokens: bool = False
    """Whether the name of a special token in a request's text is the token; else it is plain text."""

    def completion(self, request: CompletionRequest) -> list[list[int]]:
        prompts = request.prompts
        if not prompts:
            raise bad_request("Invalid value for 'prompt': it holds no prompt.", param="prompt", code="invalid_value")
        if len(prompts) > self.limits.max_prompts:
            raise bad_request(
                f"The request holds {len(prompts)} prompts; the limit is {self.limits.max_prompts}.", param="prompt"
            )
        plain = self._format().plain
        return [
            self._checked(encode_prompt(self.tokenizer, plain(prompt)) if isinstance(prompt, str) else prompt, "prompt")
            for prompt in prompts
        ]

    def chat(self, request: ChatRequest) -> list[list[int]]:
        return [self._checked(encode_prompt(self.tokenizer, chat_text(self._format(), request.messages)), "messages")]

    def _format(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, allow_special_tokens=self.allow_special_tokens)

    @property
    def chat_is_plain(self) -> bool:
        """Whether chat is written as "User: ..." lines, because the tokenizer has no chat template."""
        return self.tokenizer.chat_template is None

    def text(self, prompt_ids: list[int]) -> str:
        return decode(self.tokenizer, prompt_ids, special_tokens=False)

    def check_ids(self, request: GenerationRequest) -> None:
        """Refuse token ids beyond the vocabulary in what changes the logits or the end."""
        named = {
            "logit_bias": [int(token) for token in request.logit_bias or {}],
            "stop_token_ids": request.stop_token_ids or [],
        }
        for param, ids in named.items():
            if ids and max(ids) >= self.vocab_size:
                raise bad_request(self._beyond(max(ids)), param=param, code="invalid_value")

    def _beyond(self, token: int) -> str:
        return f"Token id {token} is beyond the model's vocabulary of {self.vocab_size}."

    def max_new_tokens(self, prompt_ids: list[int], asked: int | None, default: int | None) -> int:
        """How long a response may get: what was asked for, or an error; else the default, as far as there is room."""
        room = None if self.positions is None else self.positions - len(prompt_ids)
        caps = [cap for cap in (room, self.limits.max_tokens, default) if cap is not None]
        if asked is None:
            return min(caps, default=4096)
        if self.limits.max_tokens is not None and asked > self.limits.max_tokens:
            raise bad_request(
                f"max_tokens is {asked}; this server allows at most {self.limits.max_tokens}.", param="max_tokens"
            )
        if room is not None and asked > room:
            raise bad_request(
                f"This model's maximum context length is {self.positions} tokens. However, you requested "
                f"{len(prompt_ids) + asked} tokens ({len(prompt_ids)} in the prompt, {asked} for the completion). "
                "Please reduce the length of either one.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return asked

    def _checked(self, prompt_ids: list[int], param: str) -> list[int]:
        if not prompt_ids:
            # A model needs at least one token: BOS, which opens a text, or EOS, which stands between texts.
            bos = bos_id(self.tokenizer)
            prompt_ids = [eos_id(self.tokenizer) if bos is None else bos]
        if max(prompt_ids) >= self.vocab_size:
            raise bad_request(self._beyond(max(prompt_ids)), param=param)
        caps = [
            cap for cap in (self.limits.max_prompt_tokens, self.positions and self.positions - 1) if cap is not None
        ]
        if caps and len(prompt_ids) > min(caps):
            raise bad_request(
                f"The prompt has {len(prompt_ids)} tokens; this model takes at most {min(caps)}. Please shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        return prompt_ids


def chat_text(chat: ChatFormat, messages: list[Message]) -> str:
    """The messages as the tokenizer's chat template writes them, else as a plain dialogue; the assistant is next."""
    if all(message.role in ("system", "developer") for message in messages):
        raise bad_request("messages holds no user message to answer.", param="messages", code="invalid_value")
    plain = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in messages
    ]
    try:
        return chat.prompt(plain)
    except TemplateError as error:  # templates refuse orders of roles that their model was not trained on
        raise bad_request(
            f"The model's chat template refuses these messages: {error}.", param="messages", code="invalid_value"
        ) from None
