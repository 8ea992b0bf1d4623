"""What `specrag serve` loses while one of its servers has a fault: two drafters and a verifier, under load.

    python benchmarks/serving_faults.py --python PYTHON --gguf FILE

PYTHON is that of an environment with the package xllamacpp, and FILE a GGUF of SmolLM2. Three processes of llama.cpp's
server serve its first two layers, as only the fate of the questions counts, and not what the answers say. Proxies
stand in front of the first drafter and of the verifier. Questions come at random moments, whether or not earlier ones
are answered. After a third of them, the fault begins. A question is lost where it gets neither an answer nor an error
in OpenAI's form.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf as gguf_files
import httpx
from _fault_proxy import Fault, FaultProxy
from _over_servers import TOP, index, over_servers, questions
from _serving import Reply, body_of, open_loop, percentile, served

NAME = "smollm2"
LATE = 1.0  # seconds after the deadline that count as in time: the answer travels


def first_layers(gguf: str, count: int, to: Path) -> str:
    """The same model with its first layers alone: it writes nonsense, and soon."""
    reader = gguf_files.GGUFReader(gguf)
    kind = reader.fields["general.architecture"].contents()
    writer = gguf_files.GGUFWriter(to, kind)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = count if name == f"{kind}.block_count" else field.contents()
        of = field.types[-1] if field.types[0] == gguf_files.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], of)
    for tensor in reader.tensors:
        layer = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        if int(layer) < count:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(to)


class Llama:
    """A process of llama.cpp's server, which is killed, stopped and started again at the same port."""

    def __init__(self, python: str, gguf: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        script = str(Path(__file__).parent / "_llama_server.py")
        self._command = [python, script, gguf, str(self._port), NAME]
        self.url = f"http://127.0.0.1:{self._port}/v1"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/models").status_code == 200:
                    return
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        """Of its process; 0 where it was not started."""
        return self._process.pid if self._process is not None else 0

    def signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass
class Fleet:
    """The servers of one case."""

    drafters: list[Llama]
    verifier: Llama
    drafter_proxy: FaultProxy
    verifier_proxy: FaultProxy


def wire(fault: Fault) -> Callable[[Fleet], None]:
    """The proxy in front of the first drafter has ``fault``."""

    def begin(fleet: Fleet) -> None:
        fleet.drafter_proxy.fault = fault

    return begin


def killed(fleet: Fleet) -> None:
    """The first drafter is killed while it works on a request."""
    end = time.monotonic() + 30
    while not fleet.drafter_proxy.open and time.monotonic() < end:
        time.sleep(0.01)
    fleet.drafters[0].kill()


def killed_and_started(fleet: Fleet) -> None:
    killed(fleet)
    time.sleep(10)
    fleet.drafters[0].start()


def hangs(fleet: Fleet) -> None:
    fleet.drafters[0].signal(signal.SIGSTOP)


def verifier_restarted(fleet: Fleet) -> None:
    fleet.verifier.kill()
    time.sleep(5)
    fleet.verifier.start()


def verifier_killed(fleet: Fleet) -> None:
    fleet.verifier.kill()


def all_drafters_killed(fleet: Fleet) -> None:
    for drafter in fleet.drafters:
        drafter.kill()


@dataclass(frozen=True)
class Case:
    """A fault, and how the questions come. ``faster``: so many times the rate, to a server with a short queue."""

    begin: Callable[[Fleet], None]
    faster: float = 1.0


CASES = {
    "none": Case(lambda fleet: None),
    "a drafter is killed in the middle of a request": Case(killed),
    "the same, and started again after 10 s": Case(killed_and_started),
    "a drafter hangs": Case(hangs),
    "a drafter sends rubbish": Case(wire("rubbish")),
    "a drafter sends half a body": Case(wire("half")),
    "a drafter answers 429 with Retry-After": Case(wire("busy")),
    "the network to a drafter is slow": Case(wire("slow")),
    "the verifier is killed, and started again after 5 s": Case(verifier_restarted),
    "the verifier is killed": Case(verifier_killed),
    "both drafters are killed": Case(all_drafters_killed),
    "the queue is full": Case(lambda fleet: None, faster=20.0),
}


@contextlib.contextmanager
def fleet_of(python: str, gguf: str) -> Iterator[Fleet]:
    servers = [Llama(python, gguf) for _ in range(3)]
    try:
        for server in servers:
            server.start()
        with FaultProxy(servers[0].url) as first, FaultProxy(servers[2].url) as last:
            yield Fleet(servers[:2], servers[2], first, last)
    finally:
        for server in servers:
            server.kill()


async def asked(url: str, case: Case, fleet: Fleet, given: argparse.Namespace) -> list[Reply]:
    rate = given.rate * case.faster
    taken = list(itertools.islice(itertools.cycle(questions()), given.questions))
    bodies = [body_of(question, top=TOP, deadline=given.deadline) for question in taken]

    async def fault() -> None:
        await asyncio.sleep(given.questions / rate / 3)
        await asyncio.to_thread(case.begin, fleet)

    began = asyncio.create_task(fault())
    replies = await open_loop(url, bodies, rate, given.seed, given.deadline * 6)
    await began
    return replies


def kind(reply: Reply) -> str:
    """What a question came to."""
    if reply.lost:
        return "lost"
    if not reply.answered:
        return "error"
    told = (reply.body or {})["specrag"]
    if told["abstained"]:
        return "abstained"
    unverified = any("no draft was verified" in note for note in told["notes"])
    return "unverified" if unverified else "verified"


def measured(name: str, given: argparse.Namespace, folder: Path) -> str:
    """A row of the table."""
    case = CASES[name]
    with fleet_of(given.python, given.gguf) as fleet:
        drafters = [fleet.drafter_proxy.url, fleet.drafters[1].url]
        load = functools.partial(over_servers, NAME, drafters, [fleet.verifier_proxy.url], folder=folder, short=True)
        limits = {"concurrency": 2, "queue": 4} if case.faster > 1 else {"concurrency": 8}
        with served(load, top=TOP, **limits) as (url, _):
            asyncio.run(asked(url, Case(lambda fleet: None), fleet, replace_questions(given, 3)))  # all is loaded
            replies = asyncio.run(asked(url, case, fleet, given))
    kinds = [kind(reply) for reply in replies]
    counts = [kinds.count(one) for one in ("verified", "unverified", "abstained", "error")]
    late = sum(reply.seconds > given.deadline + LATE for reply in replies)
    seconds = [reply.seconds for reply in replies if reply.answered]
    shown = [len(replies), *counts, late, kinds.count("lost")]
    took = f"{percentile(seconds, 0.5):.1f} | {percentile(seconds, 1):.1f}"
    for message in sorted({str((reply.body or {}).get("error")) for reply in replies if kind(reply) == "error"}):
        print(f"  {message}", flush=True)
    return f"| {name} | {' | '.join(map(str, shown))} | {took} |"


def replace_questions(given: argparse.Namespace, count: int) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(given), "questions": count})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--python", required=True, help="of an environment with the package xllamacpp")
    options.add_argument("--gguf", required=True)
    options.add_argument("--layers", type=int, default=2, help="of the model; 0: all of them")
    options.add_argument("--questions", type=int, default=24, help="of each case")
    options.add_argument("--rate", type=float, default=0.5, help="questions per second")
    options.add_argument("--deadline", type=float, default=20.0, help="seconds for each question")
    options.add_argument("--case", action="append", choices=CASES, help="only this one; repeat for several")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index().save(Path(folder) / "index")
        if given.layers:
            given.gguf = first_layers(given.gguf, given.layers, Path(folder) / "layers.gguf")
        print("| fault | questions | verified | unverified | abstained | error | late | lost | p50 s | longest s |")
        print("| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |")
        for name in given.case or CASES:
            print(measured(name, given, Path(folder) / "index"), flush=True)


if __name__ == "__main__":
    main()
