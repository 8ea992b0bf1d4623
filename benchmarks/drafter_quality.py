"""How good a drafter is, and which score picks best among its drafts.

    python benchmarks/drafter_quality.py [--model smollm2-rag-drafter] [--questions 100] [--skip 0] [--verifier PATH]

Data: NQ dev with ten passages per question (`data/`). Right: the text of the answer contains one of the right answers.
Printed, with 95 % Wilson intervals:

- drafts from the gold passage alone;
- drafts of Speculative RAG (m = 5, k = 2) with and without the gold passage in their subset;
- how well each score tells right drafts from wrong ones;
- the answer under every combination of scores, and the share right in the quarter and half that it scores best;
- right answers among the questions that are answered, for several thresholds, and abstentions where no passage answers.

`--verifier`: another model scores the drafts. Its own answer from all ten passages (standard RAG) is the row to beat.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from _timing import machine, median

from specrag import Prompts
from specrag.evaluation.data import Question, load_questions
from specrag.evaluation.metrics import contains_answer, exact_match, f1, separation, wilson_interval
from specrag.models import GenerationRequest, Stage, TransformersLM, Turn, bundled
from specrag.schema import ALL_SCORES, Draft, ScoreName, Verdict
from specrag.speculative.drafting import Assignment, Drafter
from specrag.speculative.perspectives import embed_passages, sample_perspectives
from specrag.speculative.selection import rank
from specrag.speculative.verification import Normalization, RawScores, Verifier

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"


@dataclass
class Drafted:
    """One question: its drafts with what each verifier said of them, and seconds until the last of them had."""

    question: Question
    drafts: list[Draft]
    raw: dict[str, list[RawScores]]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-rag-drafter", help="bundled name, or a model folder")
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter on top of it (of --model smollm2, say)")
    parser.add_argument("--verifier", help="model folder; by default the drafter itself")
    parser.add_argument("--verifier-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-standard", action="store_true", help="the verifier does not answer as standard RAG")
    parser.add_argument("--untrained-prompts", action="store_true", help="Prompts.for_small_models()")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="begin behind so many questions, to go on with a run")
    parser.add_argument("--quantization", choices=["int8"])
    parser.add_argument("--json", type=Path, help="write every draft and score here")
    args = parser.parse_args()

    bundles = ("smollm2", "smollm2-rag-drafter")
    options = {"quantization": args.quantization} | ({"adapter": args.adapter} if args.adapter else {})
    lm = bundled(args.model, **options) if args.model in bundles else TransformersLM(args.model, **options)
    judge = TransformersLM(args.verifier, dtype=getattr(torch, args.verifier_dtype)) if args.verifier else lm
    prompts = Prompts.for_small_models() if args.untrained_prompts else Prompts.trained_with(lm) or Prompts()
    drafter, embedder = Drafter(lm, prompts), bundled("minilm")
    verifiers = {"the drafter itself": Verifier(lm, prompts)}
    if args.verifier:
        verifiers[judge.name] = Verifier(judge, prompts)
    questions = load_questions(DATA)[args.skip :][: args.questions]
    print(machine(), f"; {lm.name}, {len(questions)} questions", sep="")

    gold = []
    for at in range(0, len(questions), 8):
        part = questions[at : at + 8]
        made = lm.generate([drafter.request(q.question, [q.passages[i] for i in q.gold]) for q in part])
        gold += [(q, c.parts[1].text) for q, c in zip(part, made, strict=True)]
    report("gold passage alone: right", [contains_answer(t, q.answers) for q, t in gold])
    report("gold passage alone: abstains", [prompts.is_abstention(t) for _, t in gold])

    done, standard = [], []
    for q in questions:
        if args.verifier and not args.no_standard:
            standard.append(answered_by_standard(judge, prompts, q))
        start = time.perf_counter()
        vectors = asyncio.run(embed_passages(q.question, q.passages, embedder))
        subsets = sample_perspectives(vectors, len(q.passages), 5, 2).subsets
        assignments = [Assignment(j, s, tuple(q.passages[i] for i in s)) for j, s in enumerate(subsets)]
        requests = [drafter.request(q.question, each.passages) for each in assignments]
        completions = lm.generate(requests, top_log_probs=drafter.top_log_probs)
        drafts = [drafter.read(c, each) for c, each in zip(completions, assignments, strict=True)]
        contest = [d for d in drafts if not d.abstained]
        drafted, scores = time.perf_counter() - start, {}
        for name, verifier in verifiers.items():
            start = time.perf_counter()
            raw = asyncio.run(verifier.raw_scores(q.question, contest)) if contest else []
            by_draft = dict(zip(map(id, contest), raw, strict=True))
            scores[name] = [by_draft.get(id(d), RawScores()) for d in drafts]
        done.append(Drafted(q, drafts, scores, drafted + time.perf_counter() - start))
        if len(done) % 20 == 0:
            print(f"  {len(done)} of {len(questions)}", flush=True)

    pairs = [(d, draft) for d in done for draft in d.drafts]
    holding = [(d, draft) for d, draft in pairs if set(draft.subset) & set(d.question.gold)]
    others = [(d, draft) for d, draft in pairs if not set(draft.subset) & set(d.question.gold)]
    right = [contains_answer(draft.text, d.question.answers) for d, draft in holding]
    report("drafts with the gold passage: right", right)
    report("drafts with the gold passage: abstain", [draft.abstained for _, draft in holding])
    report("drafts without it: abstain", [draft.abstained for _, draft in others])
    coverage = [any(contains_answer(x.text, d.question.answers) for x in d.drafts) for d in done]
    report("some draft right (coverage)", coverage)
    words = [len(draft.text.split()) for _, draft in pairs if not draft.abstained]
    print(f"answers: {sum(words) / max(len(words), 1):.1f} words on average, {max(words, default=0)} at most")
    if standard:
        report(
            "standard RAG with the verifier: right",
            [contains_answer(t, q.answers) for q, (t, _) in zip(questions, standard, strict=True)],
        )
        print(
            f"latency: standard {median([s for _, s in standard]):.1f} s, "
            f"speculative {median([d.seconds for d in done]):.1f} s"
        )

    for name, verifier in verifiers.items():
        report_scores(name, verifier, done, sum(coverage) / len(coverage))
        report_thresholds(name, verifier, done, ALL_SCORES, (-4.5, -3.5, -3.0, -2.5))
        if prompts.verdict_header:
            report_thresholds(name, verifier, done, ("draft", "verdict"), (-1.25, -1.0, -0.75, -0.5))
    if args.json:
        rows = [
            {
                "id": d.question.id,
                "drafts": [
                    {"subset": x.subset, "rationale": x.rationale, "answer": x.text, "abstained": x.abstained,
                     "log_rationale": x.log_rationale, "log_answer": x.log_answer, "log_verdict": x.log_verdict,
                     "rationale_tokens": x.rationale_tokens, "answer_tokens": x.answer_tokens,
                     "right": contains_answer(x.text, d.question.answers),
                     "scores": {name: {"self_contain": raw[i].self_contain, "self_reflect": raw[i].self_reflect}
                                for name, raw in d.raw.items()}}
                    for i, x in enumerate(d.drafts)
                ],
            }
            for d in done
        ]  # fmt: skip
        args.json.write_text(json.dumps(rows, indent=1))


def report_scores(name: str, verifier: Verifier, done: list[Drafted], coverage: float) -> None:
    """The pipeline's answer under every combination of scores, and the accuracy of the best-scored answers."""
    print(f"\nverified by {name}")
    print("scores that count                  norm  right            EM     F1     abstains  efficiency  quarter half")
    best: tuple[float, str, list[tuple[float, bool]]] | None = None
    made = (*ALL_SCORES, *(["verdict"] if verifier.prompts.verdict_header else []))
    sizes = range(1, len(made) + 1)
    report_separation(verifier, made, name, done)
    for kind in get_args(Normalization):
        v = Verifier(verifier.lm, verifier.prompts, replace(verifier.scoring, normalization=kind))
        for names in itertools.chain.from_iterable(itertools.combinations(made, n) for n in sizes):
            answers, ranked = [], []
            for d in done:
                verdicts: list[Verdict] = [v.verdict(x, r) for x, r in zip(d.drafts, d.raw[name], strict=True)]
                top = next((x for x in rank(verdicts, names)[0] if not x.draft.abstained), None)
                answers.append("" if top is None else top.draft.text)
                if top is not None and top.log_score is not None:
                    ranked.append((top.log_score, contains_answer(top.draft.text, d.question.answers)))
            hits = [contains_answer(a, d.question.answers) for a, d in zip(answers, done, strict=True)]
            low, high = wilson_interval(sum(hits), len(hits))
            exact = sum(exact_match(a, d.question.answers) for a, d in zip(answers, done, strict=True)) / len(done)
            overlap = sum(f1(a, d.question.answers) for a, d in zip(answers, done, strict=True)) / len(done)
            share = sum(hits) / len(hits)
            ordered = [hit for _, hit in sorted(ranked, reverse=True)]
            surest = [sum(ordered[: len(ordered) // n]) / max(len(ordered) // n, 1) for n in (4, 2)]
            print(
                f"{' + '.join(names):34} {kind:5} {share:5.1%} ({low:.0%}-{high:.0%})  {exact:5.1%}  {overlap:.3f}  "
                f"{sum(not a for a in answers) / len(answers):5.1%}     {share / max(coverage, 1e-9):.2f}"
                f"        {surest[0]:7.0%} {surest[1]:4.0%}"
            )
            if best is None or share > best[0]:
                best = (share, f"{' + '.join(names)}, {kind}", ranked)
    assert best is not None
    print(f"\nselective accuracy of {best[1]}:")
    ordered = sorted(best[2], reverse=True)
    for answered in (0.25, 0.5, 0.75, 1.0):
        taken = ordered[: max(1, int(answered * len(ordered)))]
        print(
            f"  best {len(taken):3} answers: {sum(r for _, r in taken) / len(taken):5.1%} right, "
            f"score above {taken[-1][0]:.2f}"
        )


def report_separation(verifier: Verifier, scores: Sequence[str], name: str, done: list[Drafted]) -> None:
    """How well each score tells right drafts from wrong ones, among the drafts that have it."""
    for score in scores:
        scored = [
            (value, contains_answer(draft.text, d.question.answers))
            for d in done
            for draft, raw in zip(d.drafts, d.raw[name], strict=True)
            if not draft.abstained and (value := getattr(verifier.verdict(draft, raw), f"log_{score}")) is not None
        ]
        area = separation([truth for _, truth in scored], [value for value, _ in scored]) if scored else None
        print(f"{score:14} area under the ROC curve over {len(scored)} drafts: {area or float('nan'):.3f}")


def report_thresholds(
    name: str, verifier: Verifier, done: list[Drafted], names: Sequence[ScoreName], thresholds: Sequence[float]
) -> None:
    """Right answers and abstentions for several thresholds on the sum of the scores ``names``.

    A question without an answer is imitated by leaving out the drafts that read its gold passage.
    """

    def best(d: Drafted, drafts: list[tuple[Draft, RawScores]]) -> tuple[float, bool]:
        ranked, _ = rank([verifier.verdict(x, raw) for x, raw in drafts], names)
        if not ranked or ranked[0].log_score is None:
            return -math.inf, False
        return ranked[0].log_score, contains_answer(ranked[0].draft.text, d.question.answers)

    with_it = [best(d, list(zip(d.drafts, d.raw[name], strict=True))) for d in done]
    without = [
        best(
            d, [(x, r) for x, r in zip(d.drafts, d.raw[name], strict=True) if not set(x.subset) & set(d.question.gold)]
        )
        for d in done
    ]
    print(
        f"\n{verifier.scoring.normalization}, {' + '.join(names)}: threshold; right, right of what is answered, "
        "unanswerable abstained"
    )
    for threshold in (-math.inf, *thresholds):
        answered = [right for score, right in with_it if score > threshold]
        left = sum(score <= threshold for score, _ in without)
        low, high = wilson_interval(left, len(done))
        print(
            f"  {threshold:5}  {sum(answered) / len(done):5.1%}  {sum(answered) / max(len(answered), 1):4.0%}  "
            f"{left / len(done):4.0%} ({low:.0%}-{high:.0%})"
        )


def answered_by_standard(lm: TransformersLM, prompts: Prompts, q: Question) -> tuple[str, float]:
    start = time.perf_counter()
    turn = Turn.of("user", prompts.standard_text(q.question, q.passages))
    (completion,) = lm.generate([GenerationRequest((turn,), (Stage("Answer:", 24, ("\n",)),))])
    return completion.parts[0].text, time.perf_counter() - start


def report(name: str, values: list[bool]) -> None:
    low, high = wilson_interval(sum(values), len(values))
    print(
        f"{name:42} {sum(values):4} of {len(values):4}  {sum(values) / max(len(values), 1):5.1%} "
        f"({low:.0%}-{high:.0%})",
        flush=True,
    )


if __name__ == "__main__":
    main()
