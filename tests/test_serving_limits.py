"""The HTTP server's limits by raw sockets, on an app of a few lines. No model, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

from rlhf_ray.serving.config import AppConfig, Limits
from rlhf_ray.serving.gate import Gate
from rlhf_ray.serving.guard import guarded
from rlhf_ray.serving.http_limits import HttpLimits
from rlhf_ray.serving.http_server import HttpServer

LIMITS = HttpLimits(header_timeout_s=1.0, keep_alive_s=1.5, linger_s=0.5, write_s=1.0, connections=64)
WHOLE = b"HTTP/1.1 "


async def echo(scope, receive, send):
    """Answers with method, path and size of the body; /slow after a second, /big with more than a client reads."""
    if scope["type"] == "lifespan":
        for done in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{done}.complete"})
        return
    message = await receive()
    if scope["path"] == "/slow":
        await asyncio.sleep(1.0)
    body = f"{scope['method']} {scope['path']} {len(message['body'])}".encode()
    length = [] if scope["path"] == "/big" else [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain"), *length]})
    if scope["path"] == "/big":
        for _ in range(4000):
            await send({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True})
    await send({"type": "http.response.body", "body": body})


def serve(app, limits=LIMITS):
    bound = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(app, bound, limits)
    server.start()
    return server, bound.getsockname()[1]


@pytest.fixture(scope="module")
def port():
    server, port = serve(Gate(echo, api_key=None, max_body_bytes=100_000, body_timeout_s=1.0))
    yield port
    server.close()
    assert not server.alive


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read_all(connection):
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def ask(port, request=b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
    with connect(port) as connection:
        connection.sendall(request)
        return read_all(connection)


def is_error(answer, status):
    """OpenAI's error body, and the connection is over."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    return head.lower()


def healthy(port):
    started = time.monotonic()
    assert ask(port).endswith(b"GET /health 0")
    assert time.monotonic() - started < 1


def test_a_request_is_answered_and_the_connection_kept(port):
    with connect(port) as connection:
        for body in (b"", b"abc"):
            connection.sendall(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            answer = connection.recv(65536)
            while b"POST /a" not in answer:
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200") and b"POST /a %d" % len(body) in answer
            assert b"x-request-id: " in answer


def test_requests_in_one_packet_are_answered_in_order(port):
    requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(5))
    answer = ask(port, requests + b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    places = [answer.index(b"GET /%d 0" % n) for n in range(5)] + [answer.index(b"GET /last 0")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 134_000_000,
        b"GET /" + b"a" * 1_000_000,
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"b" * 500) for n in range(1000)),
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"Y%d:\r\n" % n for n in range(20_000)) + b"\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nT: " + b"a" * 20_000_000,
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: aaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 99_000,
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 20_000_000,
    ],
    ids=["one", "url", "many", "short ones", "trailer", "trailers", "extension"],
)
def test_headers_beyond_64_kilobytes_get_431(port, head):
    answers = []
    with connect(port) as connection:
        reader = threading.Thread(target=lambda: answers.append(read_all(connection)))
        reader.start()
        with contextlib.suppress(ConnectionError):
            connection.sendall(head)
        healthy(port)
        reader.join(20)
    is_error(answers[0], 431)


