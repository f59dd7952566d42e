"""The raw rows of all lists that a recipe's stages need, by role, from sources, a builder and votes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from rlhf_ray.config import Recipe, SourceConfig
from rlhf_ray.data.builder import call_builder
from rlhf_ray.data.lists import LISTS, form_of, given_lists, is_read, needed_lists, prompt_origins
from rlhf_ray.data.sources import Rows, check_rows, load_source
from rlhf_ray.data.voted import HELD_OUT, HELD_OUT_PROMPTS, WHERE, Voted
from rlhf_ray.errors import UserError

RawSource = tuple[str, SourceConfig, Rows]  # its name in messages, its config, its rows
Raw = Mapping[str, list[RawSource]]


def read_sources(recipe: Recipe, votes: Voted | None) -> Raw:
    """By role. UserError where a stage that the recipe has lacks its rows."""
    data = recipe.data
    raw: dict[str, list[RawSource]] = {}
    needed = needed_lists(recipe)
    if data.builder is not None:
        built = call_builder(data, recipe.seed)
        for role, rows in built.items():
            source, where = SourceConfig(path=f"{data.builder}#{role}"), f"{data.builder} ({role})"
            if is_read(role, needed, built):
                check_rows(rows, source, where, form_of(recipe, role), with_prompts=False)
            raw[role] = [(where, source, rows)]
    given = given_lists(recipe)
    origins = prompt_origins(given)
    for role in LISTS:
        if data.lists[role] and data.builder is not None:
            raise UserError(
                f"data.builder and data.{role} are both set, but the builder replaces the lists; remove one"
            )
        if is_read(role, needed, given):
            for index, source in enumerate(data.lists[role]):
                where = f"data.{role}[{index}]"
                form, with_prompts = form_of(recipe, role), role in origins
                rows = load_source(source, data.root, recipe.seed, where, form, with_prompts=with_prompts)
                raw.setdefault(role, []).append((where, source, rows))
    if votes is not None and ("preferences" in needed or "prompts" not in raw):
        raw.setdefault("preferences", []).append((WHERE, votes.source, votes.train))
        if len(votes.held_out):
            raw[HELD_OUT] = [(f"{WHERE} (held out)", votes.source, votes.held_out)]
    if votes is not None and data.votes is not None and data.votes.evaluate and votes.held_out_prompts:
        raw[HELD_OUT_PROMPTS] = [(f"{WHERE} (held out)", votes.source, votes.prompt_rows())]
    for role, section in needed.items():
        if role not in raw:
            giver = f"{data.builder} returned no '{role}'" if data.builder else f"data.{role} is empty"
            raise UserError(f"'{section}' is set and {giver}; give it rows, or set {section}: null")
    if not any(role in raw for role in ("prompts", "preferences", "sft")):
        raise UserError(
            "data.prompts is empty and there is no other data to take prompts from; list a source of prompts"
        )
    return raw


def rows_of(dataset: Rows) -> Iterable[Mapping]:
    """The rows as mappings, which they are where no format is set; the annotation allows for all formats."""
    return cast(Iterable[Mapping], dataset)
