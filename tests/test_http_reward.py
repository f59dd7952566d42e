"""Rewards from a server: what is sent, which failures are tried again, and that none of them becomes a score. No torch."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf_ray.config.reward_term import RewardTerm
from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.rewards.http_reward import HttpReward, address_of
from rlhf_ray.tables.rewards import kind_of


class RewardServer:
    """Answers as it was told, one answer after the other; the last one again and again. Keeps what it was sent."""

    def __init__(self, *answers):
        self.answers, self.bodies, self.keys = list(answers), [], []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):  # noqa: N802 - its name
                length = int(self.headers["Content-Length"])
                owner.bodies.append((self.path, json.loads(self.rfile.read(length))))
                owner.keys.append(self.headers.get("Authorization"))
                status, body, *more = owner.answers.pop(0) if len(owner.answers) > 1 else owner.answers[0]
                if status == "hang":
                    time.sleep(body)
                    return
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in more[0].items() if more else ():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


PROMPTS, RESPONSES, ENDED = ["2+2=", "3+3="], ["4", "7"], [True, False]
GOOD = (200, {"rewards": [1.5, -2.0]})


def score(*urls, retries=5, timeout_s=60.0, columns=None, key=None):
    """-> scores, pauses"""
    pauses = []
    scorer = HttpReward(urls, timeout_s=timeout_s, retries=retries, key=key, sleep=pauses.append)
    return scorer.score(PROMPTS, RESPONSES, ENDED, columns or {}).total.tolist(), pauses


def test_the_request_is_openrlhfs_and_the_rewards_are_the_scores():
    with RewardServer(GOOD) as server:
        assert score(server.url, columns={"label": ["4", None], "other": [1, 2]}, key="secret") == ([1.5, -2.0], [])
    ((path, body),) = server.bodies
    assert path == "/get_reward" and server.keys == ["Bearer secret"]
    assert body == {
        "query": ["2+2=4", "3+3=7"], "prompts": PROMPTS, "labels": ["4", ""], "ended": [True, False],
    }  # fmt: skip


@pytest.mark.parametrize(
    "failure",
    [(500, {}), (503, b"<html>"), (429, {}), (408, {}), (200, b"<html>"), (200, {"reward": [1, 2]}), (200, [1, 2]), (200, b"")],
)
def test_a_failure_is_tried_again_and_is_no_score(failure):
    with RewardServer(failure, failure, GOOD) as server:
        assert score(server.url) == ([1.5, -2.0], [0.5, 1.0])
    assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]


def test_the_run_stops_with_the_cause_after_the_last_try():
    with RewardServer((500, b"out of memory")) as server, pytest.raises(RunFailed, match=r"3 tries .*500: out of memory"):
        score(server.url, retries=2)
    assert len(server.bodies) == 3


def test_a_server_that_is_not_there_and_one_that_hangs():
    with pytest.raises(RunFailed, match="ConnectError"):
        score(free_address(), retries=1)
    with RewardServer(("hang", 30.0), GOOD) as server:
        assert score(server.url, timeout_s=5) == ([1.5, -2.0], [0.5])


def test_addresses_have_their_turns_and_a_dead_one_costs_no_pause():
    with RewardServer((200, {"rewards": [1, 1]})) as one, RewardServer((200, {"rewards": [2, 2]})) as two:
        scorer = HttpReward([one.url, two.url], timeout_s=60, retries=5)
        totals = [scorer.score(PROMPTS, RESPONSES, ENDED).total.tolist() for _ in range(4)]
        assert totals == [[1, 1], [2, 2], [1, 1], [2, 2]]
        assert score(free_address(), two.url) == ([2.0, 2.0], [])


def test_pauses_double_up_to_a_limit_and_a_server_may_ask_for_more():
    failures = [(503, {})] * 8
    with RewardServer(*failures, GOOD) as server:
        assert score(server.url, retries=8)[1] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    with RewardServer((503, {}, {"Retry-After": "7"}), GOOD) as server:
        assert score(server.url)[1] == [7.0]


def test_a_refusal_is_not_tried_again():
    with RewardServer((422, b"no field 'queries'")) as server, pytest.raises(UserError, match="status 422: no field"):
        score(server.url)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([1.0], "1 numbers for 2 responses"), ([1.0, None], "None"), ("ab", "one number"), ([[1.0], [2.0]], "one number"),
        ([1.0, float("nan")], "3\\+3="), ([float("inf"), 1.0], "2\\+2="), ([1e39, 1.0], "2\\+2="),
    ],
)  # fmt: skip
def test_rewards_that_are_no_finite_numbers_stop_the_run(rewards, words):
    with RewardServer((200, {"rewards": rewards})) as server, pytest.raises(UserError, match=words):
        score(server.url)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://a:5000", "http://a:5000/get_reward"), ("http://a:5000/", "http://a:5000/get_reward"),
        ("https://a/other", "https://a/other"),
    ],
)  # fmt: skip
def test_the_protocols_path_is_added(given, address):
    assert address_of(given) == address


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"url": "a:5000"}, "no address"), ({"url": []}, "neither function and model"),
        ({"url": "http://user:pw@a"}, "without user and password"),
        ({"url": "http://a", "function": "m:f"}, "one of the three"), ({"url": "http://a", "kind": "x"}, "kind"),
        ({"url": "http://a", "timeout_s": 1.0, "timeout_score": 0.0}, "gives no score"),
    ],
)  # fmt: skip
def test_terms_that_are_refused(term, words):
    with pytest.raises(ValueError, match=words):
        RewardTerm(**term)


def test_a_term_with_url_is_of_the_kind_http_and_asks_for_labels():
    term = RewardTerm(url=["http://a", "http://b:1"], timeout_s=3)
    assert kind_of(term).name == "http" and kind_of(term).asked(term).among(["label", "x"]) == ("label",)