def test_headers_of_60_kilobytes_are_taken(port):
    answer = ask(port, b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: " + b"a" * 60_000 + b"\r\n\r\n")
    assert answer.endswith(b"GET /x 0")


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ([b"GET / HTTP/1.1\r\n", *[b"X-A: b\r\n"] * 30], 408),  # a line at a time
        ([b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n", *[b"a"] * 30], 408),
        ([b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\na\r\n"] * 30], 408),
        ([b"\r\n"] * 40, None),  # nothing of a request
    ],
    ids=["headers", "body", "chunks", "empty lines"],
)
def test_what_comes_too_slowly_is_ended(port, pieces, status):
    started = time.monotonic()
    with connect(port) as connection:
        connection.settimeout(0.1)
        answer = b""
        for piece in pieces:
            with contextlib.suppress(ConnectionError):
                connection.sendall(piece)
            try:
                part = connection.recv(65536)
                answer += part
                if not part:
                    break
            except TimeoutError:
                pass
            except ConnectionError:
                break
    assert time.monotonic() - started < 2.5
    assert not answer if status is None else is_error(answer, status)


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(port):
    with connect(port) as connection:
        assert connection.recv(10) == b""  # nothing was sent for a second
    with connect(port) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        started = time.monotonic()
        answer = read_all(connection)  # the answer takes a second, and the idle time after it 1.5
        assert b"GET /slow 0" in answer and 2 < time.monotonic() - started < 4


def test_a_client_that_reads_nothing_is_cut(port):
    with connect(port) as connection:
        connection.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(3)
        assert len(read_all(connection)) < 100_000_000
    healthy(port)


def test_half_sent_requests_in_great_number_keep_nobody_out(port):
    held = []
    try:
        for number in range(400):
            connection = connect(port)
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"[: None if number % 2 else 20])
            held.append(connection)
            if number % 40 == 0:
                healthy(port)
        started = time.monotonic()
        answers = [read_all(connection) for connection in held[:320]]  # 64 are open, whose time is not over
        assert time.monotonic() - started < 0.5, "those that came first were closed to make room"
        assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
        healthy(port)
    finally:
        for connection in held:
            connection.close()
    healthy(port)


def test_when_all_connections_are_busy_a_further_one_gets_503():
    server, port = serve(echo, HttpLimits(connections=4))
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(port)) for _ in range(4)]
        for connection in busy:
            connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(0.3)
        for _ in range(6):  # one that is refused has no place that a later one could take
            assert b"retry-after" in is_error(ask(port), 503)
        assert all(b"GET /slow 0" in read_all(connection) for connection in busy)
    server.close()


def test_endless_requests_of_one_connection_are_not_kept():
    """Only so many wait for their turn; the answers to those come, and the connection ends."""
    server, port = serve(echo, HttpLimits(pipelined=3))
    with connect(port) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
        assert read_all(connection).count(b"GET /slow 0") == 3
    server.close()


def test_what_is_no_http_gets_400(port):
    for request in (b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
        is_error(ask(port, request), 400)


# ---- the guard

KEY = "a-key"


@pytest.fixture(scope="module")
def guarded_port():
    config = AppConfig(
        name="m", api_key=KEY, limits=Limits(max_body_bytes=1000), allowed_hosts=("localhost", "model.example"),
        cors_origins=("https://page.example",),
    )  # fmt: skip
    server, port = serve(guarded(echo, config))
    yield port
    server.close()


def with_headers(*headers, method="GET", path="/v1/models"):
    lines = [f"{method} {path} HTTP/1.1", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


BEARER = f"Authorization: Bearer {KEY}"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("Host: localhost", 200), ("Host: LOCALHOST:8000", 200), ("Host: 127.0.0.1:8000", 200), ("Host: [::1]:8000", 200),
        ("Host: model.example", 200), ("Host: evil.example", 403), ("Host: evil.example:8000", 403),
        ("Host: localhost.evil.example", 403), ("Host: 127.0.0.1.nip.io", 403), ("Host: 192.0.2.7", 403), ("Host: ", 403),
        ("Host: localhost\r\nHost: evil.example", 400), ("X: y", 400), ("Host: " + "e" * 5000, 403),
    ],
)  # fmt: skip
def test_only_known_host_names_are_answered(guarded_port, host, status):
    answer = ask(guarded_port, with_headers(host, BEARER))
    assert answer.startswith(WHOLE + str(status).encode())
    if status != 200:
        is_error(answer, status)
        assert len(answer) < 1500, "what was sent is repeated in part only"


def test_head_options_and_pages_of_other_origins(guarded_port):
    head = ask(guarded_port, with_headers("Host: localhost", BEARER, method="HEAD"))
    assert head.startswith(b"HTTP/1.1 200") and head.endswith(b"\r\n\r\n")
    options = ask(guarded_port, with_headers("Host: localhost", method="OPTIONS"))
    assert options.startswith(b"HTTP/1.1 204") and b"allow: GET, HEAD, POST, OPTIONS" in options.replace(b"Allow", b"allow")
    for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
        preflight = ask(
            guarded_port,
            with_headers(
                "Host: localhost", f"Origin: {origin}", "Access-Control-Request-Method: POST",
                "Access-Control-Request-Headers: authorization,content-type", method="OPTIONS",
            ),
        ).lower()  # fmt: skip
        assert (b"access-control-allow-origin: https://page.example" in preflight) == allowed
        asked = ask(guarded_port, with_headers("Host: localhost", BEARER, f"Origin: {origin}")).lower()
        assert (b"access-control-allow-origin" in asked) == allowed


def test_without_the_key_nothing_is_read(guarded_port):
    is_error(ask(guarded_port, with_headers("Host: localhost", "Content-Length: 900", method="POST")), 401)
    answer = ask(guarded_port, with_headers("Host: localhost", path="/health"))
    assert answer.startswith(b"HTTP/1.1 200")
