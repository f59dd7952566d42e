"""The page's HTTP interface on a real server over scripted models: who may vote on what, once, and what is refused."""

import base64
import gzip
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx
import jsonschema
import pytest
import yaml
from fastapi import FastAPI
from paged import PROMPTS, SCRIPT, paged
from tiny import tiny_recipe

from rlhf_ray.data.role_files import write_role
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.serving.page.options import PageOptions
from rlhf_ray.serving.page.prompt_list import common_ending, read_prompts
from rlhf_ray.serving.page.raters import ApiError, RateLimit
from rlhf_ray.serving.page.vote_results import MOST_READERS, Results
from rlhf_ray.votes.invitations import invite, revoke
from rlhf_ray.votes.reading import read_judgements


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with paged(tmp_path_factory.mktemp("page"), votes_per_minute=1000) as one:
        yield one


def error(answer):
    return answer.status_code, answer.json()["error"]["code"]


# -- comparisons


def test_a_comparison_is_blind_and_its_sides_are_random(tmp_path):
    with paged(tmp_path, votes_per_minute=1000, votes_per_comparison=1) as served:
        first = []
        for place in range(24):
            answer = served.ask(f"rater {place}", fresh=True)
            told = answer.json()
            assert set(told) == {"comparison", "prompt", "left", "right", "vote"} and set(told["left"]) == {"text"}
            assert not {"sft", "ppo"} & set(json.dumps([told, dict(answer.headers)]).replace('"', " ").split())
            sides = [side for side in ("left", "right") if told[side]["text"] in SCRIPT["ppo"].values()]
            assert len(sides) == 1
            first += sides
    assert 3 <= first.count("left") <= 21  # outside by chance once in 20,000


def test_two_tabs_and_a_reload_show_the_same(served):
    first = served.ask("tabs").json()
    assert served.ask("tabs").json() == first
    assert served.send("GET", f"/page/comparisons/{first['comparison']}?rater=tabs").json() == first
    other = served.ask("tabs", skip=[first["comparison"]]).json()
    assert other["comparison"] != first["comparison"]


def test_what_a_rater_has_judged_is_never_shown_again(tmp_path):
    with paged(tmp_path) as served:
        seen = []
        for _ in range(6):
            seen.append(served.ask().json()["comparison"])
            assert served.vote(seen[-1]).status_code == 200
        assert len(set(seen)) == 6
        assert served.ask("bob").json()["comparison"] == seen[0]  # a second opinion, the oldest first


def test_a_persons_own_prompt_goes_to_both_models_and_is_stored_with_the_draw(served):
    told = served.ask("own", prompt="Tell me of the piano, please.\r\nNow.", temperature=0.5, max_tokens=8).json()
    assert told["prompt"] == [{"role": "user", "content": "Tell me of the piano, please.\nNow."}]
    stored = served.store.comparison(told["comparison"])
    assert {stored.a.model, stored.b.model} == {"sft", "ppo"} and stored.a.version == "1"
    assert stored.a.sampling == {"temperature": 0.5, "max_tokens": 8} and stored.a.seed != stored.b.seed
    assert all(
        SCRIPT[each.model]["piano"].startswith(each.text) and len(each.text) > 3 for each in (stored.a, stored.b)
    )


def test_models_without_a_chat_template_get_texts_that_end_as_the_lists_do(tmp_path):
    with paged(tmp_path, chat=False, prompts=[f"{each}\n" for each in PROMPTS]) as served:
        assert served.ask(prompt="Roses or piano?").json()["prompt"] == "Roses or piano?\n"
        assert served.ask("bob", fresh=True).json()["prompt"] in [f"{each}\n" for each in PROMPTS]
        chat = {"model": "ppo", "messages": [{"role": "user", "content": "And the piano"}]}
        answer = served.send("POST", "/page/chat", json=chat)
        chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == SCRIPT["ppo"]["piano"]


def test_the_runs_own_prompts_are_asked_in_the_form_that_it_trained_on(tmp_path):
    """A chat template would write a second line break after one that ends with a line break already."""
    asked = [f"{each}\n" for each in PROMPTS]
    write_role(RunFolder(tmp_path), "prompts", [{"prompt": each} for each in asked], ("prompt",))
    with paged(tmp_path, prompts=None) as served:
        told = served.ask().json()
        assert told["prompt"] in asked and told["left"]["text"] in [*SCRIPT["sft"].values(), *SCRIPT["ppo"].values()]
        assert served.ask("bob", prompt="And roses?").json()["prompt"] == [{"role": "user", "content": "And roses?"}]


