"""RAPID against plain decoding: tokens per second, acceptance, answers, and what one step costs.

    python benchmarks/rapid_decoding.py [--lengths 4096 8192 16384 32768] [--prompts 3] [--tokens 128] [--quote]
        [--model FOLDER] [--shape 8b --acceptance 0.77] [--datastore FOLDER] [--json FILE]

All rows run in one process on the same float32 weights, but for an int8 drafter. transformers' rows run its own model
object, with its own cache and linear layers. There is one document per length. It is read once, and every row and
question continues it. Only decoding is timed, from the first token; the rows take turns question by question. Every
row writes all its tokens. A text is right when it holds an answer.

On a GPU the weights are in bfloat16, there are no int8 rows, and both sides share one model object. With
SPECRAG_CUDA_GRAPHS=1, our rows but "plain, no graphs" record their steps. `--shape` takes random weights of a shape
where no large model is at hand; its text means nothing. `--acceptance` then accepts every candidate with that
probability, whatever the models say (in our rows only, and not those of trees). Rows with "rest" look up `--datastore`,
by default one of the document that is read.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch
from _long_context import CUDA, SHAPES, long_document, stock_model, stretched_model
from _timing import machine, median
from transformers import DynamicCache

from specrag.evaluation.data import Question
from specrag.evaluation.metrics import contains_answer
from specrag.models import Sampling, bundled
from specrag.rapid import LongContext, RapidGenerator, decoding
from specrag.rapid.datastore import Datastore
from specrag.text import passage_text

ROWS = {
    "plain (ours)": {"candidates": 0},
    "plain, no graphs": {"candidates": 0},
    "none, 5": {"transfer": "none", "candidates": 5},
    "rapid, 5": {"transfer": "rapid", "candidates": 5},
    "augmented, 5": {"transfer": "augmented", "candidates": 5},
    "rapid, 10": {"transfer": "rapid", "candidates": 10},
    "none, auto": {"transfer": "none"},
    "rapid, auto": {"transfer": "rapid"},
    "none, int8 drafter, 5": {"transfer": "none", "candidates": 5, "int8": True},
    "rapid, int8 drafter, 5": {"transfer": "rapid", "candidates": 5, "int8": True},
    "rapid, int8 drafter, auto": {"transfer": "rapid", "int8": True},
    "none, sparse, 5": {"transfer": "none", "proposer": "sparse", "candidates": 5},
    "none, sparse, auto": {"transfer": "none", "proposer": "sparse"},
    "rapid, sparse, 5": {"transfer": "rapid", "proposer": "sparse", "candidates": 5},
    "rapid, sparse, auto": {"transfer": "rapid", "proposer": "sparse"},
    "none, sparse int8 drafter, 5": {"transfer": "none", "proposer": "sparse", "candidates": 5, "int8": True},
    "none, sparse int8 drafter, auto": {"transfer": "none", "proposer": "sparse", "int8": True},
    "rapid, sparse int8 drafter, 5": {"transfer": "rapid", "proposer": "sparse", "candidates": 5, "int8": True},
    "rapid, sparse int8 drafter, auto": {"transfer": "rapid", "proposer": "sparse", "int8": True},
    "match, auto": {"proposer": "match", "transfer": "none"},
    "hybrid, auto": {"proposer": "hybrid", "transfer": "none"},
    "hybrid-sparse, auto": {"proposer": "hybrid-sparse", "transfer": "none"},
    "hybrid-sparse int8 drafter, auto": {"proposer": "hybrid-sparse", "transfer": "none", "int8": True},
    "rapid, hybrid-sparse int8 drafter, auto": {"proposer": "hybrid-sparse", "transfer": "rapid", "int8": True},
    "none, tree of width 2, 5": {"transfer": "none", "candidates": 5, "tree_width": 2},
    "none, tree of width 3, 5": {"transfer": "none", "candidates": 5, "tree_width": 3},
    "sparse, tree of width 2, auto": {"proposer": "sparse", "transfer": "none", "tree_width": 2},
    "sparse, tree of width 3, auto": {"proposer": "sparse", "transfer": "none", "tree_width": 3},
    "sparse, tree of auto, auto": {"proposer": "sparse", "transfer": "none", "tree_width": "auto"},
    "hybrid-sparse, tree of width 2, auto": {"proposer": "hybrid-sparse", "transfer": "none", "tree_width": 2},
    "triforce, auto": {"proposer": "triforce", "transfer": "none"},
    "triforce, 6": {"proposer": "triforce", "transfer": "none", "candidates": 6},
    "triforce int8 drafter, auto": {"proposer": "triforce", "transfer": "none", "int8": True},
    "window, auto": {"proposer": "window", "transfer": "none"},
    "rest, auto": {"proposer": "rest", "transfer": "none"},
    "rest, 8": {"proposer": "rest", "transfer": "none", "candidates": 8},
    "rest, width 1, auto": {"proposer": "rest", "transfer": "none", "tree_width": 1},
}
STOCK = ("generate", "generate, prompt lookup", "generate, assistant")
ASKED = "{} Explain your answer in detail, with everything that the text says about it."
QUOTED = 'Copy the passage that begins with "{}" from the text, word for word.'


def prompt(question: Question, quote: bool) -> str:
    """What is asked of the document: an answer in detail, or a quotation of the passage that has it."""
    opening = passage_text(question.passages[question.gold[0]]).split()[:12]
    return QUOTED.format(" ".join(opening)) if quote else ASKED.format(question.question)


def stock_cache(session: LongContext, config) -> DynamicCache:
    """transformers' own cache with the same keys and values: no second prefill."""
    cache = DynamicCache(config=config)
    for i, layer in enumerate(session.model.cache.layers):
        keys, values = layer.key_buffer[:, :, : session.tokens], layer.value_buffer[:, :, : session.tokens]
        cache.update(keys.clone(), values.clone(), i)
    return cache


