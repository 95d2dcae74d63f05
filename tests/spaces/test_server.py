"""Addresses of visitors, settings of the server, and slow requests."""

import asyncio
import http.client
import json
import os
import socket
from urllib.parse import urlsplit

import body_limit
import gradio
import pytest
import starlette.requests
from app import check_port, main, trust_proxy
from endpoints import address
from test_endpoints import post


def test_address_ignores_forwarded_headers():
    headers = [(b"x-forwarded-for", b"203.0.113.7, 10.0.0.1")]
    request = starlette.requests.Request({"type": "http", "headers": headers, "client": ("10.0.0.1", 5)})
    assert address(gradio.Request(request)) == "10.0.0.1"


def test_only_the_configured_proxy_names_the_visitor(app_url):
    """The tested Space trusts 127.0.0.2. The rightmost untrusted address of the header is the visitor's."""
    sessions = []

    def start(forwarded, source="127.0.0.1"):
        connection = http.client.HTTPConnection(urlsplit(app_url).netloc, source_address=(source, 0))
        body = json.dumps({"data": ["push-t", "frame 1", None, 0]})
        headers = {"Content-Type": "application/json", "X-Forwarded-For": forwarded}
        connection.request("POST", "/gradio_api/run/start", body, headers)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        sessions.extend(answer.get("data", [])[:1])
        return answer.get("error", "")

    try:
        for number in range(33):
            if refusal := start(f"203.0.113.{number}"):
                break
        assert "sessions (the maximum)" in refusal
        assert "all 32 sessions are in use" in start("203.0.113.7", "127.0.0.2")
        assert "sessions (the maximum)" in start("203.0.113.7, 127.0.0.1", "127.0.0.2")
    finally:
        for session in sessions:
            post(app_url, "stop", json.dumps([session]))


@pytest.mark.parametrize("entry", ["*", "0.0.0.0/0", "128.0.0.0/1", "::/0", "10.0.0.1/8", "proxy", "10.0.0.300"])
def test_proxies_are_addresses(monkeypatch, entry):
    for trusted in (entry, f"192.0.2.7, {entry}"):
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
        with pytest.raises(ValueError, match="FORWARDED_ALLOW_IPS must be addresses"):
            trust_proxy()
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "192.0.2.7, 10.1.0.0/16,::1")
    trust_proxy()
    monkeypatch.delenv("FORWARDED_ALLOW_IPS")
    trust_proxy()
    assert os.environ["FORWARDED_ALLOW_IPS"] == ""


def test_invalid_settings_end_in_one_line(tmp_path, monkeypatch, capsys):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        for flags, message in [
            (["--port", port], f"`--port` must be free, got {port}: Address already in use"),
            (["--port", "70000"], "`--port` must be in [1, 65535], got 70000"),
            (["--study", str(tmp_path / "none")], "`study` must be a folder with videos"),
            (["--model", str(tmp_path / "none")], "no model could be loaded: "),
        ]:
            monkeypatch.setattr("sys.argv", ["app.py", *flags])
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert message in line
    check_port(None)
    monkeypatch.setenv("IRASIM_VISITOR_SESSIONS", "many")
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(SystemExit):
        main()
    assert "argument --visitor-sessions: invalid" in capsys.readouterr().err
    monkeypatch.delenv("IRASIM_VISITOR_SESSIONS")
    for flags in (["--idle-seconds", "nan"], ["--idle-seconds", "0"], ["--visitor-sessions", "-1"]):
        monkeypatch.setattr("sys.argv", ["app.py", *flags])
        with pytest.raises(SystemExit):
            main()
        assert "must be positive and finite" in capsys.readouterr().err


@pytest.mark.parametrize(("pause", "status"), [(0.0, 200), (5.0, 408)])
def test_slow_bodies_are_ended(monkeypatch, pause, status):
    monkeypatch.setattr(body_limit, "MAX_BODY_SECONDS", 0.2)
    parts, sent = (
        [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}],
        [],
    )

    async def receive():
        await asyncio.sleep(pause if len(parts) == 1 else 0)
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"ab"
        await send({"status": 200})

    asyncio.run(body_limit.BodyLimit(app)({"type": "http", "path": "/gradio_api/run/step"}, receive, send))
    assert sent[0]["status"] == status
