"""The proxy of the storage tests: what the next upload of a name meets. A server in a thread stands for S3."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from faulty_proxy import FaultyProxy


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        content = self.rfile.read(length := int(self.headers["Content-Length"]))
        if len(content) < length:  # cut off
            self.close_connection = True
            return
        self.server.stored[self.path] = content
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Nothing to the terminal."""


@pytest.fixture
def proxy():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.stored, server.daemon_threads = {}, True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    between = FaultyProxy(server.server_port)
    between.stored = server.stored
    yield between
    between.close()
    server.shutdown()
    thread.join()
    server.server_close()


def put(proxy, name, content=b"x" * 300_000):
    """The status, or None where the connection ended."""
    connection = http.client.HTTPConnection("127.0.0.1", int(proxy.url.rpartition(":")[2]), timeout=30)
    try:
        connection.request("PUT", name, content)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_it_dies_in_the_middle_of_the_upload_that_is_named_and_comes_back(proxy):
    proxy.meet.append(("die", "model/"))
    assert put(proxy, "/b/metrics") == 200 and put(proxy, "/b/model/weights") is None
    assert proxy.met == ["/b/model/weights"] and set(proxy.stored) == {"/b/metrics"}
    assert [put(proxy, "/b/model/weights") for _ in range(proxy.BACK_AFTER)] == [None] * proxy.BACK_AFTER
    assert put(proxy, "/b/model/weights") == 200 and len(proxy.stored["/b/model/weights"]) == 300_000


def test_it_answers_errors_and_each_fault_waits_for_its_upload(proxy):
    proxy.meet += [("error", "first"), ("error", "second")]
    proxy.ERRORS = 1
    assert [put(proxy, f"/b/{name}", b"") for name in ("second", "other", "other", "first")] == [503, 503, 200, 503]
    assert proxy.met == ["/b/second", "/b/first"]


def test_it_is_slow_for_as_long_as_the_upload_lasts(proxy):
    proxy.meet.append(("slow", "model"))
    proxy.SLOW = 10_000_000
    assert put(proxy, "/b/model") == 200 and len(proxy.stored["/b/model"]) == 300_000
    assert put(proxy, "/b/other") == 200 and proxy.bytes_per_s is None and proxy.met == ["/b/model"]
