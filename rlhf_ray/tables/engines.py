"""Generation engines: the values of `generation.engine`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rlhf_ray.tables.table import Table, loaded

if TYPE_CHECKING:
    from rlhf_ray.generation.engine_protocol import BatchEngine, ContinuousEngine, EngineSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What draws responses: in training, in the evaluation and, if it can, in serving."""

    name: str
    make: Callable[[EngineSetting], BatchEngine] | str
    words: str
    #: GPUs of each actor -> why it can't run here, one sentence with the remedy; None where it always can
    problem: Callable[[float], str | None] | str | None = None
    #: it also is a `generation.engine_protocol.ContinuousEngine`: requests join and leave between tokens, as serving needs
    continuous: bool = False
    #: makes the one for serving, where that is another object
    serve: Callable[[EngineSetting], ContinuousEngine] | str | None = None
    alone: bool = False  # a process has one of them when it serves: no second version or model, no adapter on shared weights
    #: it goes on with responses that another one has begun (`submit` takes `begun`): a server's streams outlive their replica
    continues: bool = False
    tells_support: bool = False  # it answers `SamplingParams.tells_support`, which PPO needs where sampling truncates
    coldest: float = 0.0  # the lowest temperature that it draws at, except 0
    #: copies of the model's weights beside the Hugging Face model that it is given, on CPUs and on GPUs (the memory plan)
    copies: tuple[int, int] = (0, 0)
    schedules: bool = False  # it takes generation.max_num_seqs and tensor_parallel

    def engine(self, setting: EngineSetting) -> BatchEngine:
        return loaded(self.make)(setting)

    def serving_engine(self, setting: EngineSetting) -> ContinuousEngine:
        """Of one that is continuous."""
        assert self.continuous, self.name
        return cast("ContinuousEngine", loaded(self.make if self.serve is None else self.serve)(setting))

    def problem_here(self, gpus: float) -> str | None:
        return None if self.problem is None else loaded(self.problem)(gpus)


_HERE = "rlhf_ray.generation"
ENGINES: Table[Engine] = Table(
    "a generation engine",
    Engine(
        name="torch", make=f"{_HERE}.engine:torch_engine", words="plain torch, in this package", continuous=True, continues=True,
        tells_support=True, copies=(1, 0),
    ),
    Engine(
        name="graphs", make=f"{_HERE}.engine:graphs_engine", words="the same, each decode step a CUDA graph; not yet measured",
        problem=f"{_HERE}.graph_step:graphs_problem", continuous=True, continues=True, tells_support=True,
    ),
    Engine(
        name="vllm", make=f"{_HERE}.vllm_generation:vllm_engine", words="vLLM; needs the extra of that name",
        problem=f"{_HERE}.vllm_build:vllm_problem", continuous=True, serve=f"{_HERE}.vllm_serving:vllm_serving", alone=True,
        coldest=0.01, copies=(1, 1), schedules=True,
    ),
)  # fmt: skip
