"""Hugging Face's Trainer with checkpoints that hold no pickles, that any number of workers can go on from, and that are found out
where a byte of them has changed (`supervised.checkpoints`)."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer

from rlhf_ray.models.tensor_file import write_tensors
from rlhf_ray.runs.disk import no_room
from rlhf_ray.runs.elsewhere import hand_in, place_of, take_in
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.sealed import new_folder
from rlhf_ray.runs.writing import Writing
from rlhf_ray.supervised.checkpoints import (
    LEFT_OVER,
    Checkpoint,
    newest_complete,
    publish,
    random_state,
    rank_file,
    read_random,
    read_state,
    read_trained,
    temporary_folder,
)
from rlhf_ray.training.agreement import from_all_ranks, most_over_ranks, rank, world_size
from rlhf_ray.training.engine_state import EngineState

KEPT_CHECKPOINTS = 2
KINDS = ("trained", "random")
BYTES_PER_WEIGHT = 12  # a weight and Adam's two moments, in float32


@dataclass(slots=True, kw_only=True)
class Pending:
    """A checkpoint that is being written. The same on all ranks, but for its files."""

    told: Checkpoint
    handed_in: list[int]  # ranks whose files come to rank 0's disk by the run's store
    published: bool = False  # rank 0 was asked to make it appear


class ResumableTrainer(Trainer, ABC):
    """Mixin before a TRL trainer on DeepSpeed. Its private methods are those by which Trainer saves and goes on.

    Checkpoints are written beside training. Between two steps each rank copies its share of the state; a thread writes and hashes
    the copy while the next steps go on. After each step the ranks ask each other, without waiting, whether all are done. Rank 0's
    thread then makes the checkpoint appear. A process that dies in between costs that checkpoint; the one before it is the last.
    """

    stage: str
    zero_stage: int
    events: Path  # the run's events.jsonl
    run: RunFolder | None
    pending: Pending | None = None

    @property
    @abstractmethod
    def elapsed_s(self) -> float:
        """Seconds of training, over all resumes."""

    @property
    def _checkpoints(self) -> Path:
        return Path(cast(str, self.args.output_dir))

    @cached_property
    def _writing(self) -> Writing:
        return Writing()

    # -- writing ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Collective. Begin one; the one before it is waited for, so at most one copy of the state is held. Where there is no room,
        or a rank can't write, an event says so, and training goes on."""
        self.finish_checkpoint()
        step = self.state.global_step
        temporary = temporary_folder(self._checkpoints, step)
        if not self._agree(self._make_room(temporary) if rank() == 0 else None, step):
            return
        scheduler: Any = self.lr_scheduler
        told = Checkpoint(step=step, elapsed_s=self.elapsed_s, rate_step=scheduler.last_epoch)
        self.pending = Pending(told=told, handed_in=self._on_other_disks())
        files: dict[str, dict[str, torch.Tensor]] = {"trained": self._share(), "random": random_state()}
        counts = json.dumps(asdict(self.state), indent=2, sort_keys=True) + "\n" if rank() == 0 else None
        self._writing.begin(partial(self._write, temporary, files, counts, rank() in self.pending.handed_in))

    def look_at_checkpoint(self) -> None:
        """Collective, after each step: make the pending one appear if all ranks have written it."""
        self._go_on_with_checkpoint(wait=False)

    def finish_checkpoint(self) -> None:
        """Collective: until the pending one is on disk."""
        while self.pending is not None:
            self._go_on_with_checkpoint(wait=True)

    def _go_on_with_checkpoint(self, *, wait: bool) -> None:
        pending = self.pending
        if pending is None:
            return
        answer = self._writing.result(wait=wait)
        if most_over_ranks(int(answer is None), self.args.device) > 0:
            return
        good = self._agree(answer if isinstance(answer, str) else None, pending.told.step)
        if not good or pending.published:
            self.pending = None
            return
        pending.published = True
        digests = dict(cast(dict[str, str], answer))
        for kind in KINDS:
            each = from_all_ranks(digests.pop(rank_file(kind, rank(), world_size())), self.args.device)
            digests |= {rank_file(kind, other, len(each)): digest for other, digest in enumerate(each)}
        self._writing.begin(partial(self._publish, pending, digests) if rank() == 0 else dict)

    def _make_room(self, temporary: Path) -> str | None:
        """Make the folder, without what a process that died has left -> what stands in the way, if anything does."""
        trained = self.engine_state().trained()
        # DeepSpeed adds ds_numel to the parameters that it shards.
        weights = sum(cast(Any, each).ds_numel if self.zero_stage == 3 else each.numel() for _, each in trained)
        try:
            for left in self._checkpoints.glob(LEFT_OVER):
                shutil.rmtree(left)
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            new_folder(temporary)
            return no_room(temporary, BYTES_PER_WEIGHT * weights)
        except OSError as error:
            return str(error)

    def _share(self) -> dict[str, torch.Tensor]:
        """A copy of this rank's share of the state. Collective."""
        return {
            name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for number, (name, tensor) in enumerate(self.engine_state().read())
            if number % world_size() == rank()
        }

    def _write(
        self, temporary: Path, files: dict[str, dict[str, torch.Tensor]], counts: str | None, hands_in: bool
    ) -> dict[str, str]:
        """In a thread: this rank's files, by kind -> {file: SHA-256}. counts: what Trainer counts, on rank 0."""
        temporary.mkdir(mode=0o700, parents=True, exist_ok=True)  # on another host than rank 0's
        names = {kind: rank_file(kind, rank(), world_size()) for kind in KINDS}
        digests = {name: write_tensors(temporary / name, files[kind], {}) for kind, name in names.items()}
        if counts is not None:
            (temporary / "trainer_state.json").write_text(counts)
        if hands_in and self.run is not None:
            hand_in(self.run, *(temporary / name for name in digests), always=True)
            for name in digests:
                (temporary / name).unlink()
        return digests

    def _publish(self, pending: Pending, digests: dict[str, str]) -> dict[str, str]:
        """In rank 0's thread, once all have written."""
        temporary = temporary_folder(self._checkpoints, pending.told.step)
        if self.run is not None:
            ranks = world_size()
            take_in(self.run, *(temporary / rank_file(kind, each, ranks) for each in pending.handed_in for kind in KINDS))
        publish(self._checkpoints, pending.told, digests, KEPT_CHECKPOINTS)
        return {}

    def _on_other_disks(self) -> list[int]:
        """Collective: the ranks that see another disk than rank 0."""
        if self.run is None or self.run.url is None:
            return []
        own = hashlib.sha256(place_of(self.run, platform.node()).encode()).hexdigest()
        places = from_all_ranks(own, self.args.device)
        return [number for number, place in enumerate(places) if place != places[0]]

    def _agree(self, problem: str | None, step: int) -> bool:
        """Whether no rank has a problem. Collective; also a barrier."""
        if most_over_ranks(int(problem is not None), self.args.device) == 0:
            return True
        if rank() == 0:
            self._tell_of_none(step, problem or "another rank could not write")
        return False

    def _tell_of_none(self, step: int, problem: str) -> None:
        shutil.rmtree(temporary_folder(self._checkpoints, step), ignore_errors=True)
        found = newest_complete(self._checkpoints)
        last = "there is none before it" if found is None else f"the last good one is of step {found[1].step}"
        EventLog(self.events).add(
            f"no checkpoint of step {step} is written: {problem}", f"{self.stage} goes on; {last}", stage=self.stage, step=step
        )

    # -- going on -----------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """None: else Trainer would read DeepSpeed's own files, which are pickles."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._go_on_from(Path(resume_from_checkpoint))
        return prepared

    def _go_on_from(self, folder: Path) -> None:
        """Weights, Adam's moments and the schedule's position. Collective."""
        state = self.engine_state()
        state.create()
        state.load(read_trained(folder), self.state.global_step, f"the checkpoint {folder}")
        scheduler: Any = self.lr_scheduler
        at = read_state(folder).rate_step
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": at, "_step_count": at + 1})

    def _load_rng_state(self, checkpoint: Any) -> None:
        if checkpoint is not None:
            read_random(Path(checkpoint), rank())

    def engine_state(self) -> EngineState:
        engine: Any = self.deepspeed
        model = cast(torch.nn.Module, self.model)
        return EngineState(model, engine.optimizer, zero_stage=self.zero_stage, device=self.args.device)
