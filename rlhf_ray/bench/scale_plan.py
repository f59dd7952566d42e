"""What the memory plan says of large models on many GPUs: recipes for `bench.scale`, tried from the roomiest to the smallest.

A row's memory is what `rlhf-ray doctor` would print for its recipe on such nodes: the same plan of the same recipe.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_ray.actors.memory_plan import Phase, Precisions, memory_problems, phases_of
from rlhf_ray.actors.nodes import Node, rented_nodes
from rlhf_ray.actors.weight_transport import planned_transport
from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.config import Recipe
from rlhf_ray.models.sent_weights import Transport

#: Llama 2's (Touvron et al. 2023, arXiv 2307.09288)
MODELS = {
    "7B": Shape(layers=32, width=4096, heads=32, vocabulary=32000, feed_forward=11008, gated=True),
    "70B": Shape(layers=80, width=8192, heads=64, key_value_heads=8, vocabulary=32000, feed_forward=28672, gated=True),
}
NODE = 8  # GPUs
SHARED, APART, AHEAD = "shared", "apart", "ahead"
WAYS = {
    SHARED: "all roles on all GPUs, in turns",
    APART: "each role on GPUs of its own: generation, policy and critic a quarter each, reward and reference an eighth each",
    AHEAD: "the same, generation a step ahead of training",
}
#: of the GPUs, apart
PARTS = {"generation": 2 / 8, "policy": 2 / 8, "critic": 2 / 8, "reward": 1 / 8, "reference": 1 / 8}
SPLITS = (1, 2, 4, 8)  # GPUs that hold one generator
ROWS = (512, 256, 128, 64)  # that a generator decodes at a time, at most; as many are a chunk
MICROBATCHES = (16, 4, 1)  # rows of a rank's forward pass, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A recipe's sizes, as they are or would be."""

    way: str  # of WAYS
    count: int  # GPUs
    split: int  # GPUs that hold one generator together
    rows: int  # that a generator decodes at a time: a chunk
    microbatch_rows: int
    offloads: bool  # optimisers of policy and critic are in the host's memory
    transport: Transport = "collective"  # of new weights
    fullest: float = 0.0  # bytes of the GPU that has the most, in a run of PPO
    fullest_in: str = ""  # the turn, where roles take turns

    @property
    def shares(self) -> bool:
        return self.way == SHARED

    @property
    def ahead(self) -> bool:
        return self.way == AHEAD

    @property
    def gpus(self) -> dict[str, int]:
        """Role -> GPUs that it computes on."""
        return {role: self.count if self.shares else round(part * self.count) for role, part in PARTS.items()}

    @property
    def generators(self) -> int:
        return self.gpus["generation"] // self.split


@dataclass(frozen=True, slots=True)
class Misfit:
    words: str  # what does not fit, by the plan


def write_config(folder: Path, shape: Shape) -> None:
    """A model's folder without weights, which is all that a plan reads."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 4096,
        "hidden_size": shape.width, "intermediate_size": shape.feed_forward, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_value_heads or shape.heads,
        "vocab_size": shape.vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def recipe_of(folder: Path, work: Work, plan: Plan) -> Recipe:
    gpus, group = plan.gpus, {"zero_stage": 3, "offload_optimizer": plan.offloads}
    roles = {role: {"actors": gpus[role], "gpus": 1, "cpus": 1} for role in PARTS}
    roles["generation"] |= {"actors": plan.generators, "gpus": plan.split}
    if plan.shares:
        roles = {role: given | {"gpus": 0.2} | ({} if role == "policy" else {"with": "policy"}) for role, given in roles.items()}
    for role in ("policy", "critic"):
        roles[role] |= group
    return Recipe.model_validate({
        "name": "scale",
        "model": {"name_or_path": str(folder)},
        "data": {"max_prompt_tokens": work.prompt},
        "generation": {"engine": "vllm", "max_new_tokens": work.response, "chunk_size": plan.rows,
                       "tensor_parallel": plan.split},
        "ppo": {"rollout_batch_size": work.rows, "minibatch_size": work.rows, "microbatch_size": plan.microbatch_rows,
                "ppo_epochs": work.epochs, "gradient_checkpointing": True, "steps_ahead": int(plan.ahead)},
        "resources": roles,
    })  # fmt: skip


def candidates(work: Work, way: str, count: int) -> Iterator[Plan]:
    """From those that are fastest to those that need least: few GPUs per generator first, offloading last. A split generator shares
    its GPUs with no other role."""
    splits = SPLITS[:1] if way == SHARED else SPLITS
    for offloads, split, rows, microbatch in itertools.product((False, True), splits, ROWS, MICROBATCHES):
        plan = Plan(way=way, count=count, split=split, rows=rows, microbatch_rows=microbatch, offloads=offloads)
        if plan.generators:
            chunk = max(1, min(rows, work.rows // plan.generators))
            yield replace(plan, rows=chunk, microbatch_rows=max(1, min(microbatch, work.rows // plan.gpus["policy"])))


def planned(folder: Path, work: Work, way: str, count: int, kind: str) -> Plan | Misfit:
    """The first candidate that fits count GPUs of this kind, or why the last one does not."""
    nodes = rented_nodes(f"{count // NODE}x{NODE}x{kind}")
    found: Plan | Misfit = Misfit("there is no candidate")
    for _, alike in itertools.groupby(candidates(work, way, count), lambda plan: plan.offloads):
        *larger, least = dict.fromkeys(alike)
        found = examined(folder, work, least, nodes)
        if isinstance(found, Plan):  # else none of its kind does
            each = (examined(folder, work, plan, nodes) for plan in larger)
            return next((plan for plan in each if isinstance(plan, Plan)), found)
    return found


def examined(folder: Path, work: Work, plan: Plan, nodes: Sequence[Node], stage: str = "ppo") -> Plan | Misfit:
    """With what its phases take, if they fit. stage: of the run ("evaluation"), or "serving"."""
    recipe = recipe_of(folder, work, plan)
    phases = phases_of(recipe, nodes, Precisions(stages=dict.fromkeys(recipe.trained, 2)), stages=(stage,))
    told = memory_problems(recipe, nodes, phases)
    if told:
        return Misfit("; ".join(told[0].split("; ")[:-1]))  # without the remedy
    phase, size = fullest(phases)
    return replace(
        plan, fullest=size, fullest_in=phase.turn or "",
        transport=planned_transport(recipe, phases[0].layout) if stage == "ppo" else plan.transport,
    )  # fmt: skip


def fullest(phases: Sequence[Phase]) -> tuple[Phase, float]:
    """Of all phases and GPUs."""
    there = [(phase, sum(share.size for share in shares)) for phase in phases for shares in phase.gpus.values()]
    return max(there, key=lambda each: each[1])
