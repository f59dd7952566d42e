"""What an engine needs for updates alone, in the host's memory between them: for ranks whose GPU other roles use meanwhile.

Adam's moments, at every ZeRO stage, and at stage 3 DeepSpeed's buffers of gradients, which it makes once and keeps. (Its own
`offload_states` moves moments for its FusedAdam only at stage 3, and knows no stage 0.) Bits do not change by it.
"""

from __future__ import annotations

from typing import Any

import torch

from rlhf_ray.models.host_memory import host_buffer
from rlhf_ray.training.engine_state import ADAM_STATE, EngineState

BUFFERS = ("lp_grads", "contiguous_grad_buffer")  # as DeepSpeed calls them


class RestingState:
    """Both ways take as long as 8 bytes per trained weight of this rank over the bus (at ZeRO-3: 12)."""

    def __init__(self, state: EngineState, engine: Any, *, buffers: bool):
        """engine: DeepSpeed's, which has no annotations. buffers: whether it can move those of gradients, which it can't
        beside weights that it offloads."""
        self.state, self.engine, self.buffers = state, engine, buffers and state.zero_stage == 3
        self.pinned = state.device.type == "cuda"
        self.rests = False
        self._host: dict[tuple[torch.Tensor, str], torch.Tensor] = {}  # the same at every rest

    @torch.no_grad()
    def rest(self) -> None:
        if self.rests:
            return
        self.rests = True
        if self.state.zero_stage in (1, 2):
            self._drop_views()
        for part, moments in self.state.adam().state.items():
            for key in ADAM_STATE:
                kept = self._host.get((part, key))
                if kept is None:
                    kept = self._host[part, key] = host_buffer(part.shape, moments[key].dtype, pinned=self.pinned)
                moments[key] = kept.copy_(moments[key], non_blocking=True)
        if self.buffers:
            self.engine.offload_states(include=BUFFERS, pin_memory=self.pinned)
        if self.pinned:
            torch.cuda.current_stream().synchronize()

    @torch.no_grad()
    def wake(self) -> None:
        if not self.rests:
            return
        self.rests = False
        for moments in self.state.adam().state.values():
            for key in ADAM_STATE:
                moments[key] = moments[key].to(self.state.device, non_blocking=True, copy=True)
        if self.buffers:
            self.engine.reload_states()
        self.state.link()

    def _drop_views(self) -> None:
        """Stages 1 and 2 hold a view of the moments for each parameter (`EngineState.link` makes them again)."""
        for group in self.state.optimizer.bit16_groups:
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None and mapping.optim_fragment is not None:
                    mapping.optim_fragment = None
