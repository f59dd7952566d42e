"""A benchmark that is ended ends the server that it has started."""

import signal
import subprocess
import sys

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
BENCHMARK = """
import sys, time
from rlhf_ray.bench.served_process import ServedProcess
with ServedProcess([sys.executable, "-c", {server!r}], {port}) as served:
    print(served.pid, flush=True)
    time.sleep(60)
"""


def test_a_server_ends_with_the_benchmark():
    port = free_port()
    script = BENCHMARK.format(server=ANSWERS.format(port=port), port=port)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as benchmark:
        server = int(benchmark.stdout.readline())
        assert alive(server)
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(30) == 128 + signal.SIGTERM
    wait_for(lambda: not alive(server))
