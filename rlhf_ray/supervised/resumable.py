"""Hugging Face's Trainer with checkpoints that hold no pickles, that any number of workers can go on from, and that are found out
where a byte of them has changed (`supervised.checkpoints`)."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer

from rlhf_ray.errors import RunFailed
from rlhf_ray.models.tensor_file import write_tensors
from rlhf_ray.runs.disk import no_room
from rlhf_ray.runs.elsewhere import hand_in, place_of, take_in
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.sealed import new_folder
from rlhf_ray.supervised.checkpoints import (
    Checkpoint,
    newest_complete,
    publish,
    rank_file,
    read_random,
    read_state,
    read_trained,
    temporary_folder,
    write_random,
)
from rlhf_ray.training.agreement import from_all_ranks, most_over_ranks, rank, world_size
from rlhf_ray.training.engine_state import EngineState

KEPT_CHECKPOINTS = 2
KINDS = ("trained", "random")
BYTES_PER_WEIGHT = 12  # a weight and Adam's two moments, in float32


class ResumableTrainer(Trainer):
    """Mixin before a TRL trainer on DeepSpeed. Its private methods are those by which Trainer saves and goes on."""

    stage: str
    zero_stage: int
    events: Path  # the run's events.jsonl
    run: RunFolder | None

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, over all resumes."""
        raise NotImplementedError

    @property
    def _checkpoints(self) -> Path:
        return Path(cast(str, self.args.output_dir))

    # -- writing ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Collective. Where there is no room, or a rank can't write, an event says so, and training goes on."""
        step = self.state.global_step
        temporary = temporary_folder(self._checkpoints, step)
        if not self._agree(self._begin(temporary) if rank() == 0 else None, step):
            return
        digests: dict[str, str] = {}
        if not self._agree(self._write(temporary, digests), step):
            return
        if not self._agree(self._bring_together(temporary), step):
            return
        for kind in KINDS:
            each = from_all_ranks(digests.pop(kind), self.args.device)
            digests |= {rank_file(kind, other, len(each)): digest for other, digest in enumerate(each)}
        if rank() != 0:
            return
        scheduler: Any = self.lr_scheduler
        told = Checkpoint(step=step, elapsed_s=self.elapsed_s, rate_step=scheduler.last_epoch)
        try:
            self.state.save_to_json(str(temporary / "trainer_state.json"))
            publish(self._checkpoints, told, digests, KEPT_CHECKPOINTS)
        except OSError as error:
            self._tell_of_none(step, str(error))

    def _begin(self, temporary: Path) -> str | None:
        """Make the folder -> what stands in the way, if anything does."""
        trained = self.engine_state().trained()
        # DeepSpeed adds ds_numel to the parameters that it shards.
        weights = sum(cast(Any, each).ds_numel if self.zero_stage == 3 else each.numel() for _, each in trained)
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            new_folder(temporary)
            return no_room(temporary, BYTES_PER_WEIGHT * weights)
        except OSError as error:
            return str(error)

    def _write(self, temporary: Path, digests: dict[str, str]) -> str | None:
        """Write this rank's files, kind -> SHA-256 into `digests` -> what went wrong, if anything did."""
        at_once = self.zero_stage == 3  # gathered weights are gone after their turn
        share = {
            name: tensor.detach().to("cpu", torch.float32, copy=at_once).contiguous()
            for number, (name, tensor) in enumerate(self.engine_state().read())
            if number % world_size() == rank()
        }
        trained, generators = (temporary / rank_file(kind, rank(), world_size()) for kind in KINDS)
        try:
            temporary.mkdir(mode=0o700, parents=True, exist_ok=True)  # on another host than rank 0's
            digests |= {"trained": write_tensors(trained, share, {}), "random": write_random(generators)}
        except OSError as error:  # the disk is full all the same, or gone
            return str(error)
        return None

    def _bring_together(self, temporary: Path) -> str | None:
        """Collective. Ranks that see another disk than rank 0 hand it their files by the run's store -> what went wrong."""
        if self.run is None or self.run.url is None:
            return None
        own = hashlib.sha256(place_of(self.run, platform.node()).encode()).hexdigest()
        places = from_all_ranks(own, self.args.device)
        others = [number for number, place in enumerate(places) if place != places[0]]
        files = {number: [temporary / rank_file(kind, number, len(places)) for kind in KINDS] for number in others}
        problem = None
        try:
            if rank() in others:
                hand_in(self.run, *files[rank()], always=True)
                for file in files[rank()]:
                    file.unlink()
        except (OSError, RunFailed) as error:
            problem = str(error)
        if most_over_ranks(int(problem is not None), self.args.device) > 0 or rank() != 0:
            return problem
        try:
            take_in(self.run, *(file for number in others for file in files[number]))
        except (OSError, RunFailed) as error:
            return str(error)
        return None

    def _agree(self, problem: str | None, step: int) -> bool:
        """Whether no rank has a problem. Collective; also a barrier."""
        if most_over_ranks(int(problem is not None), self.args.device) == 0:
            return True
        if rank() == 0:
            self._tell_of_none(step, problem or "another rank could not write")
        return False

    def _tell_of_none(self, step: int, problem: str) -> None:
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
