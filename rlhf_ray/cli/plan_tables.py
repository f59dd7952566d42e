"""The plan of a run in tables: processes, the memory of each in parts, and what that makes per GPU and per node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from rlhf_ray.actors.layout import layout_words
from rlhf_ray.actors.memory_plan import Phase, Share
from rlhf_ray.actors.nodes import Node
from rlhf_ray.actors.placement import altogether
from rlhf_ray.config import Recipe
from rlhf_ray.config.run_names import names_of
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.models.planned_process import GB, PlannedProcess
from rlhf_ray.models.size import parameters
from rlhf_ray.models.support_memory import support_store_bytes, support_tokens
from rlhf_ray.models.turns import ROLLOUT

#: Column of the table of memory -> the parts of a process in it
COLUMNS = {
    "weights": ("weights", "copies", "shared weights"), "gradients": ("gradients",),
    "optimiser": ("optimiser",), "buffers": ("buckets", "gathered"),
    "16 bit": ("16-bit copies",), "activ.": ("activations", "passing"), "logits": ("logits",), "cache": ("cache",),
    "else": ("sampling sets", "engine"),
}  # fmt: skip


def print_plan(
    recipe: Recipe,
    nodes: Sequence[Node],
    phases: Sequence[Phase],
    threads: tuple[Mapping[str, int], Mapping[str, int]],
    console: Console,
) -> None:
    """threads: of each process of a stage and of a role, where the recipe leaves them open."""
    cluster = altogether([node.amounts for node in nodes])
    console.print(
        f"[bold]{recipe.name}[/]: policy of {parameters(recipe) / 1e6:.1f} M parameters; "
        f"the cluster has {cluster['CPU']:g} CPUs and {cluster['GPU']:g} GPUs"
    )
    names = names_of(recipe.model_dump(mode="json"))
    words = [names.told(STAGES[name].words) if name == "ppo" else STAGES[name].words for name in recipe.stages]
    console.print(f"stages: {', '.join(words)}")
    console.print(_processes(recipe, phases, threads, names.told("PPO")))
    if phases:
        console.print(
            "memory of a process in GB, at most, where it computes; on host: in the host's memory beside that, with the copy of a "
            "checkpoint or of a model that is being written; loads: there, at its start",
            soft_wrap=True,
        )
        console.print(_parts(phases, names.told("PPO")))
        for line in _places(nodes, phases, names.told("PPO")):
            console.print(line, highlight=False, soft_wrap=True)
    for phase in {each.name: each for each in phases}.values():
        for words in layout_words(recipe.ppo_roles if phase.name == "ppo" else {}, phase.layout):
            console.print(f"[yellow]warning[/]: {words}")
    if support := support_tokens(recipe):
        console.print(
            f"truncated sampling: each token of a response is drawn among at most {support} tokens; "
            f"they take at most {support_store_bytes(recipe, support) / GB:.1f} GB more in Ray's object store "
            "(generation.top_k bounds them)"
        )


def _processes(
    recipe: Recipe, phases: Sequence[Phase], threads: tuple[Mapping[str, int], Mapping[str, int]], ppo: str
) -> Table:
    table = _table("stage or role", "processes", "CPUs each", "GPUs each", "threads each", "memory, about")
    needed: dict[tuple[str, str], float] = {}
    for phase in phases:
        for name in phase.processes:
            needed[phase.name, name] = max(needed.get((phase.name, name), 0.0), _memory_of(phase, name))
    for name, stage in recipe.trained.items():
        numbers = f"{stage.cpus_per_worker:g}", f"{stage.gpus_per_worker:g}", str(stage.threads or threads[0][name])
        table.add_row(name, str(stage.workers), *numbers, _told(needed.get((name, name))))
    for phase in phases:
        if phase.name in ("evaluation", "serving"):
            gpus = str(sum(len(seat.gpus) for seat in phase.layout.seats.values()))
            table.add_row(phase.name, "1", "1", gpus, "", _told(needed[phase.name, phase.name]))
    for name, role in recipe.ppo_roles.items():
        numbers = f"{role.cpus:g}", f"{role.gpus:g}", str(role.threads or threads[1][name])
        table.add_row(f"{ppo}: {name}", str(role.actors), *numbers, _told(needed.get(("ppo", name))))
    return table


def _told(size: float | None) -> str:
    return "" if size is None else f"{size / GB:.1f} GB"


def _memory_of(phase: Phase, name: str) -> float:
    """Of all processes of a role or stage together, in the memory that they compute in."""
    places = phase.gpus if phase.processes[name].on_gpu else phase.hosts
    return sum(share.size for shares in places.values() for share in shares if _name(share) == name)


def _name(share: Share) -> str:
    return share.process.rpartition(" ")[0]


def _parts(phases: Sequence[Phase], ppo: str) -> Table:
    rows: list[tuple[str, PlannedProcess]] = []
    for phase in {each.name: each for each in phases}.values():  # of PPO's turns one
        for name, process in phase.processes.items():
            rows.append((f"{ppo}: {name}" if phase.name == "ppo" else name, process))
    parts = [_columns(process) for _, process in rows]
    columns = [column for column in COLUMNS if any(part[column] >= 0.05 * GB for part in parts)]
    table = _table("", *columns, "on host", "loads")
    for (name, process), part in zip(rows, parts, strict=True):
        beside = sum(process.host.values()) + max(process.moments.values(), default=0.0)
        table.add_row(name, *(_gb(part[column]) for column in columns), _gb(beside), _gb(process.loading[1]))
    return table


def _columns(process: PlannedProcess) -> dict[str, float]:
    """Of one process, on the GPU that has the most of it."""
    each = {**process.parts, **{name: process.parts.get(name, 0.0) + size / process.gpus for name, size in process.split.items()}}
    return {column: sum(each.get(part, 0.0) for part in parts) for column, parts in COLUMNS.items()}


def _gb(size: float) -> str:
    return f"{size / GB:.1f}" if size >= 0.05 * GB else "-"


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _places(nodes: Sequence[Node], phases: Sequence[Phase], ppo: str) -> Iterable[str]:
    """A line for all GPUs of a node that hold the same, and one for its memory. Of PPO's later turns: for GPUs that hold something
    else than in the first."""
    before: dict[tuple[str, int, int], str] = {}  # stage, node, GPU
    for phase in phases:
        name = (ppo if phase.name == "ppo" else phase.name) + (f" ({phase.turn})" if phase.turn else "")
        for number, node in enumerate(nodes):
            lines: dict[str, list[int]] = {}
            for (at, gpu), shares in sorted(phase.gpus.items()):
                if at == number:
                    there = node.gpu_memory[gpu] if gpu < len(node.gpu_memory) else None
                    line = _sum(shares, there)
                    if before.setdefault((phase.name, at, gpu), line) != line or phase.turn in (None, ROLLOUT):
                        lines.setdefault(line, []).append(gpu)
            for line, gpus in lines.items():
                yield f"{name}, {node.name}, GPU {_range(gpus)}: {line}"
            if number in phase.hosts:
                yield f"{name}, {node.name}, memory: {_sum(phase.hosts[number], node.memory)}"


def _sum(shares: Sequence[Share], there: float | None) -> str:
    by_name: dict[str, list[float]] = {}
    for share in shares:
        by_name.setdefault(_name(share) if share.process[-1].isdigit() else share.process, []).append(share.size)
    words = " + ".join(f"{name} {_sizes(sizes)}" for name, sizes in by_name.items())
    of = "" if there is None else f" of {there / GB:.1f}"
    return f"{words} = {sum(share.size for share in shares) / GB:.1f}{of} GB"


def _sizes(sizes: Sequence[float]) -> str:
    """Equal ones once: the first of a group may do more than the others."""
    counted = Counter(f"{size / GB:.1f}" for size in sizes)
    return " + ".join(f"{count} x {size}" if count > 1 else size for size, count in counted.items())


def _range(numbers: Sequence[int]) -> str:
    whole = list(range(numbers[0], numbers[-1] + 1)) == list(numbers)
    return f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(map(str, numbers))
