"""Every document says what is true: commands, recipes, links, figures, and the names of functions and tests."""

import ast
import json
import math
import re
import shlex
import subprocess
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


def markdown_files() -> list[str]:
    """Every *.md of the repository: what git tracks or would track; all of them where this is no clone."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.md") if ".venv" not in str(path)]
    return sorted(name for name in found if (ROOT / name).exists())


DOCUMENTS = markdown_files()
#: document -> its greatest number of lines, and of words
LONGEST = {"README.md": (300, 3000), "REPORT.md": (1000, None)}
#: words that only this project would use, or nobody any more
FORBIDDEN = re.compile(
    r"\b(knobs?|mailbox\w*|leash\w*|for want of|lays? over it|price of|anew|(?:nats|seconds) an? )\b", re.IGNORECASE
)
REFERENCE = "rlhf_ray/config/README.md"
OTHERS_OPTIONS = {"--differences", "--node-ip-address", "--temp-dir"}  # of pytest (tests/conftest.py) and `ray start`
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:rlhf_ray|tests)/[\w/]+\.py)(?::([\w.]+))?`")


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text_of(document)) if language in languages]


# -- length and words


@pytest.mark.parametrize("document", LONGEST)
def test_a_document_is_no_longer_than_it_is_read(document):
    text, (lines, words) = text_of(document), LONGEST[document]
    assert len(text.splitlines()) <= lines
    assert words is None or len(text.split()) <= words


@pytest.mark.parametrize("document", DOCUMENTS)
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


# -- the tree, and the order to read the code in


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


def test_what_registers_an_addition_exists():
    import rlhf_ray

    there = {name for name in rlhf_ray.__all__ if name.startswith("register_")}
    named = {
        name for document in DOCUMENTS for name in re.findall(r"`(?:rlhf_ray\.)?(register_\w+)", text_of(document))
    }
    assert not there or named == there


# -- the recipe reference


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


def test_every_benchmark_is_shown():
    shown = {tuple(parse(command)[0]) for command in commands("results/bench/README.md")}
    assert {path[1] for path in shown} == set(typer.main.get_command(app).commands["bench"].commands)


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
            if not words or words == ["--help"]:
                break
            assert words[0] in node.commands, f"rlhf-ray {' '.join(words)}"
            node, words = node.commands[words[0]], words[1:]
        if words == ["--help"]:
            continue
        options = {name for parameter in node.params for name in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}, words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_and_make_targets_that_are_named_exist(document):
    text = FENCE.sub("", text_of(document))
    tree = typer.main.get_command(app)
    leaves = [leaf for node in tree.commands.values() for leaf in getattr(node, "commands", {"": node}).values()]
    options = {name for leaf in leaves for parameter in leaf.params for name in parameter.opts}
    assert set(re.findall(r"`(--[\w-]+)`", text)) <= options | OTHERS_OPTIONS
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *blocks(document, "", "bash", "sh")])
    assert set(re.findall(r"(?:^|&& )make ([a-z][\w-]*)", code, re.MULTILINE)) <= targets


def test_the_readme_begins_with_the_two_commands():
    assert re.findall(r"^make (\w+)", blocks("README.md", "bash")[0], re.MULTILINE) == ["demo", "test"]


@pytest.mark.parametrize("document", DOCUMENTS)
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


# -- recipes, rows, links, names


@pytest.mark.parametrize("document", DOCUMENTS)
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


# -- figures: each is in a file that a run left


NUMBER = re.compile(r"(?<![\w.`])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w`])")


def numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in NUMBER.findall(text)]


def half_a_digit(number: str) -> float:
    """By how much a number as it is written may differ from the one that was measured."""
    digits, _, power = number.partition("e")
    return 0.5 * 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))


def kept_numbers(folder: Path) -> set[tuple[float, float]]:
    """(number, how far from it the measured one may be) of the figures that a folder's runs left.

    JSON has them in full; README.md and figures.txt, which are written from it, have three digits.
    """
    found = set()
    for file in (folder / "README.md", *folder.glob("*.txt")):
        for number in map(float, numbers(file.read_text()) if file.exists() else ()):
            found.add((number, 0.5 * 10.0 ** (math.floor(math.log10(abs(number))) - 2) if number else 0.0))
    for file in (*folder.glob("*.json"), *folder.glob("seed_*/*.json"), *folder.glob("*/seed_*/summary.json")):
        found |= {(float(number), 0.0) for number in numbers(file.read_text())}
    return found


def unbacked(tables: str, folder: Path) -> list[str]:
    """Decimal numbers of the tables that no file of the folder has."""
    kept = kept_numbers(folder)
    cells = [cell for line in tables.splitlines() if line.startswith("|") for cell in line.split("|")[2:]]
    return [
        number for cell in cells for number in numbers(cell)
        if "." in number and not any(abs(float(number) - value) <= half_a_digit(number) + half + 1e-12 for value, half in kept)
    ]  # fmt: skip


def test_figures_of_the_demo_are_those_of_its_runs():
    _, _, rest = text_of("README.md").partition("<!-- results:demo -->")
    block, end, _ = rest.partition("<!-- /results:demo -->")
    figures, _, samples = block.partition("\n| prompt |")
    assert end and unbacked(figures, ROOT / "results/demo") == []
    kept = [json.loads(line) for file in (ROOT / "results/demo").glob("seed_*/samples.jsonl")
            for line in file.read_text().splitlines()]  # fmt: skip
    rows = [
        [cell.strip() for cell in line.split("|")[1:4]] for line in samples.splitlines()[2:] if line.startswith("|")
    ]
    assert len(rows) == 3
    shown = [(row["prompt"], *(f"({row[model]['judge']:.1f}) {row[model]['response']}" for model in ("sft", "ppo")))
             for row in kept]  # fmt: skip
    assert {tuple(row) for row in rows} <= {tuple(" ".join(text.split()) for text in row) for row in shown}
    assert ("(results/demo/curves.png)" in block) == (ROOT / "results/demo/curves.png").exists()


RESULTS = ("imdb", "hh", "arithmetic", "algorithms", "overlap", "curves", "overoptimisation")


@pytest.mark.parametrize("experiment", RESULTS)
def test_figures_of_an_experiment_are_those_of_its_runs(experiment):
    (section,) = re.findall(
        rf"^## {experiment}\n(.*?)(?=^## |\Z)", text_of("results/README.md"), re.MULTILINE | re.DOTALL
    )
    assert len(numbers(section)) > 10
    assert unbacked(section, ROOT / "results" / experiment) == []


def test_a_figure_without_a_run_is_found():
    assert unbacked("| accuracy | 0.564 (0.727 to 0.648) | 44 |\n| | 0.574 |", ROOT / "results/hh") == ["0.574"]


def test_benchmarks_are_those_of_each_machines_table():
    tables = {
        "Intel Xeon, AMX": "xeon/table.md",
        "AMD EPYC, AVX512-BF16": "table.md",
        "AMD EPYC, AVX2": "avx2/table.md",
    }
    found = re.findall(r"^\| (Intel[^|]*|AMD[^|]*) (\|.*\|)$", text_of("results/bench/README.md"), re.MULTILINE)
    rows = [(machine, row) for machine, row in found if "](" not in row]
    assert len(rows) > 30
    for machine, row in rows:
        assert row in text_of(f"results/bench/{tables[machine]}").splitlines(), row


def test_every_paper_that_the_report_cites_has_its_address():
    text = text_of("REPORT.md")
    assert set(re.findall(r"\[(\d{4}\.\d{5})\](?!:)", text)) == set(re.findall(r"^\[([\d.]+)\]: ", text, re.MULTILINE))


def test_the_report_writes_its_formulas_in_pairs_of_dollars():
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", text_of("REPORT.md")))
    assert text.count("$$") % 2 == 0
    inline = text.replace("$$", "")
    for paragraph in inline.split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph[:80]
