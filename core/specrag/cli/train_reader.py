"""``specrag train --reader``: a span reader of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrag.cli.console import training_shown, working

if TYPE_CHECKING:
    from specrag.evaluation.records import Question


@dataclass(frozen=True, kw_only=True)
class ReaderTraining:
    """What a reader is trained on, and how.

    Args:
        used, held: Records to train on, and to evaluate with.
        base: A bundled model's name, a folder or a hub id.
        changed: Fields of ``ReaderSettings`` that the user gave.
        mixed: Fields of ``ReaderMixture`` that the user gave.
        rounds: Over the data.
        evaluate_every: Steps between evaluations; 0: at the end only.
        models: Where the bundled models are; by default the user's cache.
    """

    used: Sequence[Question]
    held: Sequence[Question]
    base: str
    changed: Mapping[str, Any]
    mixed: Mapping[str, Any]
    rounds: int
    evaluate_every: int
    models: Path | None

    def run(self, output: Path, card: Mapping[str, str]) -> None:
        """Train, evaluate, and write the reader with its model card into ``output``.

        Raises:
            SpecRAGError: A setting is wrong, the base is not there, or the data cannot be used.
        """
        from specrag.evaluation.data import with_distractors
        from specrag.models import bundled, load_reader
        from specrag.training import ReaderMixture, ReaderSettings, evaluate_reader, make_reader_examples, train_reader
        from specrag.training.model_card import write_reader_card

        settings, mixture = ReaderSettings(**self.changed), ReaderMixture(**self.mixed)
        with working("loading models"):
            embedder = bundled("minilm", folder=self.models)
            model, tokenizer = self._encoder(settings.seed)
        with working("making examples"):
            made = make_reader_examples(self.used, embedder, rounds=self.rounds, mixture=mixture, seed=settings.seed)
            others = [passage for record in self.used for passage in record.passages]
            examined = with_distractors(self.held, others, embedder) if self.held else []
        with training_shown() as report:
            train_reader(
                model,
                tokenizer,
                made,
                output,
                settings=settings,
                base=self.base,
                progress=report,
                evaluate=_share_right(tokenizer, settings.longest, examined) if examined else None,
                evaluation_steps=self.evaluate_every,
            )
        with working("evaluating"):
            quality = evaluate_reader(load_reader(output, models=self.models), examined) if examined else None
        write_reader_card(output, self.base, settings, mixture, sum(map(len, made)), quality, card)

    def _encoder(self, seed: int) -> tuple[Any, Any]:
        """The base and its tokenizer."""
        import torch

        from specrag.models.bundled import BUNDLED, located
        from specrag.models.reader import load_encoder

        torch.manual_seed(seed)  # the head of a base without one is random
        return load_encoder(located(self.base, self.models) if self.base in BUNDLED else self.base)


def _share_right(tokenizer: Any, longest: int, examined: Sequence[Question]) -> Callable[[Any], dict[str, float]]:
    """Evaluates a model while it is trained."""
    from specrag.models.reader import SpanReader
    from specrag.training import evaluate_reader

    def evaluate(model: Any) -> dict[str, float]:
        return {"right": evaluate_reader(SpanReader(model, tokenizer, longest=longest), examined).right}

    return evaluate
