"""Every number of a recipe is finite, wherever it stands and however it gets there."""

import datetime
import json
import math
import os
import selectors
import threading
import typing

import pytest
from crossed import crossed
from pydantic import ValidationError

from rlhf_ray.config import (
    EvaluationConfig,
    GenerationConfig,
    PPOConfig,
    Recipe,
    RewardConfig,
    RewardTerm,
    RoleConfig,
    Section,
    SftConfig,
)
from rlhf_ray.config.base import LONGEST_S, option
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.config.reference import section_places
from rlhf_ray.errors import UserError

# Finite as doubles, but infinite or 0 in the 32 bits in which models compute: struct.pack('f', 1e39) overflows too.
BAD = [math.nan, math.inf, -math.inf, 1e39, -1e39, 1e-46]


def holds(annotation, kind):
    return annotation is kind or any(holds(part, kind) for part in typing.get_args(annotation))


SECTIONS = [Recipe, *section_places(Recipe)]
FLOATS = [(kind, name) for kind in SECTIONS for name, field in kind.model_fields.items() if holds(field.annotation, float)]
ANYTHING = [(kind, name) for kind in SECTIONS for name, field in kind.model_fields.items() if holds(field.annotation, typing.Any)]
ids = lambda pair: f"{pair[0].__name__}.{pair[1]}"  # noqa: E731


def refused_fields(kind, values):
    try:
        kind.model_validate(values)
    except ValidationError as refusal:
        return {error["loc"][0] for error in refusal.errors()}
    return set()


def test_the_walk_finds_the_fields():
    names = {name for _, name in FLOATS}
    assert len(FLOATS) > 50 and {"learning_rate", "kl_coef", "reward_timeout_score", "missing_eos_score", "weight"} <= names
    assert {name for _, name in ANYTHING} == {"builder_args", "options"}


def test_a_number_that_is_not_finite_is_refused_in_every_field():
    """As a number, and as text, which pydantic reads as one."""
    values = [*BAD, *(str(value) for value in BAD if not math.isfinite(value))]
    taken = [(ids((kind, name)), value) for kind, name in FLOATS for value in values
             if name not in refused_fields(kind, {name: value})]  # fmt: skip
    assert taken == []


@pytest.mark.parametrize("kind, name", ANYTHING, ids=map(ids, ANYTHING))
def test_so_is_one_inside_a_mapping_or_a_list(kind, name):
    for value in BAD:
        assert name in refused_fields(kind, {name: {"limits": [1.0, {"high": value}]}}), value


def test_a_plug_ins_section_inherits_that():
    class Mine(Section):
        scale: float = option(1.0, "a number")
        scales: tuple[float, ...] = option((), "several")

    for value in BAD:
        assert refused_fields(Mine, {"scale": value}) == {"scale"}
        assert refused_fields(Mine, {"scales": (1.0, value)}) == {"scales"}
    assert Mine(scale=-3e38, scales=(0.0, 2e-38)).scale == -3e38


@crossed(
    "text, key", ["nan", ".nan", "inf", "-.inf", ".inf", "1e39", "1e-50", "1e400"],
    ["ppo.kl_coef", "ppo.missing_eos_score", "sft.learning_rate", "ppo.rewards.a.weight"],
)  # fmt: skip
def test_overrides_are_no_way_around(key, text):
    values = {"name": "x", "ppo": {"rewards": {"a": {"function": "m:f"}}}}
    with pytest.raises(UserError) as refusal:
        build_recipe(values, [f"{key}={text}"], "x")
    assert key in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_sentence_has_key_value_and_remedy():
    with pytest.raises(UserError) as refusal:
        build_recipe({"name": "x", "ppo": {"kl_coef": 1e39}}, [], "x")
    assert str(refusal.value) == (
        "ppo.kl_coef: 1e+39 is 0 or not finite as a 32-bit float, in which models compute; give 0, or a number between "
        "1.2e-38 and 3.4e+38 in size"
    )
    with pytest.raises(UserError, match="^'ppo.learning_rate' is nan: input should be a finite number$"):
        build_recipe({"name": "x", "ppo": {"learning_rate": math.nan}}, [], "x")


