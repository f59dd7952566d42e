"""A benchmark that is ended ends the server that it has started."""

import signal
import subprocess
import sys

import pytest
from processes import alive, wait_for

from rlhf_ray.bench.served_process import free_port

ANSWERS = """
import http.server
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", {port}), Answers).serve_forever()
"""
STARTS = """
import time
time.sleep(60)
"""
BENCHMARK = """
import sys, time
from rlhf_ray.bench.served_process import ServedProcess
class Told(ServedProcess):
    def _wait(self):
        print(self.pid, flush=True)
        super()._wait()
with Told([sys.executable, "-c", {server!r}], {port}):
    print("it answers", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("answers", [True, False])
def test_a_server_ends_with_the_benchmark(answers):
    """Also where the benchmark ends while the server starts."""
    port = free_port()
    script = BENCHMARK.format(server=ANSWERS.format(port=port) if answers else STARTS, port=port)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as benchmark:
        server = int(benchmark.stdout.readline())
        assert not answers or benchmark.stdout.readline() == "it answers\n"
        assert alive(server)
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(30) == 128 + signal.SIGTERM
    wait_for(lambda: not alive(server))
