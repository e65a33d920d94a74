"""The live page's server, on 127.0.0.1: one page, and what that page asks. Nobody else is answered.

What keeps others out, each by itself:

    the address     only this machine can connect
    a token         every path begins with a random text, which stands only in the address that the reader opens
    Host            it must name this server: a page whose name was made to mean 127.0.0.1 has another Host
    Origin, Sec-Fetch-Site      no page from elsewhere may ask or link
    JSON alone      a form of another page cannot send JSON

A thread of the server takes each connection. It computes nothing: `Work` does, in the thread that runs it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from threading import BoundedSemaphore, Thread
from typing import Any, NoReturn

from mistral_ref.errors import InputError, MistralRefError, checked_int, escaped, short_repr
from mistral_ref.files.json_file import parse_json
from mistral_ref.study.live.session import Session, question_of
from mistral_ref.study.live.work import StaleError, Work
from mistral_ref.study.report import html

_MOST_BYTES = 2**20  # of a question
_MOST_CONNECTIONS = 64  # a browser opens six
_SECONDS = 30  # after which a connection on which nothing comes is closed
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # beside the policy in the page itself
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LiveServer(ThreadingHTTPServer):
    """The server of one session. `url` is the address to open.

    port    0: any that is free

    Raises InputError if the port cannot be had.
    """

    daemon_threads = True
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, session: Session, work: Work, port: int = 0) -> None:
        self.session, self.work = session, work
        self.secret = secrets.token_urlsafe(24)
        self._room = BoundedSemaphore(_MOST_CONNECTIONS)
        port = checked_int("port", port, 0, 65535)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise InputError(f"port {port} cannot be had: {error.strerror}") from None
        self.hosts = tuple(f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost"))
        self.url = f"http://{self.hosts[0]}/{self.secret}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection in a thread of its own, or close it at once if there are too many."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread has begun
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """Say nothing: a connection that broke is its client's business, and closed."""


def serve(session: Session, begun: Callable[[str], None], *, port: int = 0) -> NoReturn:
    """Serve a session until an exception ends it, such as Ctrl-C's; `begun` is called with the address.

    Raises InputError if the port cannot be had.
    """
    work = Work()
    with LiveServer(session, work, port) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            begun(server.url)
            work.run()
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    """One connection. Whatever is not expected is refused in a few words, and the connection closed."""

    protocol_version = "HTTP/1.1"  # connections are kept
    timeout = _SECONDS
    server: LiveServer

    def do_GET(self) -> None:
        """Send the page."""
        if self._may("GET") and self._known(("",)):
            session = self.server.session
            self._send(HTTPStatus.OK, "text/html", html(session.first, live=session.live_entry()))

    def do_POST(self) -> None:
        """Answer a question of the page. What is wrong with a question is an answer too, {"error": in words}."""
        if not (self._may("POST") and self._known(("parts", "tokens", "merges", "place"))):
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or "Transfer-Encoding" in self.headers:
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif not (length.isdecimal() and len(length) < 10):
            self._refuse(HTTPStatus.LENGTH_REQUIRED)
        elif int(length) > _MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                self.close_connection = True  # the client has gone
                return
            self._send(HTTPStatus.OK, "application/json", self._answer(self.path.rpartition("/")[2], body))

    def _answer(self, what: str, body: bytes) -> str:
        """Return the answer to a question as JSON."""
        try:
            return _as_json({"answer": self._answered(what, parse_json(body.decode()))})
        except StaleError:
            return _as_json({"stale": True})
        except MistralRefError as error:
            return _as_json({"error": str(error)})
        except MemoryError:
            return _as_json({"error": "not enough memory"})
        except Exception as error:  # a fault of ours: the page says so, and goes on
            return _as_json({"error": escaped(f"{type(error).__name__}: {error}")})

    def _answered(self, what: str, question: Any) -> Any:
        session, work = self.server.session, self.server.work
        text, reader = (_text_field(question, name) for name in ("text", "reader"))
        if what == "tokens":
            return session.tokens(text)
        if what == "merges":
            return session.merges(text, question.get("index"))
        if what == "place":
            return work.place(reader)
        asked, parts = question_of(text, question.get("changes"), question.get("more", ())), question.get("parts")
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise InputError(f"parts are {short_repr(parts)}; expected a list of objects")
        can_wait = question.get("canWait") is True
        return work.ask(reader, asked, lambda progress: session.answer(asked, parts, progress), can_wait=can_wait)

    def _may(self, method: str) -> bool:
        """Return whether this is a request of the page itself, or of the reader's address bar; else refuse it."""
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        sites = ("same-origin", "none") if method == "GET" else ("same-origin",)
        is_ours = len(hosts) == 1 and hosts[0] in self.server.hosts
        is_ours = is_ours and self.headers.get("Sec-Fetch-Site", sites[0]) in sites
        if not is_ours or origin != (f"http://{hosts[0]}" if method == "POST" or origin else None):
            self._refuse(HTTPStatus.FORBIDDEN)
            return False
        return True

    def _known(self, pages: tuple[str, ...]) -> bool:
        """Return whether the path is one of these, behind the token; else refuse it."""
        before, _, page = self.path.rpartition("/")
        is_token = secrets.compare_digest(before.encode(errors="replace"), f"/{self.server.secret}".encode())
        if not is_token or page not in pages:
            self._refuse(HTTPStatus.NOT_FOUND)
            return False
        return True

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # what else the client has sent is not read
        self._send(status, "text/plain", status.phrase)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is no HTTP, or another method."""
        self._refuse(HTTPStatus(code))

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(data)), **_HEADERS}
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def version_string(self) -> str:
        """Return the header "Server"."""
        return "mistral_ref"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the terminal shows the address, and stays as it is."""


def _as_json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, allow_nan=False, separators=(",", ":"))


def _text_field(question: Any, name: str) -> str:
    value = question.get(name) if isinstance(question, dict) else None
    if not isinstance(value, str):
        raise InputError(f"{name} is {short_repr(value)}; expected a text")
    return value
