"""What kind of file a data path names, and where it is, without reading it."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import DataConfig, Recipe, RewardConfig, Section, SourceConfig
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError

#: a file's ending -> the reader of `datasets` for it
READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")


def suffix_of(path: str | Path) -> str:
    """'.jsonl' of 'a/train.jsonl.gz'."""
    name = Path(str(path)).name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def resolve_paths(data: DataConfig) -> DataConfig:
    """The same config with absolute local paths: a job or a worker has another working directory."""
    if data.votes is not None and not data.votes.is_url:
        votes = data.votes.model_copy(update={"url": str(expanded(data.votes.url).absolute())})
        data = data.model_copy(update={"votes": votes})
    if data.root is not None:
        return data.model_copy(update={"root": str(expanded(data.root).absolute())})

    def absolute(source: SourceConfig) -> SourceConfig:
        path = expanded(source.path)
        local = "://" not in source.path and (path.exists() or suffix_of(path) in READERS or source.path[0] in "./~")
        return source.model_copy(update={"path": str(path.absolute())}) if local else source

    return data.model_copy(update={name: tuple(map(absolute, sources)) for name, sources in data.lists.items()})


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute data paths and model folders: a job or a worker has another working directory."""
    root = recipe.data.root
    if root is not None and "://" not in root and not expanded(root).exists():
        raise UserError(f"data.root = '{root}' is not there; give the folder that holds the data")
    changes: dict[str, Section] = {"data": resolve_paths(recipe.data)}
    if not recipe.model.is_from_scratch:
        changes["model"] = recipe.model.model_copy(update={"name_or_path": _absolute(recipe.model.name_or_path)})
    for name, section in recipe.trained.items():
        if isinstance(section, RewardConfig) and not section.starts_within_run:
            changes[name] = section.model_copy(update={"base": _absolute(section.base)})
    rewards = {
        name: term if term.model in (None, "reward") else term.model_copy(update={"model": _absolute(term.model)})
        for name, term in recipe.ppo.rewards.items()
    }
    reference = None if recipe.ppo.reference is None else _absolute(recipe.ppo.reference)
    changes["ppo"] = recipe.ppo.model_copy(update={"rewards": rewards, "reference": reference})
    return recipe.model_copy(update=changes)


def _absolute(model: str) -> str:
    """A local model folder as an absolute path; a hub name unchanged."""
    folder = expanded(model)
    return str(folder.absolute()) if folder.exists() else model
