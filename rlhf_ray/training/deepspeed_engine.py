"""One rank of a DeepSpeed group: forward, one optimiser step over microbatches, full weights, exact state.

Weights that train are float32 and the forward pass runs under autocast (see `training.forward`). So gradients are accumulated in
float32. DeepSpeed's own bf16 mode accumulates them in bf16 and is no faster. Frozen weights come as they are to be held
(`models.frozen`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rlhf_ray.errors import NotFinite
from rlhf_ray.training.agreement import most_over_ranks, sum_over_ranks
from rlhf_ray.training.deepspeed_config import add_offload
from rlhf_ray.training.distributed import prepare_deepspeed
from rlhf_ray.training.embedding_gradient import add_to_looked_up_rows
from rlhf_ray.training.engine_state import EngineState
from rlhf_ray.training.finite_ranks import check_losses, check_weights
from rlhf_ray.training.resting_state import RestingState
from rlhf_ray.training.shards import cut_into_shards, gather_in


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserConfig:
    """AdamW and clipping, as in the recipe."""

    adam_eps: float
    max_grad_norm: float
    adam_form: Literal["torch", "tensorflow"] = "torch"
    zero_stage: int
    adam_betas: tuple[float, float] = (0.9, 0.999)
    offload_optimizer: bool = False
    offload_param: bool = False
    rests: bool = False  # between updates: `DeepSpeedEngine.rest`
    compute_dtype: torch.dtype = torch.float32  # that the module's products run in, under autocast


@dataclass(frozen=True, slots=True)
class Forwarded:
    """An output of `DeepSpeedEngine.forward` that kept its graph."""

    output: torch.Tensor | tuple[torch.Tensor, ...]


def _check_norm(norm: float) -> None:
    if not math.isfinite(norm):
        raise NotFinite(f"the norm of the gradient is {norm}")


class DeepSpeedEngine:
    """A module under DeepSpeed on one rank. The process group must exist (`training.distributed.join_group`).

    At ZeRO-3 rank 0 alone needs a module with weights; those of the others may be on the meta device (`models.without_weights`).
    Calls are collective: every rank of the group makes the same calls in the same order.
    """

    def __init__(self, module: nn.Module, config: OptimiserConfig, *, device: torch.device):
        prepare_deepspeed(device.type)
        import deepspeed

        self.config = config
        self.device = device
        if config.zero_stage == 3:
            cut_into_shards(module, device, self._deepspeed_options())
            if config.compute_dtype != torch.float32:
                gather_in(module, config.compute_dtype)
        self.module = module = module.to(device)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in trained:  # the fused step reads weights, gradients and moments as they lie in memory
            if config.zero_stage < 3:
                parameter.data = parameter.data.float().contiguous()
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
        self._state = EngineState(module, self.optimizer, zero_stage=config.zero_stage, device=device)
        self._resting = RestingState(self._state, self.engine, buffers=not config.offload_param)
        self._state.create(
            torch.device("cpu") if config.rests else None
        )  # so that they never stand on a GPU that others use
        if config.rests:
            self.rest()

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
            # On streams of their own; gloo has none.
            options["zero_optimization"] |= {"overlap_comm": self.device.type == "cuda"}
        add_offload(options, offload_optimizer=self.config.offload_optimizer, offload_param=self.config.offload_param)
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
        self._resting.wake()
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
        for name, parameter in self._state.trained():
            with self._state.gathered(parameter):
                yield name, parameter.detach()

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that training changes, by name: float32 weights and Adam moments, whole (`EngineState`)."""
        self._resting.wake()
        return self._state.read()

    def load_state(self, state: dict[str, torch.Tensor], steps_taken: int, where: str = "the state") -> None:
        """Inverse of `state`. Bit for bit at equal stage and rank count.

        UserError, and nothing is loaded, where a tensor of this model is missing or has another shape. where: what it is.
        """
        self._resting.wake()
        self._state.load(state, steps_taken, where)
        self.steps_taken = steps_taken

    def rest(self) -> None:
        """Move to the host's memory what only updates need (`RestingState`), until the next call that needs it. Not where DeepSpeed
        keeps it there anyway."""
        if not self.config.offload_optimizer:
            self._resting.rest()

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
        gradients = [parameter.grad for _, parameter in self._state.trained() if parameter.grad is not None]
        self._grad_norm = float(nn.utils.get_total_norm(gradients))
        _check_norm(self._grad_norm)  # of reduced gradients: the same on all ranks
        limit = self.config.max_grad_norm or float("inf")
        excess = (self._grad_norm + 1e-6) / limit  # as torch.nn.utils.clip_grad_norm_ has it
        optimizer.grad_scale = torch.tensor(max(1.0, excess), device=self.device)
