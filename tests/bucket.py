"""A bucket on this machine: Google's protocol by gcp-storage-emulator, and a proxy that fails.

Both run in threads of one process of their own, because gcsfs and the tests block each other else.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

NAME = "selfrag-test"
_FAULTS = ("503", "403", "404", "cut")


def _serve(port: int, proxy_port: int) -> None:
    """Runs the emulator at `port`; at `proxy_port`, a proxy to it with faults on demand.

    POST /fault/KIND/N at the proxy lets the next N requests fail so; N below 0: all of them.
    """
    import http.client
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from gcp_storage_emulator.server import create_server

    fault = {"kind": "", "left": 0}
    lock, forwarding = threading.Lock(), threading.Lock()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.startswith("/fault/"):
                kind, n = self.path.split("/")[2:]
                fault.update(kind=kind, left=int(n))
                return self._reply(200, b"")
            with lock:
                failing = fault["left"] != 0
                fault["left"] -= fault["left"] > 0
            if failing and fault["kind"] == "cut":
                self.close_connection = True
                return self.connection.close()
            if failing:
                return self._reply(int(fault["kind"]), b'{"error": {"message": "on purpose"}}')
            there = http.client.HTTPConnection("127.0.0.1", port)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
            # One at a time: the emulator lists its objects after every write, which fails when
            # another request adds one meanwhile.
            with forwarding:
                there.request(self.command, self.path, body, headers)
                answer = there.getresponse()
                text = answer.read()
            text = text.replace(f":{port}/".encode(), f":{proxy_port}/".encode())
            self._reply(answer.status, text, answer.getheaders())

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

        def _reply(self, status, body, headers=()):
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "date", "server"):
                    self.send_header(name, value.replace(f":{port}/", f":{proxy_port}/"))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    emulator = create_server("127.0.0.1", port, in_memory=True, default_bucket=NAME)
    emulator.start()
    ThreadingHTTPServer(("127.0.0.1", proxy_port), Proxy).serve_forever()


class Bucket:
    def __init__(self, proxy_port: int):
        self._proxy = f"http://127.0.0.1:{proxy_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self._proxy,
            "TENSORSTORE_GCS_HTTP_URL": self._proxy,
            "NO_GCE_CHECK": "true",  # else every request looks for an account of the machine
        }

    def fail(self, kind: str, times: int = -1) -> None:
        """Lets requests fail: with status 503, 403 or 404, or by cutting the connection."""
        assert kind in _FAULTS
        self._ask(f"/fault/{kind}/{times}")

    def recover(self) -> None:
        self._ask("/fault/503/0")

    def _ask(self, path: str) -> None:
        urllib.request.urlopen(urllib.request.Request(self._proxy + path, method="POST")).close()

    def names(self, prefix: str) -> list[str]:
        """The objects whose name begins so, without the prefix."""
        import fsspec

        fs = fsspec.filesystem("gs")
        fs.invalidate_cache()
        found = fs.find(f"{NAME}/{prefix}")
        return sorted(name.removeprefix(f"{NAME}/{prefix}") for name in found)


@contextmanager
def running():
    """Yields a Bucket; the environment variables that lead to it are set within the block."""
    ports = []
    for _ in range(2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            ports.append(s.getsockname()[1])
    command = [sys.executable, __file__, *map(str, ports)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    bucket = Bucket(ports[1])
    before = {name: os.environ.get(name) for name in bucket.environment}
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                bucket.recover()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "no emulator"
                time.sleep(0.05)
        os.environ.update(bucket.environment)
        yield bucket
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
