"""Habits that can be counted, over the whole package: short functions, types in place of getattr, few broad `except`."""

import ast
from functools import cache
from pathlib import Path

import rlhf_ray

ROOT = Path(rlhf_ray.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LONGEST_FUNCTION = 75  # lines
MOST_ATTRIBUTE_CALLS = 0.5  # getattr and hasattr, per 1,000 lines
BOUNDARY = "fault boundary"


@cache
def lines_of(path):
    return path.read_text().splitlines()


@cache
def nodes_of(path):
    return list(ast.walk(ast.parse(path.read_text())))


def where(path, node):
    return f"{path.relative_to(ROOT.parent)}:{node.lineno}"


def comment_at(lines, number):
    """The comment of line `number` (from 1), and those that stand alone in the lines above it."""
    _, mark, found = lines[number - 1].partition("  # ")
    above = number - 2
    while above >= 0 and lines[above].strip().startswith("#"):
        found, mark = f"{lines[above].strip()} {found}", "#"
        above -= 1
    return found if mark else ""


def attribute_calls(path):
    return [
        node
        for node in nodes_of(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    ]


def broad_handlers(path):
    return [
        node
        for node in nodes_of(path)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
    ]


def long_functions(path, longest):
    functions = [node for node in nodes_of(path) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [node for node in functions if node.end_lineno - node.lineno + 1 > longest]


def test_functions_are_short():
    assert not [f"{where(path, node)} {node.name}" for path in FILES for node in long_functions(path, LONGEST_FUNCTION)]


def test_getattr_and_hasattr_are_rare():
    calls = [where(path, node) for path in FILES for node in attribute_calls(path)]
    lines = sum(len(lines_of(path)) for path in FILES)
    assert len(calls) / lines * 1000 <= MOST_ATTRIBUTE_CALLS, "\n".join(calls)


def test_each_getattr_and_hasattr_has_its_reason():
    silent = [where(path, node) for path in FILES for node in attribute_calls(path)
              if not comment_at(lines_of(path), node.lineno)]  # fmt: skip
    assert not silent, "a type would do, or a comment says why not: " + ", ".join(silent)


def test_a_broad_except_names_its_fault_boundary():
    silent = [where(path, node) for path in FILES for node in broad_handlers(path)
              if BOUNDARY not in comment_at(lines_of(path), node.lineno)]  # fmt: skip
    assert not silent, f"a comment beside or above each says '{BOUNDARY}: which, and what it protects': {silent}"


SAMPLE = """
def long():
    a = 1
    return a
try:
    getattr(long, "name")
    # some modules have none
    hasattr(long, "name")
except Exception:
    pass
except (OSError, ValueError):
    pass
"""


def test_the_tests_see_what_they_must_refuse(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE)
    assert [node.lineno for node in attribute_calls(path)] == [6, 8]
    assert [bool(comment_at(lines_of(path), number)) for number in (6, 8)] == [False, True]
    assert [node.lineno for node in broad_handlers(path)] == [9]
    assert [node.name for node in long_functions(path, 2)] == ["long"] and not long_functions(path, 3)