def test_answers_of_a_run_are_as_long_as_its_training_lets_them_be(tmp_path):
    def longest(rater, **body):
        stored = served.store.comparison(served.ask(rater, fresh=True, **body).json()["comparison"])
        return {stored.a.sampling["max_tokens"], stored.b.sampling["max_tokens"]}

    recipe = tiny_recipe(generation={"max_new_tokens": 10})
    RunFolder(tmp_path).recipe.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    with paged(tmp_path) as served:
        assert longest("ann") == {10} and longest("ann", max_tokens=9) == {9}
    RunFolder(tmp_path).recipe.write_text("of: another version")
    with paged(tmp_path) as served:
        assert longest("bob") == {256}


def test_one_model_is_compared_with_itself(tmp_path):
    with paged(tmp_path, names=("ppo",), prompts=["Hello"]) as served:
        told = served.ask().json()
        assert told["left"]["text"] != told["right"]["text"]  # drawn again where both were the same
        stored = served.store.comparison(told["comparison"])
        assert stored.a.model == stored.b.model == "ppo" and stored.a.seed != stored.b.seed


def test_one_model_with_a_canary_is_compared_by_its_versions(tmp_path):
    """Each draw is one of the stable version and one of the canary, blind; votes and results tell the two apart."""
    with paged(tmp_path, names=("ppo",), canary=("stable1", "canary2"), votes_per_minute=1000, votes_per_comparison=1) as served:
        names = [each["name"] for each in served.send("GET", "/page/about").json()["models"]]
        assert names == ["ppo", "ppo@stable1", "ppo@canary2"]
        first = []
        for place in range(12):
            told = served.ask(f"rater {place}", fresh=True).json()
            assert not {"stable1", "canary2"} & set(json.dumps(told).replace('"', " ").split())
            better = next(side for side in ("left", "right") if told[side]["text"] in SCRIPT["ppo"].values())
            first.append(better)
            wrote = served.vote(told["comparison"], better, f"rater {place}").json()
            other = "left" if better == "right" else "right"
            assert [wrote[side] for side in (better, other)] == [
                {"model": "ppo", "version": "canary2"}, {"model": "ppo", "version": "stable1"},
            ]  # fmt: skip
        assert 1 <= first.count("left") <= 11
        (met,) = served.send("GET", "/page/results").json()["versions"]["win_rates"]
        assert {met["of"], met["against"]} == {"ppo@canary2", "ppo@stable1"} and met["votes"] == 12
        assert met["win_rate"]["mean"] == (1.0 if met["of"] == "ppo@canary2" else 0.0)
        # By name: two draws of one version, in comparison, chat and playground.
        same = served.ask("one", models=["ppo@stable1", "ppo@stable1"]).json()
        assert {same[side]["text"] for side in ("left", "right")} <= set(SCRIPT["sft"].values())
        talk = {"model": "ppo@stable1", "messages": [{"role": "user", "content": "And the piano?"}]}
        assert "stable1" in served.send("POST", "/page/chat", json=talk).text
        two = {"prompt": "roses", "models": ["ppo@stable1", "ppo@canary2"], "max_tokens": 500}
        drawn = served.send("POST", "/page/playground", json=two).json()
        assert [(each["version"], each["text"]) for each in drawn["answers"]] == [
            ("stable1", SCRIPT["sft"]["roses"]), ("canary2", SCRIPT["ppo"]["roses"]),
        ]  # fmt: skip
        assert error(served.ask("one", models=["ppo@gone", "ppo"])) == (404, "model_not_found")


def test_a_model_that_is_down_makes_no_comparison(tmp_path):
    with paged(tmp_path) as served:
        served.links[1].up = False
        answer = served.ask(models=["sft", "ppo"])
        assert answer.status_code == 404 and "'ppo' is not served now" in answer.json()["error"]["message"]
        served.links[0].up = False
        assert error(served.ask()) == (503, "unavailable")
        assert served.store.unjudged("bob", most_votes=9) is None


# -- votes