def stock_row(name: str, model, assistant, ids: torch.Tensor, caches: list[DynamicCache], tokens: int, read: int):
    """(seconds a token after the first, share accepted, ids) of transformers' own decoding."""
    marks: list[tuple[float, int]] = []

    class Clock:
        def put(self, value):
            marks.append((time.perf_counter(), value.numel()))

        def end(self):
            pass

    extra: dict = {}
    if name == "generate, prompt lookup":
        extra = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3}
    elif name == "generate, assistant":
        extra = {"assistant_model": assistant}
        make = model._get_candidate_generator

        def with_cache(*args, **kwargs):
            generator = make(*args, **kwargs)
            generator.assistant_kwargs["past_key_values"] = caches[1]  # it has read the document too
            return generator

        model._get_candidate_generator = with_cache
    prepare = model.prepare_inputs_for_generation

    def of_unread(sequence, next_sequence_length=None, **kwargs):
        """transformers' speculative decoding feeds the whole prompt in its first round, whatever the cache holds."""
        return prepare(sequence, next_sequence_length=sequence.shape[1] - caches[0].get_seq_length(), **kwargs)

    model.prepare_inputs_for_generation = of_unread
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=caches[0], do_sample=False, streamer=Clock(),
            max_new_tokens=tokens, pad_token_id=0, eos_token_id=[], **extra,
        )  # fmt: skip
    for replaced in ("_get_candidate_generator", "prepare_inputs_for_generation"):
        model.__dict__.pop(replaced, None)
    for cache in caches:
        cache.crop(-(cache.get_seq_length() - read))
    marks = marks[1:]  # the prompt
    after = sum(n for _, n in marks[1:])
    rounds = len(marks)
    accepted = (sum(n for _, n in marks) - rounds) / rounds  # a round
    return (marks[-1][0] - marks[0][0]) / after, accepted, made[0, ids.shape[1] :]


def step_costs(model, session: LongContext, cache: DynamicCache, repeats: int = 7) -> dict[str, float]:
    """Milliseconds of one forward pass over 1 and 11 tokens, ours and stock, taking turns."""
    times: dict[str, list[float]] = {f"{side} {n}": [] for side in ("stock", "ours") for n in (1, 11)}
    session.model.rollback_to(session.tokens)
    for _ in range(repeats):
        for n in (1, 11):
            ids = list(range(100, 100 + n))
            with torch.inference_mode():
                start = time.perf_counter()
                model(torch.tensor([ids], device=model.device), past_key_values=cache).logits[0, -1, 0].item()
                times[f"stock {n}"].append(time.perf_counter() - start)
            cache.crop(-n)
            start = time.perf_counter()
            session.model.feed(ids)
            times[f"ours {n}"].append(time.perf_counter() - start)
            session.model.rollback_to(session.tokens)
    return {name: 1e3 * median(values) for name, values in times.items()}


def force_acceptance(probability: float) -> None:
    """From here on a candidate is accepted with ``probability``; the cost of looking at it stays."""
    random = torch.Generator().manual_seed(0)
    judged = decoding.accept_greedy

    def accept(p, hat, candidates, bonus):
        _, following = judged(p, hat, candidates, bonus)
        refused = (torch.rand(len(candidates), generator=random) >= probability).nonzero()
        return torch.tensor(int(refused[0]) if len(refused) else len(candidates), device=following.device), following

    decoding.accept_greedy = accept


