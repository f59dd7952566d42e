"""All that training changes in a module under DeepSpeed: weights and Adam's moments, whole, by name, whatever the ZeRO stage.

Whole tensors make a checkpoint loadable at another stage or rank count. Calls are collective: every rank makes the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn

from rlhf_ray.errors import UserError

ADAM_STATE = ("exp_avg", "exp_avg_sq")
STATE_WORDS = {"weight": "weights"} | {key: f"optimiser moments ({key})" for key in ADAM_STATE}
CHECKPOINT_REMEDY = "delete it to go on from the checkpoint before it, or the stage's folder to start the stage again"


class EngineState:
    """The state of one rank's engine. Its optimiser is AdamW, at ZeRO 0 plain, above it in DeepSpeed's wrapper."""

    def __init__(self, module: nn.Module, optimizer: Any, *, zero_stage: int, device: torch.device):
        """optimizer: the engine's; DeepSpeed's wrapper has no annotations."""
        self.module, self.optimizer, self.zero_stage, self.device = module, optimizer, zero_stage, device

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, float32 tensor). All ranks iterate together."""
        if not any(ADAM_STATE[0] in kept for kept in self.adam().state.values()):
            self.create()  # no step yet: DeepSpeed skips one whose gradient is not finite
        self.link()
        for name, parameter in self.trained():
            for key in ("weight", *ADAM_STATE):
                yield f"{key}/{name}", self._whole(parameter, key)

    def load(self, state: Mapping[str, torch.Tensor], steps_taken: int, where: str) -> None:
        """Inverse of `read`. Bit for bit at equal stage and rank count. After `create`, or a first step.

        UserError, and nothing is loaded, where a tensor of this model is missing or has another shape. where: what it is.
        """
        self._check(state, where)
        for name, parameter in self.trained():
            for key in ("weight", *ADAM_STATE):
                self._set_whole(parameter, key, state[f"{key}/{name}"].to(self.device))
        self.set_adam_steps(steps_taken)

    def create(self, device: torch.device | None = None) -> None:
        """Moments of zero. Left to Adam's first step, they could be neither saved nor loaded before it: no resume.

        device: None: where the weights are.
        """
        adam, stage = self.adam(), self.zero_stage
        if stage == 3:
            parts = self.optimizer.fp32_partitioned_groups_flat  # this rank's slices, in groups
        else:
            parts = [part for group in adam.param_groups for part in group["params"]]  # at 1 and 2 one slice of all
        for part in parts:
            adam.state[part] = {key: torch.zeros_like(part, device=device) for key in ADAM_STATE}
        self.set_adam_steps(0)
        self.link()

    def link(self) -> None:
        """Tell safe_get/set_full_optimizer_state of stages 1 and 2 where the moments are.

        DeepSpeed does it once, after its first step, also if that was one that it skipped: then there were none.
        """
        if self.zero_stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def set_adam_steps(self, steps_taken: int) -> None:
        """Adam's own step count, which bias correction uses."""
        for part, state in self.adam().state.items():
            state["step"] = torch.tensor(float(steps_taken), device=part.device)  # where the fused step wants it

    def gathered(self, parameter: nn.Parameter, write: bool = False) -> AbstractContextManager[None]:
        """In whose body a parameter is whole."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if write else None, enabled=self.zero_stage == 3
        )

    def _check(self, state: Mapping[str, torch.Tensor], where: str) -> None:
        trained = self.trained()
        for key, what in STATE_WORDS.items():
            missing = [name for name, _ in trained if f"{key}/{name}" not in state]
            if missing:
                raise UserError(
                    f"{where} has no {what} for {len(missing)} of {len(trained)} trained weights ({missing[0]} and so on), so "
                    f"training can't go on from it as it was; {CHECKPOINT_REMEDY}"
                )
            for name, parameter in trained:
                # DeepSpeed adds ds_shape to the parameters that it shards.
                shape = cast(Any, parameter).ds_shape if self.zero_stage == 3 else parameter.shape
                found = state[f"{key}/{name}"].shape
                if found != shape:
                    raise UserError(
                        f"{where} has {what} of shape {tuple(found)} for {name}, whose own is {tuple(shape)}: it is of another "
                        f"model; {CHECKPOINT_REMEDY}"
                    )

    # -- where each ZeRO stage keeps things ------------------------------------------------------------------------

    def _whole(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.zero_stage == 0:
            if key == "weight":
                return parameter.detach()
            return self.adam().state[parameter][key]
        whole = safe_get_full_fp32_param(parameter) if key == "weight" else safe_get_full_optimizer_state(parameter, key)
        assert whole is not None, f"DeepSpeed has no {key} of a trained parameter"
        return whole

    def _set_whole(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        import deepspeed.utils as ds

        if self.zero_stage == 0 and key != "weight":
            self.adam().state[parameter][key].copy_(value)
        elif self.zero_stage == 3:
            part = _own_part(value)
            if key == "weight":
                ds.safe_set_local_fp32_param(parameter, part)
            else:
                ds.safe_set_local_optimizer_state(parameter, part, key)
        elif self.zero_stage > 0:
            if key == "weight":
                ds.safe_set_full_fp32_param(parameter, value)
            else:
                ds.safe_set_full_optimizer_state(parameter, value, key)
        if key != "weight":
            return
        with self.gathered(parameter, write=True), torch.no_grad():
            if self.zero_stage < 3 or torch.distributed.get_rank() == 0:
                parameter.copy_(value)

    def adam(self) -> torch.optim.AdamW:
        """The plain optimizer, which DeepSpeed has wrapped at stages 1 to 3."""
        return self.optimizer.optimizer if self.zero_stage > 0 else self.optimizer


def _own_part(value: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a tensor under ZeRO-3, which pads to equal slices."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    size = -(-value.numel() // ranks)
    padded = nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    return padded[rank * size : (rank + 1) * size]