def test_a_vote_counts_once_and_tells_who_wrote_what(served):
    told = served.ask("once").json()
    first = served.vote(
        told["comparison"], "left", "once", rating=4, reason="true", edit_of="right", edit="Better.", flag="x"
    )
    again = served.vote(
        told["comparison"], "left", "once", rating=4, reason="true", edit_of="right", edit="Better.", flag="x"
    )
    assert first.json()["new"] and not again.json()["new"] and again.json() == first.json() | {"new": False}
    writer = "ppo" if told["left"]["text"] in SCRIPT["ppo"].values() else "sft"
    assert first.json()["left"] == {"model": writer, "version": "1"}
    assert error(served.vote(told["comparison"], "right", "once")) == (409, "vote_refused")
    changed = served.vote(told["comparison"], "tie", "once", replace=True)
    assert (changed.json()["new"], changed.json()["choice"]) == (True, "tie")
    there = served.send("GET", f"/page/comparisons/{told['comparison']}?rater=once").json()
    assert there["vote"]["choice"] == "tie" and there["left"] == told["left"]
    assert error(served.vote(told["comparison"], "left", "stranger")) == (409, "vote_refused")
    assert error(served.vote("0" * 32, "left", "once")) == (404, "unknown_comparison")


def test_forty_clicks_at_once_are_one_vote(served):
    comparison = served.ask("clicks").json()["comparison"]
    answers = []
    threads = [
        threading.Thread(
            target=lambda key=key: answers.append(served.vote(comparison, "right", "clicks", f"k{key % 2}").json())
        )
        for key in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each["new"] for each in answers) == 1 and len(answers) == 40
    assert sum(each.vote.rater == "clicks" for each in read_judgements(served.store.database)) == 1


def test_results_are_what_the_command_prints_and_votes_can_be_read_again(tmp_path):
    from rlhf_ray.votes.reading import Filters
    from rlhf_ray.votes.summary import summary

    with paged(tmp_path) as served:
        for rater in ("ann", "bob"):
            for _ in range(3):
                told = served.ask(rater).json()
                better = "left" if told["left"]["text"] in SCRIPT["ppo"].values() else "right"
                served.vote(told["comparison"], better, rater)
        found = served.send("GET", "/page/results").json()
        assert found["versions"]["overall"]["ppo@1"]["votes"] == 6
        assert found["versions"]["overall"]["ppo@1"]["win_rate"]["mean"] == 1.0
        assert found["agreement"]["comparisons_with_two_raters"] == 3 and sum(found["by_day"].values()) == 6
        assert found == json.loads(json.dumps(summary(read_judgements(served.store.database), Filters(), 0.1)))
        assert served.send("GET", "/page/results?rater=ann").json()["votes"] == 3
        page = served.send("GET", "/page/votes?limit=4").json()
        rest = served.send("GET", f"/page/votes?limit=4&before={page['next']}").json()
        assert (len(page["votes"]), len(rest["votes"]), rest["next"]) == (4, 2, None)
        assert served.send("GET", "/page/votes?limit=6").json() == {"votes": page["votes"] + rest["votes"], "next": None}
        assert {each["left"]["model"] for each in page["votes"]} <= {"sft", "ppo"} and page["votes"][0][
            "rater"
        ] == "bob"
        served.vote(page["votes"][0]["comparison"], "both_bad", "bob", replace=True)
        assert served.send("GET", "/page/results").json()["choices"]["both_bad"] == 1  # not the figures of before


# -- who may


def test_who_was_invited_votes_by_token_alone(tmp_path):
    with paged(tmp_path) as served:
        token = invite(served.store.database, "ann")
        assert error(served.ask("ann")) == (401, "invalid_rater")
        comparison = served.ask(rater=None, token=token).json()["comparison"]
        assert served.vote(comparison, rater=None, token=token).json()["new"]
        assert [each.vote.rater for each in read_judgements(served.store.database)] == ["ann"]
        assert served.send("GET", "/page/about", token).json()["rater"] == "ann"
        assert served.ask("bob").status_code == 200 and error(served.ask(rater=None)) == (
            400,
            "missing_required_parameter",
        )
        revoke(served.store.database, "ann")
        for one in (served.ask(rater=None, token=token), served.ask("ann"), served.send("GET", "/page/about", token)):
            assert error(one) == (401, "invalid_rater")


