"""The documents, their code and their commands, for several test files."""

import re
import subprocess
from pathlib import Path

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
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text_of(document)) if language in languages]


def in_every_document(test):
    """The test of one document as one test of all; those that fail it are named."""

    def of_all():
        wrong = {}
        for document in DOCUMENTS:
            try:
                test(document)
            except Exception as error:  # an assertion's, or of the library that parses commands
                wrong[document] = str(error)
        assert not wrong, "; ".join(f"{document}: {why}" for document, why in wrong.items())

    of_all.__name__, of_all.__doc__ = test.__name__, test.__doc__
    return of_all
