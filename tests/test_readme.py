"""The documents: their length and words, the tree, links and names."""

import re

import pytest
from documents import DOCUMENTS, LINK, ROOT, blocks, in_every_document, text_of
from test_layers import own_imports

from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.config.reference import main, reference, write_between_markers

#: document -> its greatest number of lines, and of words
LONGEST = {"README.md": (300, 3000), "REPORT.md": (1000, None)}
#: words that only this project would use, or nobody any more
FORBIDDEN = re.compile(
    r"\b(knobs?|mailbox\w*|leash\w*|for want of|lays? over it|price of|anew|(?:nats|seconds) an? )\b", re.IGNORECASE
)
REFERENCE = "rlhf_ray/config/README.md"
#: maths on a PPO step's way whose names say it all: means over a mask, log-probs of logits, differences of log-probs
NO_NEED_TO_READ = {f"algorithms/{name}" for name in ("schedule", "masking", "logprobs", "kl", "off_policy", "finite_values",
                                                      "advantage_estimators", "chunked_head")}  # fmt: skip


@pytest.mark.parametrize("document", LONGEST)
def test_a_document_is_no_longer_than_it_is_read(document):
    text, (lines, words) = text_of(document), LONGEST[document]
    assert len(text.splitlines()) <= lines
    assert words is None or len(text.split()) <= words


@in_every_document
def test_words_are_the_fields(document):
    assert FORBIDDEN.findall(text_of(document)) == []


def test_the_readme_links_to_every_document_in_a_package():
    beside = {name for name in DOCUMENTS if re.fullmatch(r"(rlhf_ray|cluster|results)(/\w+)?/README\.md", name)}
    generated = {name for name in beside if name.startswith("results/")} - {
        "results/README.md",
        "results/bench/README.md",
    }
    links = {target.partition("#")[0] for target in LINK.findall(text_of("README.md"))}
    assert beside - generated <= links
    for name in beside - generated:
        assert "README](../" in text_of(name) or "results](../" in text_of(name), f"{name} does not link back"


def test_the_readmes_tree_has_every_package():
    (tree,) = [block for block in blocks("README.md", "") if block.startswith("rlhf_ray/\n")]
    named = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    packages = {path.parent.name for path in (ROOT / "rlhf_ray").glob("*/__init__.py")} | {"recipes"}
    assert named == packages
    order = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    for package in packages - {"recipes"}:
        docstring = (ROOT / f"rlhf_ray/{package}/__init__.py").read_text()
        allowed = set(re.findall(r"\w+", docstring.partition("May import:")[2].partition(".")[0])) & packages
        assert all(order.index(package) < order.index(other) for other in allowed), f"{package} imports {allowed}: not down"


def test_seven_files_explain_a_step():
    files = re.findall(r"^\| \d\. \[([\w/.]+)\]\(([\w/.]+)\)", text_of("README.md"), re.MULTILINE)
    assert [name for name, _ in files][0] == "rlhf_ray/ppo/single_process.py"
    assert len(files) <= 7 and all(name == target and (ROOT / name).exists() for name, target in files)
    # Followed from the first, imports reach all of them, and no maths beside them but what its name says.
    modules = [name.removeprefix("rlhf_ray/").removesuffix(".py") for name, _ in files]
    reached, new = set(), {modules[0]}
    while new:
        reached |= new
        new = {
            other
            for module in new
            for other in own_imports(module)
            if other.startswith("algorithms/") and not other.endswith("__init__") or other in modules
        } - reached
    assert reached - set(modules) == NO_NEED_TO_READ and set(modules) <= reached


def test_what_registers_an_addition_exists():
    import rlhf_ray

    there = {name for name in rlhf_ray.__all__ if name.startswith("register_")}
    named = {
        name for document in DOCUMENTS for name in re.findall(r"`(?:rlhf_ray\.)?(register_\w+)", text_of(document))
    }
    assert not there or named == there


def test_the_recipe_reference_is_up_to_date():
    text = text_of(REFERENCE)
    assert write_between_markers(text, reference(), REFERENCE) == text, (
        f"run: python -m rlhf_ray.config.reference --write {REFERENCE}"
    )


def test_the_reference_has_every_key_of_the_resolved_recipe():
    """Every leaf of a recipe with all sections on, by a walk over values and not over types."""
    section = {"objective": "pairs"}
    recipe = build_recipe({"name": "all", "judge": section, "fluency": {}, "dpo": {}, "ppo": {"adaptive_kl": {}},
                           "data": {"sft": [{"path": "x.jsonl"}]}}, [], "all")  # fmt: skip

    def keys(values) -> set[str]:
        if isinstance(values, dict):
            return set(values) | {key for inner in values.values() for key in keys(inner)}
        return {key for inner in values for key in keys(inner)} if isinstance(values, list) else set()

    shown = set(re.findall(r"^\| `(\w+)` \|", reference(), re.MULTILINE)) | {
        part for title in re.findall(r"^#### (.*)$", reference(), re.MULTILINE) for part in re.findall(r"\w+", title)
    }
    assert keys(recipe.model_dump(mode="json")) - shown == set()


@pytest.mark.parametrize(
    "row",
    [
        "| `kl_coef` | number >= 0 | `0.05` | weight of the per-token KL in the reward (start value if adaptive) |",
        "| `zero_stage` | `0` or `1` or `2` or `3` | `0` | DeepSpeed ZeRO stage |",
        "| `learning_rate` | number > 0 | `0.0001` | peak learning rate of AdamW |",  # the reward model's own default
        "| `max_minutes` | number > 0, or null | `null` | end the training after this many minutes of its steps, over all "
        "resumes, with what it has; starting the workers, reading the data, and saving and measuring the model (eval_rows, "
        "normalise_samples) come on top |",
    ],
)
def test_rows_of_the_reference(row):
    assert row in reference().splitlines()


def test_the_reference_is_written_between_its_markers_only(tmp_path, capsys):
    file = tmp_path / "some.md"
    file.write_text("before\n<!-- recipe-reference -->STALE<!-- /recipe-reference -->\nafter\n")
    assert main(["--write", str(file)]) == 0
    assert file.read_text().startswith("before\n<!-- recipe-reference -->\n\n#### Top level\n")
    assert file.read_text().endswith("<!-- /recipe-reference -->\nafter\n")
    assert "STALE" not in file.read_text()
    file.write_text("no markers")
    assert main(["--write", str(file)]) == 2
    assert "holds no <!-- recipe-reference -->" in capsys.readouterr().err
    assert file.read_text() == "no markers"