def test_where_a_key_is_required_the_page_asks_for_key_or_token(tmp_path):
    with paged(tmp_path, api_key="secret") as served:
        token = invite(served.store.database, "ann")
        assert served.send("GET", "/").status_code == 200  # it asks
        chat = {"json": {"model": "ppo", "messages": [{"role": "user", "content": "piano"}]}}
        for method, path, more in (
            ("GET", "/page/about", {}), ("GET", "/page/results", {}), ("GET", "/page/votes", {}), ("POST", "/page/chat", chat),
            ("POST", "/page/comparisons", {"json": {"rater": "bob"}}),
            ("POST", "/page/votes", {"json": {"rater": "bob", "comparison": "c", "key": "k", "choice": "left"}}),
            ("POST", "/page/playground", {"json": {"prompt": "x", "models": ["ppo"]}}),
            ("GET", "/page/comparisons/c?rater=bob", {}),
        ):  # fmt: skip
            assert served.send(method, path, **more).status_code == 401, path
            assert served.send(method, path, "wrong", **more).status_code == 401, path
            assert served.send(method, path, token, **more).status_code in (200, 404), path
        assert served.ask("bob", "secret").status_code == 200 and served.ask("ann", "secret").status_code == 401
        assert served.send("GET", "/v1/models", token).status_code == 401  # a rater's token opens the page alone
        assert served.send("GET", "/openapi.json").status_code == 401


def test_a_rater_is_slowed_down_and_others_are_not(tmp_path):
    with paged(tmp_path, votes_per_minute=3) as served:
        for limit in (served.page.routes.voting, served.page.routes.asking):
            limit._clock = lambda: 100.0  # however slow the machine is
        comparison = served.ask().json()["comparison"]
        answers = [served.vote(comparison) for _ in range(5)]
        assert [each.status_code for each in answers] == [200] * 3 + [429] * 2
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        other = served.ask("bob").json()["comparison"]
        assert served.vote(other, rater="bob").status_code == 200
        assert [served.ask().status_code for _ in range(3)] == [200, 200, 429]


def test_a_bucket_fills_evenly():
    now = [0.0]
    limit = RateLimit(60, clock=lambda: now[0])
    for _ in range(60):
        limit.take("ann")
    with pytest.raises(ApiError) as refused:
        limit.take("ann")
    assert refused.value.headers == {"Retry-After": "1"}
    now[0] = 2.0  # two of sixty a minute
    limit.take("ann")
    limit.take("ann")
    with pytest.raises(ApiError):
        limit.take("ann")
    now[0] = 1e6
    for _ in range(60):
        limit.take("ann")  # never more than a minute's
    with pytest.raises(ApiError):
        limit.take("ann")


# -- what is refused


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://["}, {"Origin": ""},
])  # fmt: skip
def test_another_sites_page_can_not_act_for_a_rater(served, headers):
    body = {"rater": "csrf"}
    assert error(served.send("POST", "/page/comparisons", json=body, headers=headers)) == (403, "cross_site")
    own = {"Origin": served.url, "Sec-Fetch-Site": "same-origin"}
    assert served.send("POST", "/page/comparisons", json=body, headers=own).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a form may send without being asked
        answer = served.send("POST", "/page/comparisons", content=json.dumps(body), headers={"Content-Type": kind})
        assert answer.status_code == 415


def test_another_hosts_name_is_refused(served):
    assert error(served.send("GET", "/", headers={"Host": "evil.example"})) == (403, "invalid_host")


@pytest.mark.parametrize("body, param", [
    ({"prompt": "x" * 20_001}, "prompt"), ({"prompt": "a\0b"}, "prompt"), ({"prompt": "a\x1b[31mb"}, "prompt"),
    ({"prompt": " \n "}, "prompt"), ({"prompt": ""}, "prompt"), ({"rater": "a\u202eb"}, "rater"), ({"rater": "a\u200bb"}, "rater"),
    ({"rater": "x" * 101}, "rater"), ({"rater": " "}, "rater"), ({"rater": 3}, "rater"), ({"models": ["ppo"]}, "models"),
    ({"models": ["ppo", "x"]}, None), ({"temperature": 9}, "temperature"), ({"skip": ["x"] * 101}, "skip"), ({"what": 1}, "what"),
    ({"max_tokens": 0}, "max_tokens"),
])  # fmt: skip
def test_comparisons_that_make_no_sense_are_refused_in_words(served, body, param):
    answer = served.send("POST", "/page/comparisons", json={"rater": "odd"} | body)
    told = answer.json()["error"]
    assert (
        answer.status_code in (400, 404)
        and told["message"]
        and (told["param"] or "").partition("[")[0] == (param or "")
    ), told


