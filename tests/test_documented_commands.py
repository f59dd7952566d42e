"""Commands, recipes and rows in the documents are real ones."""

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml
from command import command_of
from documents import DOCUMENTS, FENCE, LINK, ROOT, blocks, in_every_document, text_of

from rlhf_ray.cli.main import app
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.data.formats import FORMS
from rlhf_ray.errors import UserError

OTHERS_OPTIONS = {"--differences", "--node-ip-address", "--temp-dir"}  # of pytest (tests/conftest.py) and `ray start`
NAMED = re.compile(r"`((?:rlhf_ray|tests)/[\w/]+\.py)(?::([\w.]+))?`")


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
    node, path, words = command_of(app), [], shlex.split(command)
    while hasattr(node, "commands") and words and words[0] in node.commands:
        path.append(words[0])
        node, words = node.commands[words[0]], words[1:]
    if words == ["--help"]:
        return path, {}
    assert not hasattr(node, "commands"), f"rlhf-ray {command}: no such command"
    return path, node.make_context(" ".join(path), words).params


@in_every_document
def test_every_command_exists_with_these_options(document):
    found = commands(document)
    for command in found:
        _, parameters = parse(command)
        for override in parameters.get("overrides") or ():
            known_override(override)
    if document == "README.md":
        shown = {parse(command)[0][0] for command in found if parse(command)[0]}
        assert shown == set(command_of(app).commands), "a command is not shown in the README"


def test_every_benchmark_is_shown():
    shown = {tuple(parse(command)[0]) for command in commands("results/bench/README.md")}
    assert {path[1] for path in shown} == set(command_of(app).commands["bench"].commands)


def known_override(override: str) -> None:
    """Raises unless the key is one of the recipe's (its value may be a place-holder)."""
    try:
        build_recipe({"name": "any"}, [override], "any")
    except UserError as error:
        assert "unknown key" not in str(error), f"--set {override}: {error}"


@in_every_document
def test_commands_named_in_a_sentence_exist(document):
    for words in re.findall(r"`rlhf-ray ([^`]+)`", FENCE.sub("", text_of(document))):
        words = words.split()
        node = command_of(app)
        while hasattr(node, "commands"):
            if not words or words == ["--help"]:
                break
            assert words[0] in node.commands, f"rlhf-ray {' '.join(words)}"
            node, words = node.commands[words[0]], words[1:]
        if words == ["--help"]:
            continue
        options = {name for parameter in node.params for name in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}, words


@in_every_document
def test_options_and_make_targets_that_are_named_exist(document):
    text = FENCE.sub("", text_of(document))
    tree = command_of(app)
    leaves = [leaf for node in tree.commands.values() for leaf in getattr(node, "commands", {"": node}).values()]
    options = {name for leaf in leaves for parameter in leaf.params for name in parameter.opts}
    assert set(re.findall(r"`(--[\w-]+)`", text)) <= options | OTHERS_OPTIONS
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *blocks(document, "", "bash", "sh")])
    assert set(re.findall(r"(?:^|&& )make ([a-z][\w-]*)", code, re.MULTILINE)) <= targets


def test_the_readme_begins_with_the_two_commands():
    assert re.findall(r"^make (\w+)", blocks("README.md", "bash")[0], re.MULTILINE) == ["demo", "test"]


@in_every_document
def test_modules_and_scripts_that_commands_run_exist(document):
    shell = "\n".join(blocks(document, "", "bash", "sh"))
    for module in re.findall(r"python -m (rlhf_ray[\w.]+)", text_of(document)):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), f"{document}: {module}"
    for script in re.findall(r"^((?:results|cluster)/[\w/.-]+\.(?:sh|py))", shell, re.MULTILINE):
        assert (ROOT / script).exists(), f"{document}: {script}"


def test_commands_that_do_not_exist_are_found():
    with pytest.raises(AssertionError, match="no such command"):
        parse("train demo")
    with pytest.raises(Exception, match="No such option"):
        parse("run demo --steps 3")
    with pytest.raises(Exception, match="Missing"):
        parse("submit demo")
    with pytest.raises(AssertionError, match="unknown key"):
        known_override("ppo.kl_coeff=1")


@in_every_document
def test_recipes_are_valid(document):
    for values in map(yaml.safe_load, blocks(document, "yaml")):
        if "plugins" not in values:  # tests/test_extend.py writes the module that they name, and runs the recipe
            build_recipe(values, [], document)


def test_there_are_recipes_to_start_from():
    assert len([block for document in DOCUMENTS for block in blocks(document, "yaml")]) >= 8


def test_rows_have_columns_that_a_role_takes():
    rows = [json.loads(line) for block in blocks("rlhf_ray/data/README.md", "json") for line in block.splitlines()]
    assert len(rows) >= 12
    for row in rows:
        asked_for = {"answer"} if "prompt" in row or "messages" in row else set()  # by a function of one's own
        assert any(
            set(form.needs) <= set(row) <= {*form.needs, *form.may, *(asked_for if role == "prompts" else ())}
            for role, forms in FORMS.items()
            for form in forms
        ), row


def anchors(markdown: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@in_every_document
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


@in_every_document
def test_code_that_is_named_is_there(document):
    named = NAMED.findall(text_of(document))
    missing = [f"{file}:{name}" for file, name in named
               if not (ROOT / file).exists() or name and name not in names_in(ROOT / file)]  # fmt: skip
    assert not missing
    if document == "REPORT.md":
        assert len([name for _, name in named if name]) > 60
