"""The sections `model` and `data`."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from rlhf_ray.config.base import OneOf, Section, exact_div, option
from rlhf_ray.tables.families import FAMILIES


class FromScratch(Section):
    """The architecture of a model that starts from random weights."""

    architecture: Annotated[str, OneOf(FAMILIES, only=lambda family: family.config is not None)] = option(
        "gpt2", "model family"
    )
    layers: int = option(4, "transformer blocks", gt=0)
    width: int = option(256, "hidden size", gt=0)
    heads: int = option(4, "attention heads", gt=0)
    key_value_heads: int | None = option(
        None, "heads of keys and values, which groups of attention heads share (llama, qwen2); null: as many as heads", gt=0
    )
    positions: int = option(256, "longest sequence in tokens, prompt and response together", gt=1)
    vocab_size: int = option(4096, "entries of the byte-level BPE tokenizer trained on the recipe's text", ge=260)

    @model_validator(mode="after")
    def _heads_divide_width(self):
        exact_div(self.width, self.heads, "model.from_scratch.width must divide by heads")
        if self.key_value_heads is not None:
            exact_div(self.heads, self.key_value_heads, "model.from_scratch.heads must divide by key_value_heads")
            if self.architecture == "gpt2" and self.key_value_heads != self.heads:
                raise ValueError(
                    f"model.from_scratch.key_value_heads is {self.key_value_heads}, but GPT-2 has as many as heads "
                    f"({self.heads}); leave it out, or set architecture to llama"
                )
        return self

    @property
    def key_value_width(self) -> int:
        """Of one token's keys, or of its values."""
        return self.width // self.heads * (self.key_value_heads or self.heads)


class ModelConfig(Section):
    """The language model that is tuned."""

    name_or_path: str = option("from_scratch", "Hugging Face folder, hub name, or 'from_scratch'", min_length=1)
    from_scratch: FromScratch = option(FromScratch(), "architecture when name_or_path is 'from_scratch'")
    trust_remote_code: bool = option(False, "run Python code that a hub model ships; only for authors you trust")
    chat_template: str | None = option(None, "Jinja chat template to use in place of the tokenizer's own")

    @property
    def is_from_scratch(self) -> bool:
        return self.name_or_path == "from_scratch"


class SourceConfig(Section):
    """One data set; several are mixed by weight."""

    path: str = option(
        ..., "hub name, or a JSONL/CSV/Parquet file (gz too), or a folder of them; relative to data.root if given",
        min_length=1,
    )
    name: str | None = option(None, "hub configuration (subset) name")
    split: str = option("train", "split to read")
    columns: dict[str, str] = option({}, "our column name -> the data set's, where they differ")
    weight: float | None = option(
        None, "share of this source in the mix, relative to the others; none given: every row once", gt=0
    )
    max_rows: int | None = option(None, "read at most this many rows", gt=0)


class VotesConfig(Section):
    """Votes of people, as pairs for the reward model. `votes: URL` is the same as `votes: {url: URL}`."""

    url: str = option(
        ..., "database of votes: a SQLite file, or postgresql://USER@HOST/NAME, whose password is in PGPASSWORD or ~/.pgpass"
    )
    raters: tuple[str, ...] = option((), "votes of these raters only; none given: all")
    versions: tuple[str, ...] = option(
        (), "comparisons with an answer of one of these models, or MODEL@VERSION, only; none given: all"
    )
    since: datetime.date | None = option(None, "votes from this day on, in UTC: 2026-11-30")
    until: datetime.date | None = option(None, "votes up to this day, and of it")
    min_agreement: float = option(0.0, "least share of a comparison's votes that prefer its better answer", ge=0, le=1)
    weight: float | None = option(
        None, "share in the mix with data.preferences, relative to the others; none given: every pair once", gt=0
    )
    evaluate: bool = option(
        False, "the evaluation's prompts are those held out here, and others of eval_prompts only where they are too few"
    )

    @model_validator(mode="after")
    def _is_no_secret(self):
        parts = urlsplit(self.url) if self.is_url else None
        if parts is not None and (parts.password or "password=" in parts.query):
            raise ValueError(
                "the URL of votes holds a password, and the run folder keeps the recipe; take it out, and give it by PGPASSWORD "
                "or ~/.pgpass"
            )
        if self.since is not None and self.until is not None and self.since > self.until:
            raise ValueError(f"votes since {self.since} and until {self.until} are none; give the days in order")
        return self

    @property
    def is_url(self) -> bool:
        return "://" in self.url


class DataConfig(Section):
    """Where the text, the preferences and the prompts come from."""

    root: str | None = option(None, "local folder to read in place of the hub", min_length=1)
    builder: str | None = option(
        None, "package.module:function that returns the data sets by role, in place of the lists below"
    )
    builder_args: dict[str, Any] = option({}, "keyword arguments of the builder")
    sft: tuple[SourceConfig, ...] = option((), "text, prompt/response or chat messages to imitate")
    preferences: tuple[SourceConfig, ...] = option((), "prompt/chosen/rejected pairs or prompt/response/score rows")
    judge: tuple[SourceConfig, ...] = option((), "preferences that only the independent judge sees")
    votes: VotesConfig | None = option(
        None, "people's votes, as further preferences: a file or URL, or a section; prompts held out there train nothing"
    )
    prompts: tuple[SourceConfig, ...] = option((), "prompts for PPO; default: those of the preferences, else of the SFT rows")
    eval_prompts: tuple[SourceConfig, ...] = option((), "held-out prompts; default: a share of prompts")
    other_text: tuple[SourceConfig, ...] = option(
        (), "text, prompt/response or chat messages that nothing trains on: its perplexity under each model says what tuning cost"
    )
    holdout: float = option(0.05, "share held out of each role without a held-out set of its own", gt=0, lt=0.9)
    max_prompt_tokens: int = option(64, "longer prompts are cut", gt=0)
    truncate_prompt: Literal["left", "right", "drop"] = option(
        "left", "side of a long prompt that is cut, or drop the row"
    )
    allow_special_tokens: bool = option(
        False, "encode a special token's name in a row's text as the token; default: as plain text, whatever people wrote"
    )
    drop_duplicates: bool = option(
        True, "drop rows that repeat another of the same source exactly; of prompts, those with the same text"
    )

    @field_validator("votes", mode="before")
    @classmethod
    def _votes_by_name(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @property
    def lists(self) -> dict[str, tuple[SourceConfig, ...]]:
        """Role -> its sources."""
        return {
            "sft": self.sft, "preferences": self.preferences, "judge": self.judge, "prompts": self.prompts,
            "eval_prompts": self.eval_prompts, "other_text": self.other_text,
        }  # fmt: skip