@pytest.mark.parametrize("body", [
    {"choice": "up"}, {"rating": 6}, {"rating": 0}, {"rating": True}, {"reason": "a\x07"}, {"reason": "x" * 2001}, {"seconds": -1},
    {"edit": "x"}, {"edit_of": "left"}, {"edit_of": "top", "edit": "x"}, {"key": ""}, {"key": "a b"}, {"comparison": "\n"},
    {"edit_of": "left", "edit": "x" * 20_001}, {"flag": ""},
])  # fmt: skip
def test_votes_that_make_no_sense_are_refused(served, body):
    comparison = served.ask("odd votes").json()["comparison"]
    whole = {"rater": "odd votes", "comparison": comparison, "key": "k", "choice": "left"} | body
    answer = served.send("POST", "/page/votes", json=whole)
    assert answer.status_code in (400, 409) and answer.json()["error"]["message"]
    assert not [each for each in read_judgements(served.store.database) if each.vote.rater == "odd votes"]


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"rater": "\\ud800"}', b'{"rater": NaN}',
    b'{"temperature": 1e999, "rater": "a"}'
])  # fmt: skip
def test_bodies_that_are_no_json_are_refused(served, content):
    for path in ("/page/comparisons", "/page/votes", "/page/chat", "/page/playground"):
        answer = served.send("POST", path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused(served):
    answer = served.send("POST", "/page/votes", content=b"x" * (2 << 20), headers={"Content-Type": "application/json"})
    assert error(answer) == (413, "request_too_large")


def token(code):
    """A place in the list of votes, with a character that no database holds."""
    return base64.urlsafe_b64encode(f'[1, "\\u{code}", "ann"]'.encode()).decode()


@pytest.mark.parametrize(
    "query",
    ["since=x", "limit=0", "limit=999", "before=x", "before=W10=", f"before={token('d800')}", f"before={token('0000')}",
     "until=2026-13-01", "rater=%00", "since=2026-11-02&until=2026-11-01",
     "since=1e-126", "since=0", "since=2026-11-02T00:00"],
)  # fmt: skip
def test_queries_that_make_no_sense_are_refused(served, query):
    for path in ("votes", "results") if "since" in query else ("votes",):
        answer = served.send("GET", f"/page/{path}?{query}")
        assert answer.status_code == 400 and answer.json()["error"]["param"]


def test_what_is_not_there_is_not_there(served):
    for path in (
        "/page/",
        "/page/../app.py",
        "/page/%2e%2e/build.py",
        "/page/index.html",
        "/page/votes/x",
        "/page/style.css/",
    ):
        assert served.send("GET", path).status_code == 404, path
    assert served.send("POST", "/", json={}).status_code in (404, 405)


# -- what is served


def test_files_come_with_a_strict_policy(served):
    for path, kind in (("/", "text/html"), ("/page/main.js", "text/javascript"), ("/page/style.css", "text/css")):
        answer = served.send("GET", path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
    html = served.send("GET", "/").text
    assert "http://" not in html and "https://" not in html and "style=" not in html and "onclick" not in html


def test_no_script_makes_markup_of_text():
    from importlib import resources

    folder = resources.files("rlhf_ray.serving.page") / "static"
    for file in folder.iterdir():
        text = file.read_text()
        assert len(text.splitlines()) < 300, file.name
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "https://",
        ):
            assert word not in text, f"{file.name}: {word}"


def test_the_document_describes_the_pages_interface(served):
    document = served.send("GET", "/openapi.json").json()
    for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    posts = [
        path for path, operations in document["paths"].items() if path.startswith("/page/") and "post" in operations
    ]
    assert posts == ["/page/chat", "/page/comparisons", "/page/votes", "/page/playground"]
    schemas = document["components"]["schemas"]
    for path, name in (("/page/votes", "VoteRequest"), ("/page/comparisons", "ComparisonRequest")):
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference == f"#/components/schemas/{name}"
    for path in ("/page/chat", "/v1/completions", "/v1/chat/completions"):  # what streams, says so
        assert "text/event-stream" in document["paths"][path]["post"]["responses"]["200"]["content"]
    told = served.ask("schema").json()
    whole = {"$ref": "#/components/schemas/ShownComparison", "components": {"schemas": schemas}}
    jsonschema.validate(told, whole)
    assert "ChatRequest" in schemas and "/v1/completions" in document["paths"]


def test_without_votes_there_is_chat_and_playground(tmp_path):
    with paged(tmp_path, votes=None, prompts=None) as served:
        about = served.send("GET", "/page/about").json()
        assert about["votes"] is False and [each["name"] for each in about["models"]] == ["sft", "ppo"]
        for one in (
            served.ask(),
            served.vote("c"),
            served.send("GET", "/page/results"),
            served.send("GET", "/page/votes"),
        ):
            assert error(one) == (404, "no_votes")


# -- playground


def test_the_playground_tells_log_probs_of_the_very_tokens_under_both_models(served):
    body = {
        "prompt": "piano",
        "models": ["ppo", "sft"],
        "reference": "sft",
        "max_tokens": 6,
        "temperature": 0,
        "seed": 5,
    }
    ppo, sft = served.send("POST", "/page/playground", json=body).json()["answers"]
    assert "".join(token["token"] for token in ppo["tokens"]) == ppo["text"] and len(ppo["tokens"]) == 6
    # The script's log-probs are -0.25 (ppo) and -0.5 (sft) times 1 to 7, in turn.
    steps = [-token["logprob"] / 0.25 for token in ppo["tokens"]]
    assert all(1 <= step <= 7 for step in steps) and (steps[1] - steps[0]) % 7 == 1
    assert [token["reference_logprob"] for token in ppo["tokens"]] == [2 * token["logprob"] for token in ppo["tokens"]]
    assert ppo["kl"] == pytest.approx(0.25 * sum(steps)) and sft["kl"] == 0.0
    assert ppo["logprob"] == pytest.approx(-0.25 * sum(steps)) and ppo["reward"] is None and ppo["seed"] == 5
    assert served.send("POST", "/page/playground", json=body).json()["answers"][0] == ppo


def test_the_playground_tells_the_critics_value_before_each_token(served):
    body = {"prompt": "piano", "models": ["ppo", "sft"], "max_tokens": 6, "temperature": 0}
    ppo, sft = served.send("POST", "/page/playground", json=body).json()["answers"]
    asked = {"model": "ppo", "messages": [{"role": "user", "content": "piano"}], "max_tokens": 1}
    prompt = served.send("POST", "/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"]
    # Before the first token the critic has read the prompt, and one token more before each further one.
    assert [token["value"] for token in ppo["tokens"]] == pytest.approx([(prompt + read) / 10 - 1 for read in range(6)])
    assert not any("value" in token for token in sft["tokens"])  # a model without a critic


def test_the_playground_asks_a_reward_server_and_a_failure_is_no_reward(tmp_path):
    import socket

    from rlhf_ray.serving.http_limits import HttpLimits
    from rlhf_ray.serving.http_server import HttpServer

    app, asked = FastAPI(), []

    @app.post("/get_reward")
    def reward(body: dict):
        asked.append(body)
        return {"rewards": [1.5]}

    bound = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(app, bound, HttpLimits())
    server.start()
    body = {"prompt": "piano", "models": ["ppo"], "max_tokens": 4}
    with paged(tmp_path, reward_url=f"http://127.0.0.1:{bound.getsockname()[1]}/get_reward") as served:
        (one,) = served.send("POST", "/page/playground", json=body).json()["answers"]
        assert one["reward"] == 1.5 and one["kl"] is None
        assert asked == [{"query": ["user: piano\nassistant:" + one["text"]], "prompts": ["user: piano\nassistant:"]}]
        server.close()
        (one,) = served.send("POST", "/page/playground", json=body).json()["answers"]
        assert one["reward"] is None and "did not answer" in one["reward_error"]


def test_token_ids_are_those_of_the_answer(served):
    body = {"model": "ppo", "max_tokens": 5, "return_token_ids": True}
    chat = served.send(
        "POST", "/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": "piano"}]}
    ).json()
    tokenizer = served.links[0].runners[0].engine.tokenizer
    assert tokenizer.decode(chat["prompt_token_ids"]) == "user: piano\nassistant:"
    assert tokenizer.decode(chat["choices"][0]["token_ids"]) == chat["choices"][0]["message"]["content"]
    two = served.send("POST", "/v1/completions", json=body | {"prompt": ["piano", "roses"], "n": 2}).json()["choices"]
    assert [tokenizer.decode(each["prompt_token_ids"]) for each in two] == ["piano", "piano", "roses", "roses"]
    assert [tokenizer.decode(each["token_ids"]) for each in two] == [each["text"] for each in two]
    refused = served.send("POST", "/v1/completions", json=body | {"prompt": "x", "stream": True})
    assert refused.status_code == 400 and "return_token_ids" in refused.json()["error"]["message"]


