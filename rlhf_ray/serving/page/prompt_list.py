"""The prompts that a server offers for comparison: from a file, or those that the served run was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.data.text_files import read_text_files
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.votes.records import Prompt, VoteRefused, check_prompt

MOST = 10_000
LONGEST = 256  # tokens of an answer of what is no run


def read_prompts(file: str | Path) -> list[Prompt]:
    """A prompt per line of a text file, or a row with `prompt` (a text or messages) per line of a .jsonl. UserError for others."""
    path = expanded(file)
    if not path.is_file():
        raise UserError(f"the prompts can't be read from '{file}': there is no such file; give a text file, or JSON lines")
    is_json = {".jsonl", ".json"} & set(path.suffixes[-2:])
    read = read_text_files("json" if is_json else "text", [(str(file), str(path))], "the prompts")
    found: list[Prompt] = []
    for index, row in enumerate(read):
        prompt = row.get("prompt") if is_json else row["text"]
        if isinstance(prompt, str) and not prompt.strip():
            continue
        try:
            if prompt is None:
                raise VoteRefused("it has no 'prompt'")
            check_prompt(prompt)
        except VoteRefused as error:
            raise UserError(f"{read.place(index)}: {error}") from None
        found.append(prompt)
    if not found:
        raise UserError(f"'{file}' holds no prompts; write one per line")
    return found[:MOST]


def prompts_of_run(path: Path) -> list[Prompt]:
    """The prompts that PPO trained on, as people would write them; [] for what is no run folder with prepared data."""
    folder = RunFolder(path)
    if not folder.data("prompts").is_file():
        return []
    from rlhf_ray.data.role_files import read_prompt_columns
    from rlhf_ray.models.control_tokens import shown

    columns = read_prompt_columns(folder)
    rows = range(min(len(columns), MOST))
    pairs = zip(columns.messages(rows), columns.prompts(rows), strict=True)
    return list({json.dumps(each): each for each in (messages or shown(text) for messages, text in pairs)}.values())


def longest_of_run(path: Path) -> int:
    """Tokens that a response may have: as many as in the run's training, so that people judge what it can change."""
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        return LONGEST
    try:
        return load_recipe(str(folder.recipe)).generation.max_new_tokens
    except UserError:  # of another version, or of a plugin that is not here; `serving.engine_choice` says so
        return LONGEST


def common_ending(prompts: list[Prompt]) -> str:
    """The white space that ends every prompt of the list: a model was trained with it, so a person's own prompt gets it too."""
    endings = {each[len(each.rstrip()) :] for each in prompts if isinstance(each, str)}
    return endings.pop() if len(endings) == 1 else ""
