"""Prepared text -> token rows that TRL's trainers take as they are, in the order in which they are trained on.

N rows; every row's ids end in EOS. Rows longer than max_length are counted and lose their left side (the prompt's
beginning; a BOS stays), so the response's end and EOS are always there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.tokens import encode_pairs, opening_ids
from rlhf_ray.errors import UserError

IGNORED = -100  # label of a token that the loss leaves out (transformers' convention)
CHUNK = 2000  # rows tokenised at once: bounds the Python lists, which take ten times the arrays' memory
MEGABATCH = 50  # batches within which rows are sorted by length


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Token rows of one data set."""

    dataset: Dataset
    lengths: np.ndarray  # int64 [N]; of both sides together where a row is a pair
    cut: int  # rows that were longer than max_length
    ties: int = 0  # pairs left out because both sides are the same ids, as they came or once they are cut
    used: np.ndarray | None = None  # int64 [N], of pairs: which rows of the data they are


def sft_rows(tokenizer: PreTrainedTokenizerBase, texts: Dataset, *, max_length: int) -> TokenRows:
    """prompt, response -> input_ids, labels. The loss covers the response and EOS; everything where prompt is ""."""
    cutter = _Cutter(tokenizer, max_length)
    ids, labels = _ListColumn(), _ListColumn()
    for chunk in _chunks(texts):
        for prompt, (row, prompt_length) in zip(
            chunk["prompt"], encode_pairs(tokenizer, chunk["prompt"], chunk["response"]), strict=True
        ):
            masked = prompt_length if prompt else 0
            kept = cutter.cut(row)
            masked = min(max(masked - (len(row) - len(kept)), 0), len(kept))
            ids.add(kept)
            labels.add([IGNORED] * masked + kept[masked:])
    dataset = Dataset(pa.table({"input_ids": ids.array(), "labels": labels.array()}))
    return TokenRows(dataset=dataset, lengths=ids.lengths(), cut=cutter.count)


def packed_rows(tokenizer: PreTrainedTokenizerBase, texts: Dataset, *, max_length: int, seed: int) -> TokenRows:
    """Plain texts one after the other (each with its EOS, in an order drawn from `seed`), in blocks of max_length.

    The usual form of language-model pretraining: a block may hold the end of one text and the beginning of another, and
    attends over both, EOS between them. What is left at the end (less than a block) is dropped.
    """
    if any(prompt for chunk in _chunks(texts) for prompt in chunk["prompt"]):
        raise UserError("packing is on, but the data has prompts, and packing is for plain text; set packing: false")
    ids = _ListColumn()
    for chunk in _chunks(texts):
        for row, _ in encode_pairs(tokenizer, chunk["prompt"], chunk["response"]):
            ids.add(row)
    rows, lengths = ids.rows(), ids.lengths()
    order = np.random.default_rng(seed).permutation(len(rows))
    flat = np.concatenate([rows[place] for place in order])
    blocks = len(flat) // max_length
    if blocks == 0:
        raise UserError(f"packing is on, but the data has {lengths.sum()} tokens in all, less than one sequence of "
                        f"max_length = {max_length}; lower max_length or set packing: false")  # fmt: skip
    values = pa.array(flat[: blocks * max_length])
    column = pa.ListArray.from_arrays(pa.array(np.arange(blocks + 1, dtype=np.int32) * max_length), values)
    dataset = Dataset(pa.table({"input_ids": column, "labels": column}))
    return TokenRows(dataset=dataset, lengths=np.full(blocks, max_length, np.int64), cut=0)


def pair_rows(tokenizer: PreTrainedTokenizerBase, pairs: Dataset, *, max_length: int) -> TokenRows:
    """prompt, chosen, rejected -> chosen_ids, rejected_ids. Ties are left out."""
    cutter, made = _Cutter(tokenizer, max_length), _Pairs(("chosen_ids", "rejected_ids"))
    for chunk in _chunks(pairs):
        sides = [encode_pairs(tokenizer, chunk["prompt"], chunk[side]) for side in ("chosen", "rejected")]
        for (chosen, _), (rejected, _) in zip(*sides, strict=True):
            made.add(cutter.cut(chosen), cutter.cut(rejected))
    lengths = made.columns["chosen_ids"].lengths() + made.columns["rejected_ids"].lengths()
    return made.rows(lengths, cut=cutter.count, max_length=max_length)


def score_rows(tokenizer: PreTrainedTokenizerBase, scored: Dataset, *, max_length: int) -> TokenRows:
    """prompt, response, score -> input_ids, score."""
    cutter = _Cutter(tokenizer, max_length)
    ids = _ListColumn()
    for chunk in _chunks(scored):
        for row, _ in encode_pairs(tokenizer, chunk["prompt"], chunk["response"]):
            ids.add(cutter.cut(row))
    scores = pa.array(np.asarray(scored["score"], np.float32))
    dataset = Dataset(pa.table({"input_ids": ids.array(), "score": scores}))
    return TokenRows(dataset=dataset, lengths=ids.lengths(), cut=cutter.count)


