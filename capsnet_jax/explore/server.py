"""The server of the explorer: the files of its page, and the answers of an `Explorer` as JSON.

It answers only requests that name this machine as host and come from its own page. So no other page, also not one whose
name was made to lead to this machine (DNS rebinding), can use it.
"""

import ipaddress
import json
import socket
import socketserver
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.explore.explorer import Answer, Explorer, Request

MAX_BYTES = 16_000_000  # of a request
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """A server that listens at once, and answers from `serve` on.

    Args:
        host: name or address to listen on.
        port: port; 0 for any free one.

    Raises:
        UsageError: the host is unknown, or the port is used by another program.
    """

    daemon_threads = True
    explorer: Explorer

    def __init__(self, host: str, port: int):
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        pages = [path for path in Path(__file__).with_name("page").iterdir() if path.suffix in TYPES]
        self.files = {f"/{path.name}": (path.read_bytes(), f"{TYPES[path.suffix]}; charset=utf-8") for path in pages}
        self.files["/"] = self.files["/index.html"]
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise UsageError(f"Port {port} of {host} cannot be used: {reason}; expected a free one.") from error

    @property
    def url(self) -> str:
        """Address of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/"

    def serve(self, explorer: Explorer) -> None:
        """Answer requests until `shutdown` is called."""
        self.explorer = explorer
        self.serve_forever()

    def server_bind(self) -> None:
        """Bind without looking up the name of the host, which can take seconds."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print an error in one sentence; a page that was closed is none."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            print(f"capsnet: error: {in_words(error)}.", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    """One connection of a browser."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 600  # seconds without a request
    disable_nagle_algorithm = True  # or small answers would wait for the browser's acknowledgement

    def do_GET(self) -> None:
        """Answer with a file of the page, or with what a page asks first."""
        answers = {"/api/model": Explorer.describe, "/api/images": Explorer.images}
        path = urlsplit(self.path).path
        if not self._is_allowed():
            return
        if path in self.server.files:
            self._send(HTTPStatus.OK, *self.server.files[path])
        elif path in answers:
            self._answer(answers[path], {})
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "There is no such file.")

    def do_POST(self) -> None:
        """Answer a request about an image or a pose."""
        answers = {
            "/api/network": Explorer.describe_network,
            "/api/route": Explorer.route,
            "/api/voters": Explorer.voters,
            "/api/decode": Explorer.decode,
        }
        length = self.headers.get("Content-Length", "")
        if not self._is_allowed():
            return
        if not (length.isascii() and length.isdigit()):
            self.send_error(HTTPStatus.LENGTH_REQUIRED, "The request does not say its length.")
        elif len(length) > len(str(MAX_BYTES)) or int(length) > MAX_BYTES:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The request has more than {MAX_BYTES:,} bytes.")
        elif self.path not in answers:
            self.send_error(HTTPStatus.NOT_FOUND, "There is no such request.")
        else:
            try:
                request = json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError):
                request = None
            if isinstance(request, dict):
                self._answer(answers[self.path], request)
            else:
                self.send_error(HTTPStatus.BAD_REQUEST, "The request is not a JSON object.")

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing about requests."""

    def _is_allowed(self) -> bool:
        """Return whether the request is for this host and from its own page; refuse it if not."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        allowed = is_own(host, self.server.host) and origin in (None, f"http://{host}")
        if not allowed:
            self.send_error(HTTPStatus.FORBIDDEN, "The request is for another host, or from another page.")
        return allowed

    def _answer(self, answer: Callable[[Explorer, Request], Answer], request: Request) -> None:
        try:
            self._send_json(HTTPStatus.OK, answer(self.server.explorer, request))
        except UsageError as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except (RuntimeError, MemoryError) as error:  # of the device, such as out of memory
            self._send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{in_words(error)}."})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error, and close the connection, as the rest of the request may not have been read."""
        self.close_connection = True
        self._send_json(code, {"error": message or HTTPStatus(code).phrase})

    def _send_json(self, code: int, answer: Answer) -> None:
        self._send(code, json.dumps(answer).encode(), "application/json")

    def _send(self, code: int, content: bytes, kind: str) -> None:
        self.send_response_only(code)
        headers = HEADERS | {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def is_own(host: str, own: str) -> bool:
    """Return whether a Host header names the server: as localhost, by the name it listens on, or by an address.

    Names of other machines are foreign, even if they lead to this one. Addresses are safe, as nobody can redirect them.
    """
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    if name in ("localhost", own.lower()):
        return True
    try:
        address = ipaddress.ip_address(name or "")
    except ValueError:
        return False
    return address.is_loopback or not is_loopback(own)


def is_loopback(host: str) -> bool:
    """Return whether a server on this host can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
