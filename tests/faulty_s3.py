"""A real S3 server on loopback with a proxy before it that fails now and then, as the internet does."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3

BUCKET = "lab"


@dataclass
class Faults:
    """Every so-manieth request fails: ``errors`` with 500, ``throttles`` with 503, ``drops`` by a connection
    that ends in mid-answer, ``slow`` answers after ``delay`` seconds. 0 switches a fault off.

    ``stale``: a listing says for ever what it said when it was first asked for.
    """

    errors: int = 0
    throttles: int = 0
    drops: int = 0
    slow: int = 0
    delay: float = 1.0
    stale: bool = False
    listings: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> str:
        with self._lock:
            self.seen["requests"] += 1
            number = self.seen["requests"]
            for kind in ("errors", "throttles", "drops", "slow"):
                every = getattr(self, kind)
                if every and number % every == 0:
                    self.seen[kind] += 1
                    return kind
        return ""


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    target: tuple[str, int]
    faults: Faults

    def _pass(self) -> None:
        fault = self.faults.next()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault in ("errors", "throttles"):
            code, name = (500, b"InternalError") if fault == "errors" else (503, b"SlowDown")
            self._answer(code, {"Content-Type": "application/xml"}, b"<Error><Code>%s</Code></Error>" % name)
            return
        if fault == "slow":
            time.sleep(self.faults.delay)
        listing = self.command == "GET" and "list-type=" in self.path
        if self.faults.stale and listing and self.path in self.faults.listings:
            self.faults.seen["stale"] += 1
            self._answer(*self.faults.listings[self.path])
            return
        connection = http.client.HTTPConnection(*self.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, body or None, headers)
        answer = connection.getresponse()
        data = answer.read()
        found = {n: v for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")}
        connection.close()
        if listing:
            self.faults.listings.setdefault(self.path, (answer.status, found, data))
        if fault == "drops":  # what was asked for is done, but (half of) the answer gets lost
            if self.command == "GET":
                self.send_response(answer.status)
                for name, value in (found | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self._answer(answer.status, found, data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        if self.command != "HEAD":
            headers = {n: v for n, v in headers.items() if n.lower() != "content-length"}
            headers["Content-Length"] = str(len(data))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def faulty_s3() -> Iterator[tuple[str, Faults]]:
    """(endpoint, faults to switch on) of a server with one empty bucket, ``BUCKET``."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    handler = type("Handler", (_Proxy,), {"target": (host, port), "faults": Faults()})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=BUCKET)
    try:
        yield endpoint, handler.faults  # type: ignore[attr-defined]
    finally:
        proxy.shutdown()
        server.stop()
