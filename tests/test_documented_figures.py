"""Each figure of the documents is in a file that a run left."""

import json
import math
import re
from pathlib import Path

import pytest
from documents import FENCE, ROOT, text_of

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
    assert end and unbacked(block, ROOT / "results/demo") == []
    _, _, rest = text_of("results/README.md").partition("<!-- samples:demo -->")
    samples, end, _ = rest.partition("<!-- /samples:demo -->")
    assert end
    kept = [json.loads(line) for file in (ROOT / "results/demo").glob("seed_*/samples.jsonl")
            for line in file.read_text().splitlines()]  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in samples.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3
    shown = [(row["prompt"], *(f"({row[model]['judge']:.1f}) {row[model]['response']}" for model in ("sft", "ppo")))
             for row in kept]  # fmt: skip
    assert {tuple(row) for row in rows} <= {tuple(" ".join(text.split()) for text in row) for row in shown}
    assert ("(results/demo/curves.png)" in block) == (ROOT / "results/demo/curves.png").exists()


RULES_FOLLOWED = {  # line of the table -> run, model
    "the model as published": ("smollm2-instructions-no-sft", "sft"),
    "GRPO alone, 60 steps": ("smollm2-instructions-no-sft", "ppo"),
    "SFT": ("smollm2-instructions", "sft"), "SFT, then GRPO": ("smollm2-instructions", "ppo"),
}  # fmt: skip
KINDS_OF_RULES = ("judge", "trait/trained_kinds", "trait/held_out_kinds", "trait/all_rules")


@pytest.mark.parametrize(("document", "lines"), [("README.md", 3), ("results/README.md", 4)])
def test_figures_of_rules_followed_are_those_of_their_runs(document, lines):
    (table,) = re.findall(r"^\| share of rules followed.*?(?=^$)", text_of(document), re.MULTILINE | re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == lines
    for model, *cells in rows:
        run, key = RULES_FOLLOWED[model]
        figures = json.loads((ROOT / "results" / run / "seed_0/summary.json").read_text())[key]
        expected = [figures[kind] for kind in KINDS_OF_RULES[: len(cells)]]
        assert cells == [f"{each['mean']:.3f} ({each['low']:.3f} to {each['high']:.3f})" for each in expected]


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


def test_the_readme_says_what_the_installation_takes():
    """Of the list of wheels: the environment with the CPU build, the same with CUDA's in its place, and CUDA's wheels."""
    kept = text_of("results/install/torch_wheels.txt")
    (mib,) = re.findall(r"^environment: `du -sm .venv`.*: (\d+) \(MiB", kept, re.MULTILINE)
    wheels = re.findall(r"^(CUDA|CPU) +(\d+) +(\d+) \S+\.whl$", kept, re.MULTILINE)
    packed, unpacked = ({kind: sum(int(one[place]) for one in wheels if one[0] == kind) / 1e9 for kind in ("CUDA", "CPU")}
                        for place in (1, 2))  # fmt: skip
    with_cpu = int(mib) * 2**20 / 1e9
    told = re.findall(r"Both first install into `.venv/`: (.*?), which pip", text_of("README.md"), re.DOTALL)
    said = re.findall(r"(\d+\.\d) GB", told[0])
    with_cuda = with_cpu + unpacked["CUDA"] - unpacked["CPU"]
    assert said == [f"{size:.1f}" for size in (with_cpu, packed["CPU"], with_cuda, packed["CUDA"])]


@pytest.mark.parametrize("document", ["README.md", "results/README.md"])
def test_the_seconds_of_the_demo_are_those_of_its_runs(document):
    took = [sum(json.loads(file.read_text()).values()) for file in (ROOT / "results/demo").glob("seed_*/timings.json")]
    (said,) = re.findall(r"stages(?: of the three seeds)? took (\d+) to (\d+) s", text_of(document))
    assert len(took) == 3 and said == (f"{min(took):.0f}", f"{max(took):.0f}")


def test_kept_results_name_no_folder_of_the_machine_that_made_them():
    kept = [path for path in (ROOT / "results").rglob("*") if path.suffix in (".json", ".jsonl", ".md", ".txt", ".html", ".yaml")]
    place = re.compile(r"(?<![\w.:/])/(?:home|root|work|Users|mnt|srv|opt)/\S+")
    found = {f"{path.relative_to(ROOT)}: {here[0]}" for path in kept if (here := place.search(path.read_text()))}
    assert len(kept) > 50 and not found