def warm_up(session: LongContext, generators: dict[str, RapidGenerator], question: str) -> None:
    """A few tokens of every row that no figure counts."""
    session.retrieve(question)
    for generator in generators.values():
        session.rapid, session.estimates = generator, copy.copy(generator.estimates)
        session.ask(question, max_tokens=12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--quote", action="store_true", help="ask for quotations")
    default = [*STOCK, *(name for name in ROWS if ("graphs" if not CUDA else "int8") not in name)]
    parser.add_argument("--rows", nargs="+", choices=[*STOCK, *ROWS], default=default)
    parser.add_argument("--model", type=Path, help="a folder with another model; by default the bundled SmolLM2")
    parser.add_argument("--shape", choices=[*SHAPES], help="random weights of this shape")
    parser.add_argument("--acceptance", type=float, help="accept every candidate with this probability")
    parser.add_argument("--datastore", type=Path, help="what rows with rest look up")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.acceptance is not None:
        force_acceptance(args.acceptance)
    embedder, results, lm = bundled("minilm"), [], None
    print(machine())
    for length in args.lengths:
        positions = max(length, 8192)
        if lm is None or args.shape is None:  # random weights serve every length
            lm = stretched_model(positions, args.model, args.shape)
            with_int8 = any("int8" in row for row in args.rows)
            small = stretched_model(positions, args.model, args.shape, quantization="int8") if with_int8 else None
            stock = lm.model if CUDA else stock_model(positions, args.model, args.shape)
            assistant = stock_model(positions, args.model, args.shape) if "generate, assistant" in args.rows else None
        speeds: dict[str, list[float]] = {row: [] for row in args.rows}
        notes: dict[str, list[dict]] = {row: [] for row in args.rows}
        questions, text = long_document(lm, length, args.prompts)
        base = RapidGenerator(lm, embedder=embedder, sampling=Sampling())
        datastore = args.datastore
        if datastore is None and any("rest" in row for row in args.rows):
            datastore = Path(tempfile.mkdtemp()) / "datastore"
            Datastore.build([text], lm.tokenizer, datastore)
        generators = {
            name: RapidGenerator(
                lm, small if "int8" in name else None, embedder=embedder, sampling=Sampling(),
                datastore=datastore if ROWS[name].get("proposer") == "rest" else None,
                **{"proposer": "rag"} | {key: value for key, value in ROWS[name].items() if key != "int8"},
            )
            for name in args.rows if name in ROWS
        }  # fmt: skip
        start = time.perf_counter()
        session = LongContext(text, base)
        print(f"\n{length}: {session.tokens} tokens read in {time.perf_counter() - start:.1f} s", flush=True)
        caches = [stock_cache(session, stock.config)]
        caches += [stock_cache(session, stock.config)] if "generate, assistant" in args.rows else []
        cost = step_costs(stock, session, caches[0])
        print(f"  step ms: {', '.join(f'{key} {value:.0f}' for key, value in cost.items())}", flush=True)
        if CUDA:  # the first steps of a row are slow: kernels are loaded and memory is taken
            warm_up(session, generators, prompt(questions[0], args.quote))
        for i, question in enumerate(questions):
            asked = prompt(question, args.quote)
            session.retrieve(asked)
            ids = torch.tensor([[*session.prompt.ids, *session.question_tokens(asked)]], device=lm.device)
            for name in args.rows[i % len(args.rows) :] + args.rows[: i % len(args.rows)]:
                if name in STOCK:
                    seconds, accepted, made = stock_row(
                        name, stock, assistant, ids, caches, args.tokens, session.tokens
                    )
                    speeds[name].append(1 / seconds)
                    reply = lm.tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                    notes[name].append(
                        {"a round": accepted, "right": contains_answer(reply, question.answers), "text": reply}
                    )
                    continue
                recorded = session.model.graphs
                session.model.graphs = None if "no graphs" in name else recorded
                session.rapid = generators[name]
                session.estimates = generators[name].estimates  # what a row learned in its last question
                lm.__dict__["end_tokens"] = frozenset()  # every row writes all its tokens
                out = session.ask(asked, max_tokens=args.tokens)
                del lm.__dict__["end_tokens"]
                session.model.graphs = recorded
                s = out.stats
                speeds[name].append((s.tokens - 1) / s.decode_seconds)
                notes[name].append(
                    {
                        "accepted": s.acceptance,
                        "a round": s.accepted / max(len(s.schedule), 1),
                        "outside": 1 - s.forward_seconds / s.decode_seconds,
                        "right": contains_answer(out.text, question.answers),
                        "text": out.text,
                        "schedule": s.schedule,
                        "startup": s.startup_seconds,
                    }
                )
        reference = speeds.get("generate")
        for name in args.rows:
            ratio = median([a / b for a, b in zip(speeds[name], reference, strict=True)]) if reference else float("nan")
            shown = f"{median([n['a round'] for n in notes[name]]):4.1f} accepted a round"
            if name in ROWS:
                shown += f", {median([n['accepted'] for n in notes[name]]):4.0%} of the candidates"
                shown += f", outside forwards {median([n['outside'] for n in notes[name]]):4.1%}"
            right = sum(n["right"] for n in notes[name])
            if reference:
                pairs = zip(notes[name], notes["generate"], strict=True)
                shown += f", text of generate {sum(a['text'] == b['text'] for a, b in pairs)}/{args.prompts}"
            each = " ".join(f"{a / b:.2f}" for a, b in zip(speeds[name], reference, strict=True)) if reference else ""
            print(f"  {name:40s}{median(speeds[name]):7.2f} tokens/s  {ratio:5.2f} x generate ({each})  {shown}, "
                  f"right {right}/{args.prompts}", flush=True)  # fmt: skip
        results.append({"length": length, "speeds": speeds, "notes": notes, "step_ms": cost})
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))
        del session, caches


if __name__ == "__main__":
    main()
