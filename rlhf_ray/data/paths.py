"""What a data path looks like and where it points, known without reading anything."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import DataConfig, SourceConfig

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
    """The same with local paths made absolute: a job or a worker has another working directory."""
    if data.root is not None:
        return data.model_copy(update={"root": str(Path(data.root).expanduser().absolute())})

    def absolute(source: SourceConfig) -> SourceConfig:
        path = Path(source.path).expanduser()
        local = "://" not in source.path and (path.exists() or suffix_of(path) in READERS or source.path[0] in "./~")
        return source.model_copy(update={"path": str(path.absolute())}) if local else source

    lists = ("sft", "preferences", "judge", "prompts", "eval_prompts")
    return data.model_copy(update={name: tuple(map(absolute, getattr(data, name))) for name in lists})
