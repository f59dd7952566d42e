"""What others publish of large runs, to stand beside `bench.scale`. Every figure has its source; none was measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    system: str
    model: str
    gpus: str
    work: str
    seconds: str  # of a step, or of what `work` says
    source: str


_OPENRLHF = "OpenRLHF/OpenRLHF, README.md at commit 391e1de4"
_VERL_ASYNC = "verl-project/verl, docs/advance/fully_async.md at commit 1947b755"
_VERL_SYNC = "verl-project/verl, docs/advance/delta_weight_sync.md at commit 08d36cd0"
_AREAL = "inclusionAI/AReaL, blog/AReaL_v0_3.md at commit 177dce56, table 2: hours of 1,000 steps"
_DAPO = "DAPO without critic and reference, 512 prompts x 16, up to 28K tokens: step (generation / old log-probs / update)"
PUBLISHED = (
    Published(system="OpenRLHF", model="7B", gpus="16 A800", work="PPO, 1,024 prompts, 1 epoch; lengths are not told",
              seconds="471", source=_OPENRLHF),
    Published(system="OpenRLHF", model="70B", gpus="32 A800", work="the same", seconds="4,489", source=_OPENRLHF),
    Published(system="verl", model="7B", gpus="32 H20, shared", work=_DAPO, seconds="790 (357 / 108 / 270)", source=_VERL_ASYNC),
    Published(system="verl", model="7B", gpus="128 H20, shared", work="the same", seconds="356 (178 / 54 / 114)",
              source=_VERL_ASYNC),
    Published(system="verl", model="7B", gpus="64 + 64 H20", work="the same, generation ahead of training", seconds="151",
              source=_VERL_ASYNC),
    Published(system="verl", model="7B", gpus="8 + 8 H100", work="weights to the generators by broadcast", seconds="5.5 to 6.0",
              source=_VERL_SYNC),
    Published(system="verl", model="72B", gpus="32 + 32 H100", work="the same", seconds="28.5 to 29.1", source=_VERL_SYNC),
    Published(system="AReaL", model="7B", gpus="24 nodes", work="PPO of long reasoning, in turns", seconds="208", source=_AREAL),
    Published(system="AReaL", model="7B", gpus="24 nodes", work="the same, generation ahead of training", seconds="91",
              source=_AREAL),
)  # fmt: skip
