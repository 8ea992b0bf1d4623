"""What a pool of two real servers loses while one of them is ill.

    python benchmarks/server_pool.py URL URL --model NAME --tokenizer PATH

Both URLs serve the same model. In front of the first one stands a proxy that makes the faults; the second one is used
as it is. For each fault a new pool answers 20 questions of the demo. A question is lost where it ends in an error, or
where no draft is verified.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from specrag import SpeculativeRAG
from specrag.cli.ask import DEMO
from specrag.errors import SpecRAGError
from specrag.evaluation.data import load_questions
from specrag.models import OpenAILM

Answered = tuple[int, bytes, str]  # status, content, type
HTML = b"<html><body>Welcome to nginx!</body></html>"


def half(answered: Answered) -> Answered:
    """The first half of the answer."""
    return answered[0], answered[1][: len(answered[1]) // 2], answered[2]


def slow(answered: Answered) -> Answered:
    """The answer, 20 seconds later."""
    time.sleep(20)
    return answered


def hang(answered: Answered) -> Answered:
    """No answer within any timeout."""
    time.sleep(3600)
    return answered


def refusing(status: int) -> Callable[[Answered], Answered]:
    """An error with ``status``."""
    return lambda answered: (status, b'{"error": {"message": "no"}}', "application/json")


FAULTS: dict[str, Callable[[Answered], Answered] | None] = {
    "none": lambda answered: answered,
    "half of the JSON": half,
    "HTML with status 200": lambda answered: (200, HTML, "text/html"),
    "status 400": refusing(400),
    "status 401": refusing(401),
    "status 404": refusing(404),
    "status 502": refusing(502),
    "hangs": hang,
    "20 s late": slow,
    "refuses connections": None,
}


@contextlib.contextmanager
def proxy(upstream: str, fault: Callable[[Answered], Answered] | None) -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy in front of ``upstream``, and the paths that it was asked for."""
    asked: list[str] = []
    if fault is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1", asked
        return
    client = httpx.Client(timeout=120)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            asked.append(self.path)
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            kind = {"content-type": "application/json"}
            response = client.request(
                self.command, upstream.removesuffix("/v1") + self.path, content=body, headers=kind
            )
            status, content, of = fault((response.status_code, response.content, kind["content-type"]))
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", of)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = respond  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def measure(args: argparse.Namespace, fault: str) -> str:
    """A row of the table."""
    questions = list(itertools.islice(itertools.cycle(load_questions(DEMO)), args.questions))
    with proxy(args.servers[0], FAULTS[fault]) as (ill, asked):
        lm = OpenAILM(args.model, [ill, args.servers[1]], tokenizer=args.tokenizer)
        rag = SpeculativeRAG(
            drafter=lm, drafts=3, subsets="random", max_rationale_tokens=12, max_answer_tokens=8, deadline=args.deadline
        )
        lost, drafts_lost, seconds = 0, 0, []
        for question in questions:
            passages = [replace(p, text=" ".join(p.text.split()[:40])) for p in question.passages[:6]]
            start = time.perf_counter()
            try:
                answer = rag.answer(question.question, passages)
            except SpecRAGError as error:
                print(f"  {type(error).__name__}: {error}", flush=True)
                lost += 1
            else:
                lost += len(answer.verdicts) == len(answer.unverified)  # none is verified
                empty = [failure for failure in answer.failures if "wrote no answer" in failure.error]
                drafts_lost += len(answer.failures) - len(empty)  # some models write empty answers
            seconds.append(time.perf_counter() - start)
    requests = len([path for path in asked if "models" not in path])
    took = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}"
    return f"| {fault} | {len(questions)} | {lost} | {drafts_lost} | {took} | {requests} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs=2, metavar="URL")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds for each question")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only this one; may be given several times")
    args = parser.parse_args()
    print("| fault of one of two | questions | lost | drafts lost | median s | longest s | requests to it |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for fault in args.fault or FAULTS:
        print(measure(args, fault), flush=True)


if __name__ == "__main__":
    main()
