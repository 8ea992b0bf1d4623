"""llama.cpp as a process of its own: reads one JSON request per line from stdin, writes one JSON reply per line.

`against_llama_cpp.py` starts it with an interpreter that has the package `xllamacpp` and need not have anything else.

Requests: {"do": "read", "ids": [...]}, {"do": "decode", "ids": [...], "tokens": 64} or {"do": "memory"}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# llama.cpp's own speculative decoding, by the name of the row. All of it is lossless.
SPECULATION = {
    "plain": "NONE",
    "ngram-simple": "NGRAM_SIMPLE",
    "ngram-mod": "NGRAM_MOD",
    "ngram-map-k": "NGRAM_MAP_K",
    "draft": "DRAFT_SIMPLE",
}


def server(args: argparse.Namespace):
    """llama.cpp's server, as its own program sets it up, with one conversation."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = args.model, args.context, 1
    settings.n_gpu_layers, settings.verbosity, settings.port = 0, -1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = args.threads
    kind = getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{SPECULATION[args.row]}")
    settings.speculative.types = [kind]
    if args.row == "draft":
        settings.speculative.draft.mparams.path = args.draft
        settings.speculative.draft.n_gpu_layers = 0
        settings.speculative.draft.cpuparams.n_threads = args.threads
        settings.speculative.draft.cpuparams_batch.n_threads = args.threads
    return xllamacpp.Server(settings)


def resident() -> int:
    """Bytes of this process in memory, the mapped pages of the model's file included."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def answer(llama, request: dict) -> dict:
    if request["do"] == "memory":
        return {"resident": resident()}
    reading = request["do"] == "read"
    made = llama.handle_completions(
        {
            "prompt": request["ids"],
            "n_predict": 1 if reading else request["tokens"],
            "cache_prompt": not reading,
            "temperature": 0.0,
            "ignore_eos": True,
        }
    )
    made = json.loads(made) if isinstance(made, str | bytes) else made
    if "timings" not in made:
        raise RuntimeError(f"llama.cpp answered {made}")
    times = made["timings"]
    if reading:
        return {"seconds": times["prompt_ms"] / 1e3, "tokens": times["prompt_n"]}
    text = made["choices"][0]["text"] if "choices" in made else made["content"]
    return {"per_token": times["predicted_ms"] / times["predicted_n"] / 1e3, "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--row", choices=SPECULATION, required=True)
    parser.add_argument("--draft", default="")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints goes to stderr
    llama = server(args)
    for line in sys.stdin:
        print(json.dumps(answer(llama, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
