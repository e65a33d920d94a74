"""The live page's server: whom it answers, whom it refuses, and that it goes on after each."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused

import mistral_ref
from mistral_ref.errors import InputError
from mistral_ref.study.live import server as live_server
from mistral_ref.study.live.server import LiveServer
from mistral_ref.study.live.session import Session
from mistral_ref.study.live.work import Work

TEXT = "Once upon a time"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    session, work = Session(mistral_ref.load(backend="numpy"), "a model"), Work()
    session.begin(TEXT, lambda done, total: None)
    with LiveServer(session, work) as server:
        for target, arguments in ((server.serve_forever, (0.01,)), (work.run, ())):
            Thread(target=target, args=arguments, daemon=True).start()
        yield server
        server.shutdown()


def headers_of(server: LiveServer, **others: str | None) -> dict[str, str]:
    host = server.hosts[0]
    own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    own |= {"Content-Type": "application/json"}
    every = {**own, **{name.replace("_", "-"): value for name, value in others.items()}}
    return {name: value for name, value in every.items() if value is not None}


def asked(
    server: LiveServer, method: str, path: str, body: str | bytes = "", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of the answer to one request."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body or None, headers_of(server) if headers is None else headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), data


def post(server: LiveServer, what: str, **question: Any) -> dict[str, Any]:
    body = json.dumps({"reader": "test", "text": TEXT, "changes": [], **question})
    status, _, data = asked(server, "POST", f"/{server.secret}/{what}", body)
    assert status == 200
    return json.loads(data)


def test_the_page_is_sent_to_who_knows_its_address(server: LiveServer) -> None:
    host = server.hosts[0]
    assert server.url == f"http://{host}/{server.secret}/"
    assert host.startswith("127.0.0.1:")
    assert len(server.secret) >= 32
    for site in ("none", "same-origin"):
        status, headers, body = asked(
            server, "GET", f"/{server.secret}/", headers={"Host": host, "Sec-Fetch-Site": site}
        )
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "connect-src 'self'" in body.decode()
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "change",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:1"},
        {"Host": "evil.example@127.0.0.1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
    ids=str,
)
def test_a_page_from_elsewhere_is_refused(server: LiveServer, method: str, change: dict[str, str]) -> None:
    path = f"/{server.secret}/{'' if method == 'GET' else 'tokens'}"
    body = "" if method == "GET" else json.dumps({"reader": "r", "text": "x"})
    assert asked(server, method, path, body)[0] == 200
    assert asked(server, method, path, body, headers_of(server, **change))[0] == 403


def test_a_question_without_an_origin_is_refused(server: LiveServer) -> None:
    path, body = f"/{server.secret}/tokens", json.dumps({"reader": "r", "text": "x"})
    assert asked(server, "POST", path, body, headers_of(server, Origin=None))[0] == 403
    assert asked(server, "POST", path, body, headers_of(server, Sec_Fetch_Site="none"))[0] == 403
    assert asked(server, "POST", path, body, headers_of(server, Sec_Fetch_Site=None))[0] == 200  # an older browser


@given(
    st.sampled_from(
        [
            "/",
            "//",
            "/{s}",
            "/{s}//",
            "/{s}x/",
            "/{s}/../{s}/",
            "/{s}/%2e%2e/",
            "/{s}/page.css",
            "/{s}/?a=b",
            "/{t}/",
            "/{s}/../../../../etc/passwd",
            "/etc/passwd",
            "http://127.0.0.1/{s}/",
            "/{s}/parts/",
            "/{s}/é",
        ]
    )
    | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30).map(lambda text: f"/{text}")
)
def test_nothing_else_can_be_reached(server: LiveServer, path: str) -> None:
    path = path.replace("{s}", server.secret).replace("{t}", server.secret.swapcase())
    head = f"Host: {server.hosts[0]}\r\nConnection: close\r\n"
    assert b" 404 " in sent(server, f"GET {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1")).split(b"\r\n")[0]


def sent(server: LiveServer, data: bytes) -> bytes:
    """Return all that comes back for some bytes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT", "x" * 300])
def test_other_methods_are_refused(server: LiveServer, method: str) -> None:
    head = f"Host: {server.hosts[0]}\r\nConnection: close\r\n"
    answer = sent(server, f"{method} /{server.secret}/ HTTP/1.1\r\n{head}\r\n".encode())
    assert answer.split(b" ")[1] in (b"501", b"400")
    assert b"<" not in answer  # no HTML


