"""One rank of a DeepSpeed group: forward, one optimiser step over microbatches, full weights, exact state.

Weights stay float32 and the forward pass runs under autocast (see `training.forward`). So gradients are accumulated in
float32. DeepSpeed's own bf16 mode accumulates them in bf16 and is no faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from rlhf_ray.errors import NotFinite, UserError
from rlhf_ray.training.agreement import most_over_ranks, sum_over_ranks
from rlhf_ray.training.distributed import prepare_deepspeed
from rlhf_ray.training.embedding_gradient import add_to_looked_up_rows
from rlhf_ray.training.finite_ranks import check_losses, check_weights

ADAM_STATE = ("exp_avg", "exp_avg_sq")
STATE_WORDS = {"weight": "weights"} | {key: f"optimiser moments ({key})" for key in ADAM_STATE}
CHECKPOINT_REMEDY = "delete it to go on from the checkpoint before it, or the stage's folder to start the stage again"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserConfig:
    """AdamW and clipping, as in the recipe."""

    adam_eps: float
    max_grad_norm: float
    adam_form: Literal["torch", "tensorflow"] = "torch"
    zero_stage: int
    adam_betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, slots=True)
class Forwarded:
    """An output of `DeepSpeedEngine.forward` that kept its graph."""

    output: torch.Tensor | tuple[torch.Tensor, ...]


def _check_norm(norm: float) -> None:
    if not math.isfinite(norm):
        raise NotFinite(f"the norm of the gradient is {norm}")


class DeepSpeedEngine:
    """A module under DeepSpeed on one rank. The process group must exist (`training.distributed.join_group`).

    Calls are collective: every rank of the group makes the same calls in the same order.
    """

    def __init__(self, module: nn.Module, config: OptimiserConfig, *, device: torch.device):
        prepare_deepspeed(device.type)
        import deepspeed

        self.config = config
        self.device = device
        module = module.to(device).float()
        self.module = module
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in trained:  # the fused step reads weights, gradients and moments as they lie in memory
            parameter.data = parameter.data.contiguous()
        if config.zero_stage == 0:
            add_to_looked_up_rows(module)
        optimizer = torch.optim.AdamW(
            trained, lr=0.0, betas=config.adam_betas, eps=config.adam_eps, weight_decay=0.0, fused=True
        )
        # Any: at ZeRO 0 it is `optimizer`, above it DeepSpeed's wrapper, which has no annotations.
        self.optimizer: Any
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._deepspeed_options(), dist_init_required=False
        )
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        if self.world_size == 1 and config.zero_stage == 0:
            # It would copy all gradients into one buffer and back (rlhf_ray/bench/trials.py).
            self.engine.enable_backward_allreduce = False
        self.steps_taken = 0
        self._grad_norm = float("nan")
        if config.zero_stage == 0:
            # DeepSpeed clips plain float32 optimizers without telling the norm, so the hook does both.
            optimizer.register_step_pre_hook(self._clip)
            # Torch counts a weight's changes, but not those of the fused step; copies of weights are made again by that count.
            optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(trained))
        self._create_adam_state()

    def _deepspeed_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the caller owns the accumulation boundary
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.config.max_grad_norm if self.config.zero_stage > 0 else 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": self.config.zero_stage},
        }
        if self.config.zero_stage > 0:
            options["zero_optimization"] |= {"overlap_comm": False}
        return options

    def forward(self, *batch: Any, keep_graph: bool = False, **options: Any) -> Any:
        """The module's output: without gradient, or with its graph, for a `step` that starts from it."""
        # Measured: with two graphs waiting, ZeRO-3 gives each the wrong gradients, without an error.
        assert not (keep_graph and self.config.zero_stage == 3), "ZeRO-3 can't keep graphs"
        self.engine.train(keep_graph)
        with torch.set_grad_enabled(keep_graph):
            return self.engine(*batch, **options)

    def step(
        self, microbatches: Iterable[tuple[Any, Any]], loss_of: Callable[..., torch.Tensor], *, learning_rate: float
    ) -> float:
        """One optimiser step; returns the gradient norm before clipping. NotFinite, on every rank and before any weight
        moves, where the loss or the norm is not finite.

        A microbatch is (the module's inputs, rest) or (Forwarded, rest). `loss_of(output, rest)` gives this rank's share of a
        loss already divided by the global token count. DeepSpeed averages over ranks, so the share is multiplied by their
        number. Every rank brings equally many microbatches (ZeRO-3 gathers parameters in each forward).
        """
        for group in self.optimizer.param_groups:
            group["lr"], group["eps"] = learning_rate, self._adam_eps()
        self.engine.train()
        losses: list[torch.Tensor] = []
        for inputs, rest in microbatches:
            output = inputs.output if isinstance(inputs, Forwarded) else self.engine(*inputs)
            loss = loss_of(output, rest)
            losses.append(loss.detach())
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        check_losses(losses, self.device)
        self.engine.step()
        if self.config.zero_stage > 0:
            norm = self.engine.get_global_grad_norm()
            assert norm is not None, "DeepSpeed has the norm after a step"
            self._grad_norm = float(norm)
            _check_norm(self._grad_norm)  # DeepSpeed has skipped such a step by itself, in silence
        self.steps_taken += 1
        return self._grad_norm

    def check_weights(self, what: str) -> None:
        """NotFinite where a trained weight is not finite: "{what}: the weight ...". Collective; nothing is gathered."""
        check_weights(self.module, what, sharded=self.config.zero_stage == 3, device=self.device)

    def most_over_ranks(self, value: int) -> int:
        """The largest of each rank's value, on every rank. Collective."""
        return most_over_ranks(value, self.device)

    def sum_over_ranks(self, value: float) -> float:
        """The same number on every rank. Collective."""
        return sum_over_ranks(value, self.device)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full float32 tensor on the device) of what trains, in order. All ranks iterate together; a ZeRO-3 tensor
        is gathered while it is the current one."""
        for name, parameter in self._trained():
            with self._gathered(parameter):
                yield name, parameter.detach()

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that training changes, by name: float32 weights and Adam moments, whole, whatever the ZeRO stage.

        Whole tensors make a checkpoint loadable at another stage or rank count. All ranks iterate together.
        """
        for name, parameter in self._trained():
            for key in ("weight", *ADAM_STATE):
                yield f"{key}/{name}", self._whole(parameter, key)

    def load_state(self, state: dict[str, torch.Tensor], steps_taken: int, where: str = "the state") -> None:
        """Inverse of `state`. Bit for bit at equal stage and rank count.

        UserError, and nothing is loaded, where a tensor of this model is missing or has another shape. where: what it is.
        """
        self._check_state(state, where)
        for name, parameter in self._trained():
            for key in ("weight", *ADAM_STATE):
                self._set_whole(parameter, key, state[f"{key}/{name}"].to(self.device))
        self.steps_taken = steps_taken
        self._set_adam_steps()

    def _check_state(self, state: dict[str, torch.Tensor], where: str) -> None:
        trained = self._trained()
        for key, what in STATE_WORDS.items():
            missing = [name for name, _ in trained if f"{key}/{name}" not in state]
            if missing:
                raise UserError(
                    f"{where} has no {what} for {len(missing)} of {len(trained)} trained weights ({missing[0]} and so on), so "
                    f"training can't go on from it as it was; {CHECKPOINT_REMEDY}"
                )
            for name, parameter in trained:
                # DeepSpeed adds ds_shape to the parameters that it shards.
                shape = cast(Any, parameter).ds_shape if self.config.zero_stage == 3 else parameter.shape
                found = state[f"{key}/{name}"].shape
                if found != shape:
                    raise UserError(
                        f"{where} has {what} of shape {tuple(found)} for {name}, whose own is {tuple(shape)}: it is of another "
                        f"model; {CHECKPOINT_REMEDY}"
                    )

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def _adam_eps(self) -> float:
        """Adam's epsilon for the coming step.

        torch adds it to sqrt(v / (1 - b2^t)), TensorFlow to sqrt(v): torch's eps / sqrt(1 - b2^t) is TensorFlow's eps,
        32 times as large in the first step (the form of Kingma and Ba just before section 2.1, arXiv 1412.6980).
        """
        if self.config.adam_form == "torch":
            return self.config.adam_eps
        return self.config.adam_eps / (1 - self.config.adam_betas[1] ** (self.steps_taken + 1)) ** 0.5

    def _clip(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The fused step divides by grad_scale what it reads: no pass over all gradients for that alone."""
        gradients = [parameter.grad for _, parameter in self._trained() if parameter.grad is not None]
        self._grad_norm = float(nn.utils.get_total_norm(gradients))
        _check_norm(self._grad_norm)  # of reduced gradients: the same on all ranks
        limit = self.config.max_grad_norm or float("inf")
        excess = (self._grad_norm + 1e-6) / limit  # as torch.nn.utils.clip_grad_norm_ has it
        optimizer.grad_scale = torch.tensor(max(1.0, excess), device=self.device)

    # -- where each ZeRO stage keeps things ------------------------------------------------------------------------

    def _gathered(self, parameter: nn.Parameter, write: bool = False) -> AbstractContextManager[None]:
        import deepspeed

        return deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if write else None, enabled=self.config.zero_stage == 3
        )

    def _whole(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.config.zero_stage == 0:
            if key == "weight":
                return parameter.detach()
            return self.optimizer.state[parameter][key]
        whole = safe_get_full_fp32_param(parameter) if key == "weight" else safe_get_full_optimizer_state(parameter, key)
        assert whole is not None, f"DeepSpeed has no {key} of a trained parameter"
        return whole

    def _set_whole(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        import deepspeed.utils as ds

        if self.config.zero_stage == 0 and key != "weight":
            self.optimizer.state[parameter][key].copy_(value)
        elif self.config.zero_stage == 3:
            part = self._own_part(value)
            if key == "weight":
                ds.safe_set_local_fp32_param(parameter, part)
            else:
                ds.safe_set_local_optimizer_state(parameter, part, key)
        elif self.config.zero_stage > 0:
            if key == "weight":
                ds.safe_set_full_fp32_param(parameter, value)
            else:
                ds.safe_set_full_optimizer_state(parameter, value, key)
        if key != "weight":
            return
        with self._gathered(parameter, write=True), torch.no_grad():
            if self.config.zero_stage < 3 or self.rank == 0:
                parameter.copy_(value)

    def _own_part(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a tensor under ZeRO-3, which pads to equal slices."""
        size = -(-value.numel() // self.world_size)
        padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        return padded[self.rank * size : (self.rank + 1) * size]

    def _adam(self) -> torch.optim.AdamW:
        """The plain optimizer, which DeepSpeed has wrapped at stages 1 to 3."""
        return self.optimizer.optimizer if self.config.zero_stage > 0 else self.optimizer

    def _create_adam_state(self) -> None:
        """Moments of zero. Left to Adam's first step, they could be neither saved nor loaded before it: no resume."""
        adam, stage = self._adam(), self.config.zero_stage
        if stage == 3:
            parts = self.optimizer.fp32_partitioned_groups_flat  # this rank's slices, in groups
        else:
            parts = [part for group in adam.param_groups for part in group["params"]]  # at 1 and 2 one slice of all
        for part in parts:
            adam.state[part] = {key: torch.zeros_like(part) for key in ADAM_STATE}
        self._set_adam_steps()
        if stage in (1, 2):
            # Tells safe_get/set_full_optimizer_state where they are; DeepSpeed does it after its first step.
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_adam_steps(self) -> None:
        """Adam's own step count, which bias correction uses."""
        for state in self._adam().state.values():
            state["step"] = torch.tensor(float(self.steps_taken), device=self.device)  # where the fused step wants it