def dpo_rows(tokenizer: PreTrainedTokenizerBase, pairs: Dataset, *, max_length: int) -> TokenRows:
    """prompt, chosen, rejected -> prompt_ids, chosen_ids, rejected_ids; EOS belongs to the replies. Ties are left out.

    Both replies of a pair keep the same prompt: as much of its end as fits with the longer one. Only then does what the
    two sides have in common cancel out of DPO's loss. A reply is cut where it is too long by itself.
    """
    opening, cut = opening_ids(tokenizer), 0
    made = _Pairs(("prompt_ids", "chosen_ids", "rejected_ids"))
    for chunk in _chunks(pairs):
        sides = [encode_pairs(tokenizer, chunk["prompt"], chunk[side]) for side in ("chosen", "rejected")]
        for (chosen, length), (rejected, _) in zip(*sides, strict=True):
            cut += max(len(chosen), len(rejected)) > max_length
            room = max_length - max(len(chosen), len(rejected)) + length
            prompt = _end_of(chosen[:length], room, opening)
            left = max_length - len(prompt)
            made.add(prompt, _end_of(chosen[length:], left, []), _end_of(rejected[length:], left, []))
    prompts, chosen, rejected = (column.lengths() for column in made.columns.values())
    return made.rows(2 * prompts + chosen + rejected, cut=cut, max_length=max_length)


def training_order(lengths: np.ndarray, *, batch_size: int, rows: int, seed: int) -> np.ndarray:
    """Which row is trained on when: int64 [rows], passes over the data one after the other, each in its own order.

    Batches hold rows of similar length (less padding, equal work for the ranks): a pass is shuffled, sorted by length
    within 50 batches at a time, and its batches are shuffled. It follows from `seed` alone, so a resumed run goes on
    exactly where it stopped. `rows` is rounded down to whole batches, but not below one batch.
    """
    rng = np.random.default_rng(seed)
    passes: list[np.ndarray] = []
    carried = np.empty(0, np.int64)  # rows of a pass that fill no batch begin the next
    wanted = max(rows // batch_size, 1)
    made = 0
    while made < wanted:
        order = np.concatenate([carried, rng.permutation(len(lengths))])
        whole = len(order) // batch_size * batch_size
        carried = order[whole:]
        window = MEGABATCH * batch_size
        parts = [order[start : min(start + window, whole)] for start in range(0, whole, window)]
        parts = [part[np.argsort(-lengths[part], kind="stable")] for part in parts]
        if not parts:
            continue
        batches = np.concatenate(parts).reshape(-1, batch_size)
        passes.append(batches[rng.permutation(len(batches))])
        made += len(batches)
    return np.concatenate(passes)[:wanted].reshape(-1)


def padded(rows: Sequence[Sequence[int]], filler: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int64 [B, S] with `filler` on the right, S a multiple of `multiple`; and the mask of their own ids."""
    longest = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.full((len(rows), longest), filler, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.as_tensor(row)
        mask[place, : len(row)] = 1
    return ids, mask


class _Cutter:
    """Cuts the left of over-long rows, keeping a BOS, and counts them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.opening = opening_ids(tokenizer)
        self.max_length = max_length
        self.count = 0

    def cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_length:
            return ids
        self.count += 1
        return _end_of(ids, self.max_length, self.opening)


def _end_of(ids: list[int], limit: int, opening: list[int]) -> list[int]:
    """At most the last `limit` ids, the first of them `opening` (a BOS) where `ids` began with it."""
    if len(ids) <= limit:
        return ids
    opening = opening if ids[: len(opening)] == opening else []
    return opening + ids[len(ids) - max(limit - len(opening), 0) :]


class _Pairs:
    """Pairs as columns of ids, the two sides last. One whose sides are the same ids says nothing and is counted only."""

    def __init__(self, names: tuple[str, ...]):
        self.columns = {name: _ListColumn() for name in names}
        self._used: list[int] = []
        self._seen = 0

    def add(self, *ids: list[int]) -> None:
        self._seen += 1
        if ids[-2] == ids[-1]:
            return
        self._used.append(self._seen - 1)
        for column, values in zip(self.columns.values(), ids, strict=True):
            column.add(values)

    def rows(self, lengths: np.ndarray, *, cut: int, max_length: int) -> TokenRows:
        if self._seen > 0 and not self._used:
            raise UserError(
                f"both replies are the same tokens in each of the {self._seen} pairs, once they are cut to max_length = "
                f"{max_length}, so there is nothing to learn; raise max_length"
            )
        dataset = Dataset(pa.table({name: column.array() for name, column in self.columns.items()}))
        used = np.array(self._used, np.int64)
        return TokenRows(dataset=dataset, lengths=lengths, cut=cut, ties=self._seen - len(used), used=used)


class _ListColumn:
    """A column of id lists, kept as flat int32 arrays."""

    def __init__(self):
        self._values: list[np.ndarray] = []

    def add(self, ids: Sequence[int]) -> None:
        self._values.append(np.asarray(ids, np.int32))

    def rows(self) -> list[np.ndarray]:
        return self._values

    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self._values], np.int64)

    def array(self) -> pa.ListArray:
        offsets = np.concatenate([[0], np.cumsum(self.lengths())])
        flat = np.concatenate(self._values) if self._values else np.empty(0, np.int32)
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _chunks(dataset: Dataset) -> Iterator[dict[str, list]]:
    for start in range(0, len(dataset), CHUNK):
        yield dataset[start : start + CHUNK]
