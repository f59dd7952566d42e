"""The cells of `chaos`: which processes die, stop or fail, at which points of which runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Cell:
    name: str
    faults: list[dict]
    sections: dict = field(default_factory=dict)  # of the recipe, laid over the tiny one's
    exact: bool = True  # False: each prompt once, not the same bits
    driver: bool = False  # the driver is a process of its own, started again until it ends well
    hosts: Literal["none", "nodes", "network"] = "none"  # several nodes of Ray in place of one; each in a network of its own
    store: bool = False  # the run folder is in S3, and what is compared is what S3 has in the end
    limit_s: int = 1500


VICTIMS = ("generation", "reward", "reference", "experience", "policy", "critic")
#: Phase -> its points: (role, method, which call of the step, before or after). A step has two chunks, its evaluation two more.
POINTS = {
    "generate": [("generation", "generate", 1, "before"), ("generation", "generate", 2, "after")],
    "score": [("reward", "score", 2, "before"), ("reference", "logprobs", 1, "after")],
    "assemble": [("experience", "assemble", 1, "before"), ("experience", "assemble", 1, "after")],
    "update": [("policy", "update", 1, "before"), ("critic", "update", 1, "after")],
    "sync": [("policy", "weights", 1, "before"), ("generation", "load_weights", 1, "after")],
    "evaluate": [("reward", "score", 3, "before"), ("experience", "evaluate", 1, "after")],
    "checkpoint": [("policy", "save", 1, "before"), ("critic", "save", 1, "after")],
}
#: Phase -> role -> a point in the middle of its work: (method, which call of the step, what has been used by then, how often). A
#: chunk is drawn or scored in part; one optimiser step of four is taken; some weights are packed, copied, saved.
MIDDLES = {
    "generate": {"generation": ("generate", 1, "role.engine.decoder.decode", 3)},
    "score": {
        "reward": ("score", 2, "rlhf_ray.roles.reward.score_answers", 1),
        "reference": ("logprobs", 1, "role.module.forward", 1),
        "policy": ("logprobs", 2, "role.engine.forward", 1),
        "critic": ("values", 1, "role.engine.forward", 1),
    },
    "assemble": {"experience": ("assemble", 1, "rlhf_ray.roles.experience_maker.assemble", 1)},
    "update": {"policy": ("update", 1, "role.engine.step", 1), "critic": ("update", 1, "role.engine.step", 2)},
    "sync": {
        "policy": ("weights", 1, "role.weights", 2),
        "generation": ("load_weights", 1, "rlhf_ray.models.wire.as_tensor", 2),
    },
    "evaluate": {
        "generation": ("generate", 3, "role.engine.decoder.decode", 2),
        "reward": ("score", 4, "rlhf_ray.roles.reward.score_answers", 1),
        "reference": ("logprobs", 3, "role.module.forward", 1),
        "experience": ("evaluate", 1, "rlhf_ray.roles.experience_maker.score_stats", 1),
    },
    "checkpoint": {"policy": ("save", 1, "role.engine.state", 3), "critic": ("save", 1, "role.engine.state", 3)},
}  # fmt: skip
EVERY_STEP = {"eval_every": 1, "checkpoint_every": 1}
CARD = "chaos0"  # of a host; no interface of this machine itself, which a fault may not take down
SIGN = {"kind": "sign", "name": "storage"}
SPREAD = {"placement": "SPREAD"}  # over two hosts
EIGHT_STEPS = {"ppo": EVERY_STEP | {"steps": 8}}
ACROSS = {"hosts": "network", "sections": EIGHT_STEPS | {"resources": SPREAD}}
LINK = {"kind": "link", "interface": CARD, "victim": "policy-0"}
#: what dies outside of the roles -> (of its faults, of its cells)
OUTSIDE = {
    "driver": ({"victim": "driver-0"}, {"driver": True}),
    "worker host": ({"kind": "host", "victim": "policy-0"}, {"hosts": "nodes"}),
    "link away": (LINK | {"seconds": 3}, ACROSS),
    "link down": (LINK, ACROSS),
}
OWN = {"generation": "generate", "reward": "score", "reference": "logprobs", "experience": "assemble",
       "policy": "update", "critic": "update"}  # fmt: skip


def fault(
    role: str, method: str, step: int | None, call: int = 1, when: str = "before", kind: str = "kill", rank: int = 0, **more
) -> dict:
    return {"role": role, "rank": rank, "method": method, "step": step, "call": call, "when": when, "kind": kind, **more}


def middle_faults(phase: str) -> list[dict]:
    """Each role dies once, in the middle of its own work in the phase; one that has none, in the middle of another's."""
    middles = MIDDLES[phase]
    found = []
    for step, victim in enumerate(VICTIMS, start=1):
        at = victim if victim in middles else list(middles)[step % len(middles)]
        method, call, when, times = middles[at]
        found.append(fault(at, method, step, call, when, victim=f"{victim}-0", times=times))
    return found