@given(st.binary(max_size=200))
def test_any_bytes_are_answered_in_few_words_or_not_at_all(server: LiveServer, data: bytes) -> None:
    assert len(sent(server, data)) < 1000


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": None}, 415),
        ({"Transfer_Encoding": "chunked"}, 415),
        ({"Content_Length": "1e3"}, 411),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "9" * 30}, 411),
        ({"Content_Length": str(2**20 + 1)}, 413),
    ],
    ids=str,
)
def test_only_json_of_a_known_length_is_read(server: LiveServer, change: dict[str, str], status: int) -> None:
    lines = headers_of(server, **({"Content_Length": "2"} | change))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    answer = sent(server, f"POST /{server.secret}/tokens HTTP/1.1\r\n{head}\r\n{{}}".encode())
    assert answer.split(b" ")[1] == str(status).encode()


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "[]", "null", '"x"', "[" * 5000, '{"text": 1, "reader": "r"}', '{"text": "x"}', '{"a": 1, "a": 1}'),
        *('{"text": "\\ud800", "reader": "r"}', '{"text": "x", "reader": "r", "parts": 3}', b"\xff\xfe"),
        *('{"text": "x", "reader": "r", "changes": [], "parts": [1]}', '{"text": "x", "reader": "r", "changes": {}}'),
    ],
    ids=lambda body: str(body)[:20],
)
def test_a_wrong_question_is_answered_in_words(server: LiveServer, body: str | bytes) -> None:
    status, _, data = asked(server, "POST", f"/{server.secret}/parts", body or " ")
    answer = json.loads(data)
    assert status == 200
    assert list(answer) == ["error"]
    assert "Traceback" not in answer["error"]
    assert "\n" not in answer["error"]
    assert post(server, "tokens")["answer"][1]["piece"] == "▁Once"


def test_a_connection_is_kept_for_several_questions(server: LiveServer) -> None:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    sockets = set()
    for text in ("Once", "upon", "a"):
        connection.request(
            "POST", f"/{server.secret}/tokens", json.dumps({"reader": "r", "text": text}), headers_of(server)
        )
        assert json.loads(connection.getresponse().read())["answer"][1]["piece"] == f"▁{text}"
        sockets.add(connection.sock)
    assert len(sockets) == 1
    connection.close()


def test_a_slow_client_holds_up_nobody_and_is_left(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_server._Handler, "timeout", 0.2)
    head = "".join(f"{name}: {value}\r\n" for name, value in headers_of(server, Content_Length="500").items())
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as slow:
        slow.sendall(f"POST /{server.secret}/tokens HTTP/1.1\r\n{head}\r\n{{".encode())
        assert post(server, "tokens")["answer"]
        assert slow.recv(100) == b""  # closed


def test_a_connection_whose_thread_cannot_begin_leaves_its_place(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    with LiveServer(server.session, server.work) as other, monkeypatch.context() as patch:
        patch.setattr(Thread, "start", fails)
        for _ in range(live_server._MOST_CONNECTIONS + 1):
            ours, theirs = socket.socketpair()
            with ours, theirs, pytest.raises(RuntimeError):
                other.process_request(theirs, ("127.0.0.1", 1))


def test_of_too_many_connections_the_newest_is_closed(server: LiveServer) -> None:
    with ExitStack() as stack:
        for _ in range(live_server._MOST_CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=20))
        newest = stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=20))
        assert newest.recv(10) == b""


def test_a_fault_of_ours_is_an_answer(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("\x1b[2Joh")

    monkeypatch.setattr(server.session, "tokens", fails)
    assert post(server, "tokens") == {"error": r"ZeroDivisionError: \x1b[2Joh"}
    monkeypatch.setattr(server.session, "tokens", lambda text: float("nan"))
    assert post(server, "tokens")["error"].startswith("ValueError")


def test_a_port_that_is_taken_is_named(server: LiveServer) -> None:
    with refused(InputError, "port", server.server_port):
        LiveServer(server.session, server.work, server.server_port)
    with refused(InputError, "port", 70000):
        LiveServer(server.session, server.work, 70000)


def test_the_parts_of_a_pass_are_answered(server: LiveServer) -> None:
    parts = [{"name": "about", "shown": "before"}, {"name": "values", "of": "layers.9.q", "shown": "before"}]
    about, wrong = post(server, "parts", parts=parts)["answer"]
    assert [token["piece"] for token in about["value"]["tokens"]] == ["<s>", "▁Once", "▁upon", "▁a", "▁time"]
    assert "layers.9.q" in wrong["error"]
    assert post(server, "place") == {"answer": None}
    assert post(server, "merges", index=1)["answer"]["states"][-1] == ["▁Once"]
