"""A TCP proxy before an HTTP server that fails on demand: killed, cut off in the middle, slow, or answering with an error."""

import contextlib
import re
import socket
import threading
import time

PART = 65536
UPLOAD = re.compile(rb"(?:PUT|POST) (\S+) HTTP/1\.1\r\n(.*?)\r\n\r\n", re.DOTALL)


class FaultyProxy:
    """At `url`. Faults count from when they are set; connections that are open meet them too.

    cut_after: bytes towards the server, then every connection ends and none is taken until `mend`
    bytes_per_s: towards the server
    errors: so many requests get this status instead of the server's answer, a connection each
    meet: of (what, part of a name): the next upload to such a name meets it, and `met` notes which that was. "die": all connections
        end in the middle of it, and the next BACK_AFTER are refused; "slow": it goes at SLOW bytes per second; "error": it and the
        next ERRORS get `status`
    """

    BACK_AFTER, SLOW, ERRORS = 4, 200_000, 3

    def __init__(self, port):
        self._target = port
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._open = set()
        self.mend()
        self.refused, self.met = 0, []
        threading.Thread(target=self._accept, daemon=True).start()

    def mend(self):
        with self._lock:
            self.cut_after, self.bytes_per_s, self.errors, self.status = None, None, 0, 503
            self.cut_answer_after = None
            self.dead, self.back_after = False, None
            self.meet, self.slow_bytes = [], None

    def kill(self):
        self.dead = True
        with self._lock:
            connections, self._open = self._open, set()
        for each in connections:
            _shut(each)

    def close(self):
        self.kill()
        _shut(self._listening)  # closed alone, it would go on waiting for a connection

    def _accept(self):
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self.dead:
                self.refused += 1
                _shut(client)
                if self.back_after is not None:
                    self.back_after -= 1
                    if self.back_after == 0:
                        self.dead, self.back_after, self.cut_after = False, None, None
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with self._lock:
            fails = self.errors > 0
            self.errors -= fails
        if fails:
            client.recv(PART)
            self._answer_with_error(client)
            return
        server = socket.create_connection(("127.0.0.1", self._target))
        with self._lock:
            self._open |= {client, server}
        threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()
        self._pump(client, server, True)

    def _answer_with_error(self, client):
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        head = f"HTTP/1.1 {self.status} Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.refused += 1
        _shut(client)

    def _pump(self, source, target, towards_server):
        try:
            while part := source.recv(PART):
                if towards_server and self._meets(part) == "error":
                    self._answer_with_error(source)
                    return
                if towards_server and self.bytes_per_s is not None:
                    time.sleep(len(part) / self.bytes_per_s)
                if self._cuts(len(part), towards_server):
                    target.sendall(part[: len(part) // 2])
                    self.kill()
                    return
                target.sendall(part)
        except OSError:
            pass
        finally:
            _shut(source)
            _shut(target)

    def _meets(self, part):
        """What the upload that begins with this part meets, if anything does. Of one that is slow: until all of it has gone."""
        with self._lock:
            if self.slow_bytes is not None:
                self.slow_bytes -= len(part)
                if self.slow_bytes <= 0:
                    self.slow_bytes, self.bytes_per_s = None, None
            found = UPLOAD.match(part)
            faults = [each for each in self.meet if found is not None and each[1] in found[1].decode()]
            if found is None or not faults:
                return None
            self.meet.remove(faults[0])
            what = faults[0][0]
            self.met.append(found[1].decode())
            length = re.search(rb"content-length: *(\d+)", found[2], re.IGNORECASE)
            size = len(found[0]) + (int(length[1]) if length else 0)
            if what == "die":
                self.cut_after, self.back_after = max(size // 2, 1), self.BACK_AFTER
            elif what == "slow":
                self.slow_bytes, self.bytes_per_s = size, self.SLOW
            else:
                self.errors = self.ERRORS
            return what

    def _cuts(self, count, towards_server):
        name = "cut_after" if towards_server else "cut_answer_after"
        with self._lock:
            left = getattr(self, name)
            if left is None:
                return False
            setattr(self, name, left - count)
            return left <= count


def _shut(connection):
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