def single_cells() -> list[Cell]:
    """One role in one phase, "policy x update", and so the driver, a host and a link: what `cells` has as a part of a longer run.
    To look at one that fails, or where there is little time."""
    found = [
        Cell(name=f"{victim} x {phase}", sections={"ppo": EVERY_STEP | {"steps": 4}}, faults=[
            fault(role, method, 1 + place, call, when, victim=f"{victim}-0")
            for place, (role, method, call, when) in enumerate(points)
        ])
        for phase, points in POINTS.items() for victim in VICTIMS
    ]  # fmt: skip
    for phase, ((role, method, call, when), *_) in POINTS.items():
        for name, (more, options) in OUTSIDE.items():
            found.append(Cell(name=f"{name} x {phase}", faults=[fault(role, method, 1, call, when, **more)],
                              **{"sections": EIGHT_STEPS} | options))  # fmt: skip
    return found


def cells() -> list[Cell]:
    found = [
        Cell(name=f"all x {phase}", sections={"ppo": EVERY_STEP | {"steps": 14}}, faults=[
            fault(role, method, 1 + len(points) * number + place, call, when, victim=f"{victim}-0")
            for number, victim in enumerate(VICTIMS) for place, (role, method, call, when) in enumerate(points)
        ])
        for phase, points in POINTS.items()
    ]  # fmt: skip
    found += [
        Cell(name=f"middle of {phase}", sections=EIGHT_STEPS, faults=middle_faults(phase))
        for phase in MIDDLES
    ]  # fmt: skip

    def in_each_phase(**more) -> list[dict]:
        """One fault per phase, each in another step, at the phase's first point."""
        first = enumerate((points[0] for points in POINTS.values()), start=1)
        return [fault(*point[:2], step, *point[2:], **more) for step, point in first]

    for name, (more, options) in OUTSIDE.items():
        found.append(Cell(name=f"{name} x all", limit_s=3000, faults=in_each_phase(**more), **{"sections": EIGHT_STEPS} | options))
    found += [
        Cell(name="link between two ranks down in an update", hosts="network", limit_s=3000,
             sections={"resources": SPREAD | {role: {"actors": 2, "zero_stage": 2} for role in ("policy", "critic")}},
             faults=[fault("policy", "update", 1, when="role.engine.step", kind="link", interface=CARD, rank=1)]),
        Cell(name="S3 dies x all", sections=EIGHT_STEPS, store=True, faults=in_each_phase(**SIGN, do="die")),
        Cell(name="driver and its disk lost, run in S3", sections={"ppo": EVERY_STEP}, store=True, driver=True,
             faults=[fault("policy", "update", 2, victim="driver-0"), fault("critic", "save", 3, victim="driver-0")]),
    ]  # fmt: skip
    found += [
        Cell(name=f"S3 {words} in the middle of an upload", sections=EIGHT_STEPS, store=True, faults=[
            fault("policy", "save", 1, **SIGN, do=do, of="ppo/checkpoints/"),
            fault("critic", "update", 2, **SIGN, do=do, of="ppo/metrics.jsonl"),
            fault("reward", "score", 4, **SIGN, do=do, of="CONTENTS.json"),
            fault("policy", "save", 5, **SIGN, do=do, of="critic-00"),
            fault("policy", "save_model", 8, **SIGN, do=do, of="ppo/model/"),
        ])
        for do, words in (("die", "dies"), ("slow", "slows down"), ("error", "answers errors"))
    ]  # fmt: skip
    for kind, more in (("stop", {}), ("exception", {}), ("slow", {"seconds": 5})):
        found += [
            Cell(name=f"{victim} {kind}", faults=[fault(victim, method, step, kind=kind, **more) for step in (1, 3)])
            for victim, method in OWN.items()
        ]
    two = {"actors": 2}
    for stage in (2, 3):
        group = two | {"zero_stage": stage}
        sections = {"resources": {"policy": group, "critic": group}}
        killed = [("logprobs", 0), ("update", 1), ("weights", 2), ("save", 4)]
        found += [
            Cell(name=f"ZeRO-{stage}, rank 1 of 2 killed", sections=sections,
                 faults=[fault("policy", method, step, rank=1) for method, step in killed]),
            Cell(name=f"ZeRO-{stage}, rank 1 of 2 stopped", sections=sections,
                 faults=[fault("critic", "update", 1, kind="stop", rank=1)]),
        ]  # fmt: skip
    found += [
        Cell(name="two of each stateless role", sections={"resources": {"generation": two, "reward": two, "reference": two}},
             faults=[fault("generation", "generate", 0, 2, rank=1), fault("reward", "score", 1, 1, "after", rank=1),
                     fault("reference", "logprobs", 2)]),
        Cell(name="a late actor of each stateless role",
             sections={"resources": {"generation": two, "reward": two, "reference": two}},
             faults=[fault(victim, OWN[victim], step, kind="slow", rank=1, seconds=60)
                     for victim, step in (("reward", 1), ("reference", 2), ("generation", 3))]),
        Cell(name="LoRA", sections={"ppo": {"lora": {"rank": 2}}},
             faults=[fault("policy", "reference_logprobs", 0, 3), fault("generation", "generate", 1),
                     fault("policy", "update", 3)]),
        Cell(name="DAPO's dynamic sampling",
             sections={"ppo": {"dynamic_sampling_rounds": 2, "samples_per_prompt": 2, "rollout_batch_size": 8}},
             faults=[fault("experience", "zero_variance", 0), fault("generation", "generate", 1, 4),
                     fault("policy", "update", 2)]),
        Cell(name="steps_ahead 1", sections={"ppo": {"steps_ahead": 1}}, exact=False,
             faults=[fault("generation", "generate", 0, 4), fault("policy", "update", 1), fault("reward", "score", 2)]),
        Cell(name="weights by a broadcast", sections={"resources": {"weight_transport": "collective"}},
             faults=[fault("generation", "generate", 0, 4), fault("policy", "update", 1),
                     fault("generation", "receive_weights", 2)]),
        Cell(name="no snapshots", sections={"resources": {"snapshot_gb": 0}},
             faults=[fault("critic", "update", 1), fault("critic", "update", 3)]),
        Cell(name="a snapshot every 3 steps", sections={"resources": {"snapshot_every": 3}, "ppo": {"checkpoint_every": 4}},
             faults=[fault("policy", "update", 2)]),
        Cell(name="policy and critic at once", faults=[fault("policy", "update", 1), fault("critic", "update", 1)]),
        Cell(name="policy and generation at once",  # in this order: the policy can end nobody any more
             faults=[fault("policy", "weights", 1, victim="generation-0"), fault("policy", "weights", 1)]),
        Cell(name="at the start", faults=[fault("policy", "join", None), fault("reward", "ready", None)]),
    ]  # fmt: skip
    return found