def test_a_whole_number_of_any_size_is_looked_at_too():
    assert refused_fields(Recipe, {"name": "x", "seed": 10**60}) == {"seed"}


def test_every_default_is_finite():
    json.dumps(Recipe(name="x").model_dump(mode="json"), allow_nan=False)


# -- numbers that are finite and can't be all the same ------------------------------------------------------------------

NUMBERS = [(kind, name) for kind in SECTIONS for name, field in kind.model_fields.items()
           if (holds(field.annotation, int) or holds(field.annotation, float)) and not holds(field.annotation, bool)]  # fmt: skip


def test_true_is_no_number():
    """YAML reads yes and on as true, and Python takes that for 1."""

    def taken(kind, name):
        many = holds(kind.model_fields[name].annotation, tuple)
        return name not in refused_fields(kind, {name: [0, True] if many else True})

    assert [ids(pair) for pair in NUMBERS if taken(*pair)] == []


def test_true_is_what_switches_and_choices_take():
    recipe = build_recipe(
        {"name": "r", "sft": {"packing": True}, "ppo": {"accept_weak_reward": True}, "tracking": {"tensorboard": False}}, [], ""
    )
    assert recipe.sft.packing is True and recipe.ppo.accept_weak_reward is True and recipe.tracking.tensorboard is False
    with pytest.raises(UserError, match=r"^ppo.steps: true and false are no numbers; give a number$"):
        build_recipe({"name": "r"}, ["ppo.steps=yes"], "r.yaml")


def test_the_longest_wait_is_one_that_waits_take():
    """Python raises OverflowError for a longer one, wherever it comes to wait."""
    resources = Recipe(name="r", resources={"start_timeout_s": LONGEST_S, "call_timeout_s": LONGEST_S}).resources
    (reading, writing), known = os.pipe(), threading.Event()
    os.write(writing, b".")
    known.set()
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        for seconds in (resources.start_timeout_s, resources.call_timeout_s):
            assert datetime.timedelta(seconds=seconds) and known.wait(seconds) and selector.select(seconds)
        for over in (lambda seconds: datetime.timedelta(seconds=seconds), threading.Event().wait, selector.select):
            with pytest.raises(OverflowError):
                over(1e30)
    os.close(reading), os.close(writing)
    for kind, name in ((type(resources), "start_timeout_s"), (PPOConfig, "reward_timeout_s"), (RewardTerm, "timeout_s")):
        assert name in refused_fields(kind, {name: 1e30})


def test_a_share_that_ray_can_not_reserve_is_refused():
    from ray._common.ray_option_utils import _validate_resource_quantity as problem

    for kind, name in ((RoleConfig, "cpus"), (RoleConfig, "gpus"), (SftConfig, "cpus_per_worker"), (SftConfig, "gpus_per_worker")):
        for share in (1e-4, 0.3, 1.0):
            assert problem("num_cpus", share) is None and kind.model_validate({name: share})
        assert problem("num_cpus", 9e-5) is not None and refused_fields(kind, {name: 9e-5}) == {name}


@pytest.mark.parametrize(
    ("kind", "name", "most"),
    [(GenerationConfig, "top_k", 2**31 - 1), (EvaluationConfig, "bootstrap", 100_000), (RoleConfig, "threads", 1024),
     (SftConfig, "threads", 1024), (RoleConfig, "actors", 10_000), (RewardConfig, "normalise_samples", 1_000_000)],
)  # fmt: skip
def test_counts_end_where_memory_and_machines_do(kind, name, most):
    assert kind.model_validate({name: most})
    assert refused_fields(kind, {name: most + 1}) == {name}
