"""A few rows of tokens with their log-probs under a version, as training computes them.   R rows of S tokens.

They lie beside the version's files. A server computes the same before the version takes traffic: a version that was damaged
on its way, or that the server reads in another way than training, answers nobody.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_ray.errors import UserError
from rlhf_ray.publish.version import ROWS_FILE, Version
from rlhf_ray.runs.storage import write_atomically

_ROWS, _LENGTH, _SEED = 4, 32, 20_000
#: largest mean gap of a token's log-prob; in 16 bits every product is rounded
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRows:
    """What training says."""

    ids: list[list[int]]  # [R][S]
    logprobs: list[list[float]]  # [R][S - 1]: of each row's tokens but the first, at temperature 1
    precision: str  # that they were computed in


def rows_to_check(vocabulary: int, positions: int | None) -> list[np.ndarray]:
    """Ids that are the same for every version of a model. Any do: weights that differ differ on all of them."""
    drawn = np.random.default_rng(_SEED).integers(0, vocabulary, (_ROWS, min(_LENGTH, positions or _LENGTH)))
    return list(drawn.astype(np.int64))


def write_rows(folder: Path, ids: Sequence[np.ndarray], logprobs: Sequence[np.ndarray], precision: str) -> None:
    row = {
        "ids": [[int(one) for one in each] for each in ids],
        "logprobs": [[float(one) for one in each] for each in logprobs],
        "precision": precision,
    }
    write_atomically(folder / ROWS_FILE, json.dumps(row, allow_nan=False))


def read_rows(folder: Path) -> CheckedRows | None:
    """None where nothing was written."""
    path = folder / ROWS_FILE
    if not path.is_file():
        return None
    try:
        return CheckedRows(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); publish the version again") from None


def check_rows(rows: CheckedRows, computed: Sequence[Sequence[float]], precision: str) -> float:
    """-> the mean gap between training's log-probs and the server's, [R][S - 1] each. UserError where it is too large."""
    gaps = [
        abs(one - other)
        for own, others in zip(computed, rows.logprobs, strict=True)
        for one, other in zip(own, others, strict=True)
    ]
    gap = float(np.mean(gaps))
    most = max(TOLERANCE[rows.precision], TOLERANCE[precision])
    if not gap <= most:
        raise UserError(
            f"its log-probs differ from training's by {gap:.3g} per token (in {precision}, training in {rows.precision}; at most "
            f"{most:g} is rounding): the files were damaged on their way, or are not read as training reads them"
        )
    return gap


def rows_of(version: Version, trust_remote_code: bool = False) -> None:
    """Compute and write the rows of a version, in float32 by training's own forward pass; an adapter is merged for that."""
    import torch

    from rlhf_ray.models.embeddings import embedding_rows
    from rlhf_ray.models.load import load_causal_lm
    from rlhf_ray.models.positions import positions_of
    from rlhf_ray.training.forward import response_logprobs

    if version.adapter is None:
        model = load_causal_lm(version.folder, torch.float32, trust_remote_code)
    else:
        from rlhf_ray.models.low_rank import load_merged

        model = load_merged(version.folder, version.adapter, torch.float32, trust_remote_code)
    rows = rows_to_check(embedding_rows(model), positions_of(model.config))
    with torch.inference_mode():
        logprobs = response_logprobs(model.eval(), [row[:1] for row in rows], [row[1:] for row in rows])
    write_rows(version.own_folder, rows, logprobs, "float32")
