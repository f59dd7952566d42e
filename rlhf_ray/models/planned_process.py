"""What one process of a run takes of a GPU's memory and of the host's, in parts.   Bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

GB = 1e9
IMPORTED = 0.44e9  # a process that has imported torch, transformers and DeepSpeed, before its model
FORKED = 0.12e9  # the same as a fork of another process: what the two do not share
#: of each process on a GPU: CUDA's context and the work spaces of its libraries. Assumed, never measured here.
CONTEXT = 0.8e9
FIRST_USE = (
    0.06e9  # kernels and work spaces that libraries make in a CPU process when it first computes; measured there too
)
STATE = ("weights", "copies", "shared weights", "gradients", "optimiser")
OF_THE_FIRST = (
    "model to be written",
    "weights to send",
    "staged weights",
    "shared weights",
)  # of a group's first rank alone


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedProcess:
    """Bytes of one process that holds models."""

    parts: Mapping[str, float]  # where it computes: on its GPU, or in the host's memory
    on_gpu: bool
    host: Mapping[str, float] = field(
        default_factory=dict
    )  # in the host's memory beside them, as long as the process lives
    moments: Mapping[str, float] = field(default_factory=dict)  # there too, between two passes, one of them at a time
    loading: tuple[float, float] = (0.0, 0.0)  # on the device and on the host, while it loads its model
    first_alone: bool = False  # only the first of the role's processes loads the model, and writes it
    file: float = 0.0  # mapped while it loads, beside what it makes of it; one copy per node, which the system may drop
    #: of that file: what it made copies of, and what stays mapped beside them as long as other tensors are in the file
    stays_mapped: float = 0.0
    gpus: int = 1  # that hold the parts in `split` together
    split: Mapping[str, float] = field(default_factory=dict)
    heap: float = 0.0  # on a CPU: what the C library keeps of memory that came and went
    #: turn of a step -> parts on its GPU then, where those are fewer (`models.turns`)
    turns: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def state(self) -> float:
        """Always there."""
        return sum(value for name, value in self.parts.items() if name in STATE)

    @property
    def work(self) -> float:
        """What a forward or backward pass or a batch of generation adds."""
        return sum(value for name, value in self.parts.items() if name not in STATE)

    @property
    def gpu(self) -> float:
        """The most on any of its GPUs, without CUDA's own."""
        return (
            max(self.loading[0], self.state + self.work + sum(self.split.values()) / self.gpus) if self.on_gpu else 0.0
        )

    def gpu_in(self, turn: str | None) -> float:
        """The most on any of its GPUs in that turn, without CUDA's own."""
        parts = None if turn is None else self.turns.get(turn)
        return self.gpu if parts is None or not self.on_gpu else sum(parts.values())

    @property
    def memory(self) -> float:
        """The most in the host's memory, without what it imports and without mapped files."""
        beside, moment = sum(self.host.values()), max(self.moments.values(), default=0.0)
        if self.on_gpu:
            return max(self.loading[1], beside + moment)
        return max(self.loading[1], self.state + beside + max(self.work + self.heap, moment) + FIRST_USE)

    @property
    def peak(self) -> float:
        """The most that its resident memory grows by on a CPU, mapped files included."""
        return max(self.loading[1] + self.file, self.memory + self.stays_mapped)

    def of_number(self, number: int) -> PlannedProcess:
        """The role's process of that number: not all do what the first one does."""
        if number == 0:
            return self

        def without(sizes: Mapping[str, float]) -> dict[str, float]:
            return {name: size for name, size in sizes.items() if name not in OF_THE_FIRST}

        loading = {"loading": (0.0, 0.0), "file": 0.0} if self.first_alone else {}
        return replace(
            self, parts=without(self.parts), host=without(self.host), moments=without(self.moments),
            turns={turn: without(parts) for turn, parts in self.turns.items()}, **loading,
        )  # fmt: skip
