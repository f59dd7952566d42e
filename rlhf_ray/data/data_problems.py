"""What is wrong with a recipe's data, found without preparing it: the data part of `rlhf-ray doctor`."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_ray.config import Recipe
from rlhf_ray.config.columns import column_problems
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.data.builder import find_builder
from rlhf_ray.data.formats import Role, detect
from rlhf_ray.data.kept_rows import forget
from rlhf_ray.data.lists import LISTS, form_of, given_lists, is_read, needed_lists, prompt_origins
from rlhf_ray.data.role_files import CHAT
from rlhf_ray.data.sources import columns_of
from rlhf_ray.data.voted import COLUMNS, WHERE, read_votes
from rlhf_ray.errors import UserError


def check_data(recipe: Recipe) -> list[str]:
    """Problems of the recipe's data, one sentence each; [] if none is seen. Files are read whole, data sets of the hub are not.

    What was read stays for the data stage in this process (`kept_rows`).

    A builder is imported and its arguments are checked against its signature; it is not called.
    """
    data, problems = recipe.data, []
    forget()

    def attempt(check: Callable) -> None:
        try:
            check()
        except UserError as error:
            problems.append(str(error))

    if data.root is not None and not expanded(data.root).is_dir():
        return [f"data.root = '{data.root}' is not a folder; give the folder that holds the data"]
    needed = needed_lists(recipe)
    votes = data.votes
    if votes is not None:
        attempt(lambda: read_votes(votes))
        attempt(lambda: detect(COLUMNS, {}, form_of(recipe, "preferences"), WHERE))
    given = [role for role in LISTS if data.lists[role]]
    if data.builder is not None:
        attempt(lambda: find_builder(data, recipe.seed))
        problems += [f"data.builder and data.{role} are both set, but the builder replaces the lists; remove one"
                     for role in given]  # fmt: skip
        return problems
    there = given_lists(recipe)
    problems += [f"'{section}' is set and data.{role} is empty; give it rows, or set {section}: null"
                 for role, section in needed.items() if role not in there]  # fmt: skip
    if "sft" not in needed and "preferences" not in there and "prompts" not in there:
        problems.append(
            "data.prompts is empty and there is no other data to take prompts from; list a source of prompts"
        )
    others: dict[str, list[str] | None] = {}  # role -> its rows' other columns; None: not known before they are read
    for role in given:
        if not is_read(role, needed, given):
            continue  # prepare does not read it either
        form = form_of(recipe, role)
        for index, source in enumerate(data.lists[role]):
            where = f"data.{role}[{index}]"

            def columns_fit(source=source, where=where, form: Role = form, role=role) -> None:
                columns = columns_of(source, data.root, where, form, with_prompts=role in prompt_origins(there))
                if columns is None:
                    others[role] = None
                    return
                used = {"prompt", *detect(columns, source.columns, form, where).values()}
                known = others.setdefault(role, [])
                if known is not None:
                    known += [name for name in columns if name not in used]

            attempt(columns_fit)
        weights = [source.weight for source in data.lists[role]]
        weights += [votes.weight] if role == "preferences" and votes is not None else []
        if None in weights and any(weight is not None for weight in weights):
            problems.append(f"some of data.{role} have a weight and some have none; give a weight to all or to none")
    if votes is not None and not data.preferences:
        others["preferences"] = []  # a vote's row is the pair alone
    attempt(lambda: problems.extend(_asked_problems(recipe, there, others)))
    if problems:
        forget()
    return problems


def _asked_problems(recipe: Recipe, given: list[str], others: dict[str, list[str] | None]) -> list[str]:
    """A problem for each column that a function asks for and no source of prompts has."""
    found = []
    for role in prompt_origins(given):
        there = others.get(role)
        if there is not None:
            # Whether a prompt is a conversation, which has messages, is known once it is read.
            found += column_problems(recipe, there, f"data.{role}", perhaps=(CHAT,))
    return found
