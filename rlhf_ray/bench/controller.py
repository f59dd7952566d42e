"""`rlhf-ray bench controller`: what the PPO loop itself costs with many generation actors, and whether that stays flat.

Real: the loop, the groups, the waiter, the experience, Ray's calls and its object store. Fake: all other roles, a few
processes that stand for many actors (`fakes`). The yardstick is as many bare Ray calls to the same processes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlhf_ray.bench.flops import SIZES, Work
from rlhf_ray.bench.random_run import bench_recipe
from rlhf_ray.bench.results import hardware, in_brackets, on_hardware, ratios, show, spread
from rlhf_ray.bench.trend import slope
from rlhf_ray.config import Recipe, RoleConfig
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from rlhf_ray.actors.wait import Waiter

THREADS = 32  # calls that one fake process runs at once
SAMPLES = 100  # points in the run at which memory is read
# Share of the steps in which Ray's and Python's pools still fill. The bare calls belong there too: they alone let a process
# grow, so none is made while its memory is watched.
WARM_UP = 0.1
MIN_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """The sizes of the run."""

    generators: int
    processes: int
    rows: int  # of a chunk
    work: Work
    weight_bytes: int
    ranks: int  # of the policy, and of the critic

    @property
    def calls(self) -> int:
        """Calls of one step: five per chunk (draw, score; reference, policy, critic), then the experience, the updates,
        the weights, and their loading."""
        chunks = -(-self.work.rows // self.rows)
        return 5 * chunks + 1 + 2 * self.ranks + self.ranks + self.generators


def measure_controller(crowd: Crowd, *, steps: int) -> dict:
    from rlhf_ray.actors.session import OBJECT_STORE_BYTES, ray_session

    if steps < MIN_STEPS:
        raise UserError(f"--steps {steps} is too few to see a slope; give at least {MIN_STEPS}")
    recipe = bench_recipe(
        SIZES["4m"], crowd.work, microbatch=crowd.work.rows, precision="float32",
        resources={"policy": {"actors": crowd.ranks}, "critic": {"actors": crowd.ranks}},
    )  # fmt: skip
    tokens = crowd.work.rows * (crowd.work.prompt + crowd.work.response)
    store = max(OBJECT_STORE_BYTES, 3 * crowd.weight_bytes + 100 * tokens)
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_bench_") as path, ray_session(None, object_store_bytes=store):
        watch = _run_loop(recipe, crowd, steps, RunFolder(Path(path)))
    return _figures(watch, crowd, steps)


def _run_loop(recipe: Recipe, crowd: Crowd, steps: int, folder: RunFolder) -> Watch:
    import ray

    from rlhf_ray.actors.role_actors import ExperienceActor
    from rlhf_ray.actors.wait import Waiter
    from rlhf_ray.bench.fakes import Fakes
    from rlhf_ray.ppo.loop import LoopHooks, LoopState, PPOLoop

    processes = [
        Fakes.options(num_cpus=0, max_concurrency=THREADS).remote(crowd.work.prompt, crowd.work.response, weight_bytes)
        for weight_bytes in [crowd.weight_bytes] * crowd.processes + [0]
    ]
    experience = ExperienceActor.options(num_cpus=0).remote("experience-0", recipe, folder, RoleConfig(threads=1))
    waiter = Waiter(600, "look at what else runs on this machine")
    waiter.wait([waiter.track(one.nothing.remote(), "pretended actor (start)") for one in processes], "start")
    watch = Watch(processes[:-1], crowd.calls, max(1, steps // SAMPLES), max(2, int(WARM_UP * steps)), waiter)
    hooks = LoopHooks(record=watch.record, samples=_ignore, save=_not_saved, save_best=_ignore)
    every = {"steps": steps, "eval_every": steps + 1, "checkpoint_every": steps + 1, "checkpoint_minutes": 1e6}
    loop = PPOLoop(
        _roles(processes, experience, crowd, waiter), recipe.ppo.model_copy(update=every), hooks, LoopState(kl_coef=0.05),
        prompts=crowd.work.rows, eval_prompts=crowd.rows, chunk_size=crowd.rows, seed=0,
    )  # fmt: skip
    loop.run()
    for actor in (*processes, experience):
        ray.kill(cast(Any, actor))  # Ray annotates a handle as one or the actor's class
    return watch


def _ignore(*args) -> None:
    """A hook that does nothing."""


def _not_saved(*args) -> bool:
    return False


def _roles(processes: list, experience, crowd: Crowd, waiter):
    """The real groups; number i of a role is process i modulo their number. The last process is the policy's other ranks,
    which have no weights to send."""
    from rlhf_ray.actors import groups
    from rlhf_ray.actors.calls import members

    *processes, without_weights = processes

    def actors(role: str, count: int) -> list:
        return members(role, [processes[number % len(processes)] for number in range(count)])

    scorers = max(1, crowd.generators // 8)  # a scorer reads eight chunks in the time in which a generator draws one
    policy = groups.PolicyGroup(members("policy", [processes[0], *[without_weights] * (crowd.ranks - 1)]))
    policy.weight_bytes = crowd.weight_bytes
    return groups.RayRoles(
        groups.GenerationGroup(actors("generation", crowd.generators)),
        groups.RewardGroup(actors("reward", scorers)),
        groups.ReferenceGroup(actors("reference", scorers)),
        policy,
        groups.CriticGroup(actors("critic", crowd.ranks)),
        groups.ExperienceHandle(members("experience", [experience])[0], crowd.ranks, crowd.ranks, 1),
        waiter,
    )


@dataclass(slots=True)
class Watch:
    """Measures this process and the store between steps; the time that this takes is not counted."""

    processes: list
    calls: int
    every: int  # steps between two readings of memory
    warm_up: int  # steps
    waiter: Waiter
    seconds: list[float] = field(default_factory=list)  # of each step
    cpu_s: list[float] = field(default_factory=list)  # this process's, all threads
    pairs: list[tuple[float, float]] = field(default_factory=list)  # (a step, as many bare calls)
    memory: list[tuple[int, int, int, int]] = field(
        default_factory=list
    )  # (step, RSS, store in use, put so far), bytes
    phases: list[dict[str, float]] = field(default_factory=list)
    _cpu: float = 0.0

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if step > 0:
            self.cpu_s.append(time.process_time() - self._cpu)
            self.seconds.append(metrics["time/step_s"] - metrics.get("time/evaluate_s", 0.0))
            self.phases.append({name: value for name, value in metrics.items() if name.startswith("time/")})
            self.waiter.take_totals()
            if step <= self.warm_up:
                self.pairs.append((self.seconds[-1], bare_calls(self.processes, self.calls)))
            elif step % self.every == 0:
                self.memory.append((step, rss_bytes(), *store_bytes()))
        self._cpu = time.process_time()


def bare_calls(processes: list, count: int) -> float:
    """Seconds of `count` empty calls, waited for all together."""
    import ray

    started = time.perf_counter()
    ray.get([processes[number % len(processes)].nothing.remote() for number in range(count)], timeout=600)
    return time.perf_counter() - started


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def store_bytes() -> tuple[int, int]:
    """(in use, put so far) of this node's object store.

    In use may be what a second's steps put: Ray frees in batches, once a second.
    """
    import ray

    from rlhf_ray.actors.ray_private import store_stats

    (node,) = ray.nodes()
    stats = store_stats(node)
    return stats.object_store_bytes_used, stats.cumulative_created_bytes


def _figures(watch: Watch, crowd: Crowd, steps: int) -> dict:
    places, rss, store, put = zip(*watch.memory, strict=True)
    chunks = -(-crowd.work.rows // crowd.rows)
    took, bare = zip(*watch.pairs, strict=True)
    phases = {name: statistics.median(step[name] for step in watch.phases) for name in watch.phases[0]}
    return {
        "chunks_per_s": chunks / statistics.median(watch.seconds),
        "calls_per_s": crowd.calls / statistics.median(watch.seconds),
        "step_s": spread(watch.seconds),
        "cpu_s_per_step": spread(watch.cpu_s),
        "cpu_s_trend": asdict(slope(range(watch.warm_up, steps), watch.cpu_s[watch.warm_up :])),
        "seconds_per_phase": phases,
        "ratio": ratios([1 / each for each in took], [1 / each for each in bare]),
        "rss_bytes": {"first": rss[0], "last": rss[-1], "per_step": asdict(slope(places, rss))},
        "store_bytes": {"first": store[0], "last": store[-1], "per_step": asdict(slope(places, store))},
        "put_bytes_per_step": (put[-1] - put[0]) / (places[-1] - places[0]),
        "work": {"generators": crowd.generators, "processes": crowd.processes, "chunks": chunks, "rows": crowd.rows,
                 "prompt_tokens": crowd.work.prompt, "response_tokens": crowd.work.response, "calls": crowd.calls,
                 "weight_bytes": crowd.weight_bytes, "ranks": crowd.ranks, "steps": steps},
        "hardware": hardware(),
    }  # fmt: skip


def show_controller(result: dict, *, as_json: bool) -> None:
    work = result["work"]

    rows = [
        ("chunks per second", f"{result['chunks_per_s']:,.0f}"),
        ("calls per second", f"{result['calls_per_s']:,.0f}"),
        ("share of bare calls' speed", in_brackets(result["ratio"])),
        ("seconds per step", in_brackets(result["step_s"], 3)),
        ("controller's CPU s per step", in_brackets(result["cpu_s_per_step"], 3)),
        ("MB put into the store per step", f"{result['put_bytes_per_step'] / 1e6:.1f}"),
    ]
    cpu = {part: value * 1e6 for part, value in result["cpu_s_trend"].items()}
    lines = [
        f"controller's CPU time per step: slope {cpu['mean']:+.1f} us per step (95 %: {cpu['low']:+.1f} to {cpu['high']:+.1f})",
        _drift(result["rss_bytes"], "controller's memory (RSS)"),
        _drift(result["store_bytes"], "object store in use between steps"),
        f"{work['generators']} generation actors, simulated by {work['processes']} processes that answer at once; real: loop, "
        f"groups, waits, experience, store. {work['chunks']} chunks of {work['rows']} x ({work['prompt_tokens']} + "
        f"{work['response_tokens']}) tokens and {work['calls']} calls per step, {work['steps']} steps ({on_hardware(result)})",
    ]
    show(result, lines, as_json=as_json, columns=("", "median (least to most)"), rows=rows)


def _drift(found: dict, name: str) -> str:
    each = {part: value / 1e3 for part, value in found["per_step"].items()}
    return (f"{name}: {found['first'] / 1e6:.1f} to {found['last'] / 1e6:.1f} MB, slope {each['mean']:+.1f} kB per step "
            f"(95 %: {each['low']:+.1f} to {each['high']:+.1f})")  # fmt: skip