# -- prompts and options


def test_prompts_come_from_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("One\n\nTwo \n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "One\\n"}\n{"prompt": [{"role": "user", "content": "Hi"}]}\n')
    assert read_prompts(tmp_path / "a.txt") == ["One", "Two "]
    assert read_prompts(tmp_path / "b.jsonl") == ["One\n", [{"role": "user", "content": "Hi"}]]
    assert common_ending(["One\n", "Two\n"]) == "\n" and common_ending(["One\n", "Two"]) == "" == common_ending([])
    for name, text, told in (
        ("c.jsonl", "{}\n", "c.jsonl', line 1: it has no 'prompt'"),
        ("g.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2: is not JSON"),
        ("d.txt", "\n", "holds no prompts"),
        ("e.jsonl", '{"prompt": 3}', "line 1"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=told):
            read_prompts(tmp_path / name)
    with pytest.raises(UserError, match="can't be read"):
        read_prompts(tmp_path / "none")
    # U+2028 and U+0085 end a line for Python's splitlines alone; Windows' editors begin a file with a mark.
    rows = [{"prompt": "One\u2028and\u0085more"}, {"prompt": "Two"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "h.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "h.txt").write_bytes("\ufeffOne\u2028and\u0085more\r\nTwo\r\n".encode())
    for name in ("h.jsonl", "h.jsonl.gz", "h.txt"):
        assert read_prompts(tmp_path / name) == [row["prompt"] for row in rows], name
    (tmp_path / "i.txt").write_bytes(b"One\ncaf\xe9\n")
    with pytest.raises(UserError, match="i.txt', line 2: byte 0xe9 at place 4 is not UTF-8"):
        read_prompts(tmp_path / "i.txt")
    with pytest.raises(UserError, match="votes_per_minute"):
        PageOptions(votes_per_minute=0)


def test_the_server_says_what_it_can_not_do_before_it_starts(tmp_path):
    from rlhf_ray.serving.page.build import PageParts

    with pytest.raises(UserError, match="there is no folder"):
        PageParts.opened(PageOptions(votes=str(tmp_path / "no" / "votes.db")), tmp_path)


def test_who_votes_does_not_wait_for_those_who_read_results(tmp_path, monkeypatch):
    """Many different summaries are asked for at once, and each takes long."""
    go_on, begun = threading.Event(), threading.Event()

    def slow(results, asked):
        begun.set()
        assert go_on.wait(60)
        return {"until": str(asked.until)}

    monkeypatch.setattr(Results, "summary", slow)
    with paged(tmp_path) as served, ThreadPoolExecutor(40) as pool:
        try:
            reading = [pool.submit(served.send, "GET", f"/page/results?until=2026-11-{10 + day % 20}") for day in range(40)]
            refused = next(as_completed(reading, 60)).result()
            assert refused.status_code == 503 and refused.headers["retry-after"] == "2" and begun.is_set()
            assert served.vote(served.ask().json()["comparison"]).status_code == 200
        finally:
            go_on.set()
        statuses = [one.result().status_code for one in reading]
    assert set(statuses) == {200, 503} and statuses.count(200) >= MOST_READERS


def test_a_client_that_leaves_makes_no_comparison(tmp_path):
    with paged(tmp_path, step_s=0.05) as served:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{served.url}/page/comparisons", json={"rater": "ann"}, timeout=0.5)
        assert served.store.unjudged("bob", most_votes=9) is None
