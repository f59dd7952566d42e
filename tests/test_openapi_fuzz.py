"""Schemathesis on the server's own OpenAPI document: whatever it allows, and what it forbids, gets an answer that it describes.

Skipped where Schemathesis is not installed: pip install 'rlhf-ray[fuzz]'.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from paged import paged

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra 'fuzz'")
ALWAYS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
EXAMPLES = 10  # per operation and mode


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """votes_per_minute: no rater is slowed down."""
    with paged(tmp_path_factory.mktemp("fuzz"), votes_per_minute=1_000_000) as one:
        first = one.ask("ann").json()
        one.vote(first["comparison"], "left", "ann")  # there is something to read
        yield one


@pytest.fixture(scope="module")
def document(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


@pytest.mark.parametrize(("mode", "more"), [("POSITIVE", ()), ("NEGATIVE", ("negative_data_rejection",))])
def test_every_request_gets_an_answer_that_the_document_describes(served, document, mode, more):
    from schemathesis.checks import CHECKS

    checks, asked, wrong = CHECKS.get_by_names([*ALWAYS, *more]), [], []
    for found in document.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        def holds(case):
            case.call_and_validate(checks=checks, timeout=60)

        try:
            holds()
        except Unsatisfiable:  # it takes nothing that could be forbidden
            assert operation.method == "get"
            continue
        except (Exception, BaseExceptionGroup) as error:  # its own groups are no Exceptions
            wrong.append(f"{operation.method} {operation.path}: {error} {getattr(error, 'exceptions', '')}")
        asked.append((operation.method.upper(), operation.path))
    assert wrong == [], "\n\n".join(wrong)
    assert {
        ("POST", "/page/votes"), ("POST", "/page/comparisons"), ("POST", "/v1/completions"), ("GET", "/page/results"),
    } <= set(asked)  # fmt: skip
    # And it still answers as before.
    assert served.ask("bob").status_code == 200
