"""README.md and REPORT.md say what is true: commands, recipes, links, and the names of functions and tests."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

from rlhf_ray.cli.main import app
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.config.reference import main, reference, write_between_markers
from rlhf_ray.data.formats import FORMS
from rlhf_ray.errors import UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "REPORT.md", "cluster/README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:rlhf_ray|tests)/[\w/]+\.py)(?::([\w.]+))?`")


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text_of(document)) if language in languages]


# -- the recipe reference


def test_the_recipe_reference_is_up_to_date():
    text = text_of("README.md")
    assert write_between_markers(text, reference(), "README.md") == text, (
        "run: python -m rlhf_ray.config.reference --write README.md"
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
        "| `max_minutes` | number > 0, or null | `null` | stop the stage after this many minutes of training, "
        "with what it has |",
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


# -- commands


def commands(document: str) -> list[str]:
    """What follows each `rlhf-ray` in the document's shell blocks, line ends joined, comments gone."""
    found = []
    for block in blocks(document, "", "bash", "sh", "console"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(line.strip(), comments=True) if "rlhf-ray " in line and "|" not in line else []
            for at, word in enumerate(words):
                if word in ("rlhf-ray", ".venv/bin/rlhf-ray"):
                    found.append(shlex.join(words[at + 1 :]))
                    break
    return found


def parse(command: str) -> tuple[list[str], dict]:
    """(command's path, its parameters), as click parses them; raises click's UsageError."""
    node, path, words = typer.main.get_command(app), [], shlex.split(command)
    while hasattr(node, "commands") and words and words[0] in node.commands:
        path.append(words[0])
        node, words = node.commands[words[0]], words[1:]
    if words == ["--help"]:
        return path, {}
    assert not hasattr(node, "commands"), f"rlhf-ray {command}: no such command"
    return path, node.make_context(" ".join(path), words).params


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_exists_with_these_options(document):
    found = commands(document)
    for command in found:
        _, parameters = parse(command)
        for override in parameters.get("overrides") or ():
            known_override(override)
    if document == "README.md":
        shown = {parse(command)[0][0] for command in found if parse(command)[0]}
        assert shown == set(typer.main.get_command(app).commands), "a command is not shown in the README"


def known_override(override: str) -> None:
    """Raises unless the key is one of the recipe's (its value may be a place-holder)."""
    try:
        build_recipe({"name": "any"}, [override], "any")
    except UserError as error:
        assert "unknown key" not in str(error), f"--set {override}: {error}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_named_in_a_sentence_exist(document):
    for words in re.findall(r"`rlhf-ray ([^`]+)`", FENCE.sub("", text_of(document))):
        words = words.split()
        node = typer.main.get_command(app)
        while hasattr(node, "commands"):
            if not words:
                break
            assert words[0] in node.commands, f"rlhf-ray {' '.join(words)}"
            node, words = node.commands[words[0]], words[1:]
        options = {name for parameter in node.params for name in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}, words


def test_options_and_make_targets_named_in_the_readme_exist():
    text = FENCE.sub("", text_of("README.md"))
    tree = typer.main.get_command(app)
    leaves = [leaf for node in tree.commands.values() for leaf in getattr(node, "commands", {"": node}).values()]
    options = {name for leaf in leaves for parameter in leaf.params for name in parameter.opts}
    assert set(re.findall(r"`(--[\w-]+)`", text)) <= options
    targets = set(re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE))
    named = re.findall(r"\bmake ([a-z]+)", "\n".join(blocks("README.md", "bash")))
    assert "demo" in named
    assert set(named) - {"g"} <= targets


def test_commands_that_do_not_exist_are_found():
    with pytest.raises(AssertionError, match="no such command"):
        parse("train demo")
    with pytest.raises(Exception, match="No such option"):
        parse("run demo --steps 3")
    with pytest.raises(Exception, match="Missing"):
        parse("submit demo")
    with pytest.raises(AssertionError, match="unknown key"):
        known_override("ppo.kl_coeff=1")


# -- recipes, rows, links, names


def test_the_readmes_recipes_are_valid():
    recipes = [yaml.safe_load(block) for block in blocks("README.md", "yaml")]
    assert len(recipes) >= 6
    for values in recipes:
        build_recipe(values, [], "README.md")


def test_the_readmes_rows_have_columns_that_a_role_takes():
    rows = [yaml.safe_load(line) for block in blocks("README.md", "json") for line in block.splitlines()]
    assert len(rows) >= 12
    forms = [form for role in FORMS.values() for form in role]
    for row in rows:
        assert any(set(form.needs) <= set(row) <= {*form.needs, *form.may} for form in forms), row


def anchors(markdown: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document):
    text = FENCE.sub("", text_of(document))
    for target in LINK.findall(re.sub(r"`[^`]*`", "", text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = ((ROOT / document).parent / name).resolve() if name else ROOT / document
        assert file.exists(), f"{document}: {target}"
        assert file.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(file.read_text()), f"{document}: {target}"


@cache
def names_in(file: Path) -> set[str]:
    """Functions, classes, Class.method and constants that a module defines."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_that_is_named_is_there(document):
    named = NAMED.findall(text_of(document))
    missing = [f"{file}:{name}" for file, name in named
               if not (ROOT / file).exists() or name and name not in names_in(ROOT / file)]  # fmt: skip
    assert not missing
    if document == "REPORT.md":
        assert len([name for _, name in named if name]) > 60


def test_every_paper_that_the_report_cites_has_its_address():
    text = text_of("REPORT.md")
    assert set(re.findall(r"\[(\d{4}\.\d{5})\](?!:)", text)) == set(re.findall(r"^\[([\d.]+)\]: ", text, re.MULTILINE))


def test_the_report_writes_its_formulas_in_pairs_of_dollars():
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", text_of("REPORT.md")))
    assert text.count("$$") % 2 == 0
    inline = text.replace("$$", "")
    for paragraph in inline.split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph[:80]
