"""The bodies of OpenAI's requests, as far as this server understands them.

A field that would change the answer and that we can't honour is refused, never ignored; what only labels a request is
accepted. `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos` and `return_token_ids` are vLLM's
extensions (the openai client sends them by `extra_body`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar, cast

from pydantic import BaseModel, Field, ValidationError, model_validator

from rlhf_ray.config.sampling_params import SamplingParams, TokenRules
from rlhf_ray.serving.api_errors import ApiError, bad_request
from rlhf_ray.serving.request_parts import Message, ResponseFormat, Several, StrictBody

MAX_STOPS = 4
MAX_ALTERNATIVES = 20  # as OpenAI's chat and vLLM
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # field -> the values besides null that ask for nothing
    "best_of": (1,), "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],),
    "reasoning_effort": ("none",), "web_search_options": (), "audio": (), "prediction": (), "verbosity": ("medium",),
    "parallel_tool_calls": (True, False),
    # vLLM's, with its defaults, which its clients write out
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "use_beam_search": (False,), "length_penalty": (1,), "bad_words": ([],), "allowed_token_ids": (), "logits_processors": ([],),
    "prompt_logprobs": (), "truncate_prompt_tokens": (), "detokenize": (True,), "priority": (0,),
    "return_tokens_as_token_ids": (False,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],),
    "structured_outputs": (), "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
}  # fmt: skip

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


class StreamOptions(StrictBody):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(StrictBody):
    """What completions and chat have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)  # -1: vLLM's word for all
    min_p: float | None = Field(None, ge=0, lt=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Several[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # labels
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # what changes the logits or the end
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)  # less overflows a logit
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: Several[TokenId] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in _NEUTRAL.keys() & data.keys():
                value = data[name]
                if value is not None and value not in _NEUTRAL[name]:
                    raise bad_request(f"{name} is not supported by this server.", param=name, code="unsupported_parameter")
            # Neutral values of fields that we don't have are dropped, so that only unknown names are left to refuse.
            data = {name: value for name, value in data.items() if name in cls.model_fields or name not in _NEUTRAL}
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed when stream is true.", param="stream_options")
        if self.return_token_ids and self.stream:
            raise bad_request("return_token_ids is not allowed when stream is true.", param="return_token_ids")
        if self.json_schema is not None and (self.ignore_eos or self.min_tokens):
            raise bad_request(
                "response_format asks for JSON, which ends where it is complete: leave ignore_eos and min_tokens out.",
                param="response_format",
            )  # fmt: skip
        if len(self.stops) > MAX_STOPS:
            raise bad_request(f"stop holds {len(self.stops)} strings; at most {MAX_STOPS} are allowed.", param="stop")
        return self

    @property
    def json_schema(self) -> str | None:
        """That the response is held to."""
        return None if self.response_format is None else self.response_format.schema_text

    @property
    def token_limit(self) -> int | None:
        """The longest response that the request asks for; None: no limit of its own."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_new_tokens: int, more_stops: tuple[str, ...] = ()) -> SamplingParams:
        """OpenAI's defaults: temperature 1, everything kept."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            # Logits divided by less may overflow, and one row's overflow fails the batch.
            temperature=0.0 if temperature < 1e-3 else temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),  # in float32, less may be nothing
            min_p=self.min_p or 0.0,
            stop=self.stops + more_stops,
        )

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each token's log-prob; None: no log-probs."""

    def rules(self) -> TokenRules | None:
        """What the request asks for beside `sampling`; None: nothing."""
        bias = {int(token): change for token, change in (self.logit_bias or {}).items()}
        rules = TokenRules(
            logit_bias=tuple(bias.items()),
            min_tokens=self.min_tokens or 0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            json_schema=self.json_schema,
            alternatives=self.alternatives,
        )
        return None if rules == TokenRules() else rules


class CompletionRequest(GenerationRequest):
    prompt: str | Several[str] | Several[TokenId] | Several[Several[TokenId]]
    max_tokens: int | None = Field(16, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [cast(list[int], self.prompt)]  # checked by pydantic: the others are ids too
        return cast(list[str] | list[list[int]], self.prompt)

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def token_limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _nothing_is_drawn_for_an_echo_only(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise bad_request(
                "Invalid value for 'max_tokens': 0 needs echo, and without it the least is 1.",
                param="max_tokens", code="invalid_value",
            )  # fmt: skip
        return self


class ChatRequest(GenerationRequest):
    messages: Several[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs is only allowed when logprobs is true.", param="top_logprobs")
        return self


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], content_type: str, body: bytes) -> Body:
    """The request, or an ApiError that says what is wrong with it."""
    # Other types are those that a web page may post to a loopback server without being asked (no CORS preflight).
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type is {content_type!r}; send the body as application/json.")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_api_error(error) from None


def _as_api_error(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False, include_context=False)
    # Of the branches of a union the one that got furthest is meant: stop=["a", ""] is about [1], not about no string.
    first = max((each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]), key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        return bad_request(f"We could not parse the JSON body of your request: {first['msg']}.")
    # Those branches appear in the location ("stop", "list[str]", 1); OpenAI's param is the fields and indices only.
    path = [
        part for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))
    ]
    field = str(path[0]) if path else None
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or None
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        last = str(first["loc"][-1])  # any text
        name = param if last.isidentifier() else last
        return bad_request(f"Unrecognized request argument supplied: {name}", param=param, code="unknown_parameter")
    if first["type"] in ("model_type", "model_attributes_type") and field is None:
        return bad_request("The JSON body of your request must be an object.")
    return bad_request(f"Invalid value for '{param}': {said(first)}.", param=param, code="invalid_value")


def said(error: Mapping[str, Any]) -> str:
    """What pydantic says, or the words of a validator of ours."""
    return error["msg"].removeprefix("Value error, ")
