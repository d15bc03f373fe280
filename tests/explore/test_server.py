"""The server of the explorer: its files, answers and limits, and the requests that it refuses."""

import http.client
import json
import socket
from pathlib import Path

import numpy as np
import pytest

import capsnet_jax.explore.server as server_module
from capsnet_jax import UsageError
from capsnet_jax.explore.explorer import Explorer
from capsnet_jax.explore.server import MAX_BYTES, Server, is_own
from tests.conftest import IMAGE_SHAPE

IMAGE = np.full(IMAGE_SHAPE, 0.25).tolist()


def ask(server, path, body=None, method=None, **headers):
    """Return status, headers and content of the answer to a request."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=30)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def error_of(answer) -> tuple[int, str]:
    status, headers, content = answer
    assert headers["Content-Type"] == "application/json"
    return status, json.loads(content)["error"]


def test_the_page_may_only_load_from_its_server(server):
    status, headers, content = ask(server, "/")
    assert status == 200
    assert content == Path(server_module.__file__).with_name("page").joinpath("index.html").read_bytes()
    assert headers["Content-Security-Policy"].startswith("default-src 'self';")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert ask(server, "/main.js")[1]["Content-Type"] == "text/javascript; charset=utf-8"


def test_answers_are_those_of_the_explorer(server, explorer):
    assert json.loads(ask(server, "/api/model")[2]) == json.loads(json.dumps(explorer.describe({})))
    assert json.loads(ask(server, "/api/images")[2]) == explorer.images({})
    for path, method, request in (
        ("/api/network", explorer.describe_network, {"model": "small"}),
        ("/api/route", explorer.route, {"image": IMAGE}),
        ("/api/voters", explorer.voters, {"image": IMAGE, "class": 2, "step": 1}),
        ("/api/decode", explorer.decode, {"class": 2, "pose": [0.5] * 5}),
    ):
        status, _, content = ask(server, path, json.dumps(request))
        assert status == 200
        assert json.loads(content) == json.loads(json.dumps(method(request)))


@pytest.mark.parametrize(
    "path",
    [
        "/server.py",
        "/../server.py",
        "/%2e%2e/server.py",
        "//etc/passwd",
        "/page/index.html",
        "/api",
        "/api/route",
        "/main.js/",
    ],
)
def test_nothing_but_the_files_of_the_page_can_be_read(path, server):
    assert error_of(ask(server, path)) == (404, "There is no such file.")


def test_requests_for_other_hosts_and_from_other_pages_are_refused(server):
    port = server.server_address[1]
    refused = (403, "The request is for another host, or from another page.")
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.7", "[", ""):
        assert error_of(ask(server, "/", Host=host)) == refused
        assert error_of(ask(server, "/api/route", json.dumps({"image": IMAGE}), Host=host)) == refused
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"):
        assert error_of(ask(server, "/api/model", Origin=origin)) == refused
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9", f"[::1]:{port}"):
        assert ask(server, "/api/model", Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    ("host", "own", "expected"),
    [
        ("192.168.0.7:80", "0.0.0.0", True),
        ("lab.local:80", "lab.local", True),
        ("localhost", "0.0.0.0", True),
        ("evil.example", "0.0.0.0", False),
        ("192.168.0.7", "127.0.0.1", False),
    ],
)
def test_a_server_in_the_network_is_asked_by_its_address_or_name(host, own, expected):
    assert is_own(host, own) is expected


@pytest.mark.parametrize("body", ["", "{", "[1]", "null", "\udcff", '{"image": ' + "[" * 100_000])
def test_a_request_that_is_no_json_object_is_refused(body, server):
    answer = ask(server, "/api/route", body.encode(errors="surrogateescape"))
    assert error_of(answer) == (400, "The request is not a JSON object.")


def test_errors_of_users_are_explained(server):
    assert error_of(ask(server, "/api/route", '{"image": "?"}')) == (
        400,
        "image is not in base64; expected a byte for each pixel.",
    )
    assert error_of(ask(server, "/api/other", "{}")) == (404, "There is no such request.")
    assert error_of(ask(server, "/", method="DELETE"))[0] == 501


def test_a_request_that_is_too_long_or_has_no_length_is_refused(server):
    too_long = error_of(ask(server, "/api/route", "", **{"Content-Length": str(MAX_BYTES + 1)}))
    assert too_long == (413, "The request has more than 16,000,000 bytes.")
    assert error_of(ask(server, "/api/route", "", **{"Content-Length": "9" * 5000}))[0] == 413
    for length in ("-1", "x", "²"):
        assert raw(server, f"Host: localhost\r\nContent-Length: {length}\r\n").startswith(b"HTTP/1.1 411 ")
    assert raw(server, "Host: localhost\r\nTransfer-Encoding: chunked\r\n").startswith(b"HTTP/1.1 411 ")


def raw(server, headers: str) -> bytes:
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(f"POST /api/route HTTP/1.1\r\n{headers}\r\n".encode())
        return connection.recv(1000)


def test_no_error_reaches_the_terminal_or_the_page_as_a_traceback(server, monkeypatch, capfd):
    def fail(self, request):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    monkeypatch.setattr(Explorer, "describe", fail)
    assert error_of(ask(server, "/api/model")) == (500, "RuntimeError: RESOURCE_EXHAUSTED: Out of memory.")
    assert capfd.readouterr() == ("", "")


def test_a_port_that_is_used_is_an_error(server):
    port = server.server_address[1]
    with pytest.raises(UsageError, match=rf"Port {port} of 127.0.0.1 cannot be used: .*; expected a free one\."):
        Server("127.0.0.1", port)
    with pytest.raises(
        UsageError,
        match=r"Port 70000 of localhost cannot be used: bind\(\): port must be 0-65535; expected a free one\.",
    ):
        Server("localhost", 70000)
