"""``specrag train``: a drafter of one's own, and what it says of its own drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from specrag._files import digest, path_of
from specrag.cli.console import counting, training_shown, working
from specrag.cli.loading import load_model
from specrag.errors import InvalidInputError

if TYPE_CHECKING:
    from specrag.evaluation.records import Question
    from specrag.models import TransformersLM
    from specrag.speculative.prompts import Prompts
    from specrag.training import Example, TrainingSettings


@dataclass(frozen=True, kw_only=True)
class DrafterTraining:
    """What a drafter is trained on, and how.

    Args:
        used, held: Records to train on, and to evaluate with.
        base: A bundled model's name, a folder, a ``.gguf`` file or a hub id.
        adapter: LoRA of the base to go on from: a folder, or a bundled adapter's name.
        settings: Of the training.
        substituted: Share of examples with another record's answer in the answer's place.
        rationales: The model that writes them; by default they are sentences of the passages.
        rounds: Over the data.
        verdict: Train on what the drafter itself drafts: it learns to say whether that is right.
        models: Where the bundled models are; by default the user's cache.
    """

    used: Sequence[Question]
    held: Sequence[Question]
    base: str
    adapter: str | None
    settings: TrainingSettings
    substituted: float
    rationales: str | None
    rounds: int
    verdict: bool
    models: Path | None

    def run(self, output: Path, card: Mapping[str, str]) -> None:
        """Train, evaluate, and write the drafter with its model card into ``output``.

        Raises:
            SpecRAGError: A setting is wrong, a model is not there, or the data cannot be used.
        """
        from specrag.models import bundled
        from specrag.training import Mixture, make_examples, train

        if self.verdict:
            self._check_verdict()
        embedder = bundled("minilm", folder=self.models)
        written = self._write_rationales(output / "rationales.jsonl") if self.rationales else {}
        seed, prompts = self.settings.seed, self._prompts()
        with working("making examples"):
            mixture = Mixture(substituted=self.substituted)
            rounds = make_examples(
                self.used,
                embedder,
                variants=self.rounds,
                mixture=mixture,
                rationales=written,
                prompts=prompts,
                seed=seed,
            )
            others = [passage for record in self.used for passage in record.passages]
            held = (
                make_examples(self.held, embedder, corpus=others, prompts=prompts, seed=seed + 1)[0]
                if self.held
                else []
            )
        if self.verdict:
            rounds = self._judged(rounds, prompts, output / "drafts.jsonl")
            card = {**card, "drafts judged": _counted(rounds)}
        with working("loading models"):
            lm = self._base()
        with training_shown() as report:
            train(
                lm,
                rounds,
                output,
                settings=self.settings,
                held=held,
                adapter=self._adapter_folder(),
                prompts=prompts,
                card=card,
                progress=report,
            )

    def _check_verdict(self) -> None:
        """Whether there is a drafter to teach, before it drafts for minutes.

        Raises:
            InvalidInputError: There is none, or an option does not go with ``--verdict``.
            SpecRAGError: What trains is not installed.
        """
        from specrag.speculative.prompts import Prompts
        from specrag.training.trainer import check_peft

        if self.rationales:
            raise InvalidInputError("--verdict learns from the drafter's own rationales: leave --rationales out")
        if self.adapter is None and Prompts.of_drafter(Path(self.base)) is None:
            raise InvalidInputError(
                "--verdict is taught to a drafter: give its --adapter, e.g. smollm2-rag-drafter, or as --base the "
                "folder of one that `specrag train --full` made"
            )
        if self.adapter is not None and self.settings.method == "full":
            raise InvalidInputError("--adapter is trained on as a LoRA: leave --full out")
        if self.settings.method == "lora":
            check_peft()

    def _prompts(self) -> Prompts:
        """What the drafter sees: as it was trained, where it was."""
        from specrag.speculative.prompts import VERDICT_HEADER, Prompts

        own = Prompts.of_drafter(self._adapter_folder() or Path(self.base)) or Prompts()
        return replace(own, verdict_header=VERDICT_HEADER) if self.verdict else own

    def _judged(self, rounds: Sequence[Sequence[Example]], prompts: Prompts, cache: Path) -> list[list[Example]]:
        """The examples with the drafter's own drafts in them."""
        from specrag.training import judged_drafts

        folder = self._adapter_folder()
        with working("loading models"):
            lm = self._base(adapter=folder)
        # One that was trained anew in the same folder drafts otherwise.
        version = "" if folder is None else digest(folder / "adapter_model.safetensors")
        made = []
        for number, examples in enumerate(rounds):
            seed = self.settings.seed + number
            with counting("drafting") as update:
                made.append(
                    judged_drafts(examples, lm, cache, prompts=prompts, seed=seed, version=version, progress=update)
                )
        return made

    def _base(self, adapter: Path | None = None) -> TransformersLM:
        from specrag.models import TransformersLM, bundled

        if self.base == "smollm2":
            return bundled("smollm2", folder=self.models, adapter=adapter)
        return TransformersLM(self.base, adapter=adapter)

    def _adapter_folder(self) -> Path | None:
        from specrag.models.bundled import ADAPTERS, adapter_folder

        if self.adapter is None:
            return None
        return adapter_folder(self.adapter) if self.adapter in ADAPTERS else path_of(self.adapter)

    def _write_rationales(self, cache: Path) -> dict[str, str]:
        from specrag.training import synthesize_rationales

        assert self.rationales is not None
        with counting("writing rationales") as update:
            model = load_model(self.rationales, None, models=self.models)
            return synthesize_rationales(self.used, model, cache, progress=update)


def _counted(rounds: Sequence[Sequence[Example]]) -> str:
    """How many drafts were judged, for the model card."""
    verdicts = [example.verdict for examples in rounds for example in examples if example.verdict is not None]
    return f"{sum(verdicts)} right, {len(verdicts) - sum(verdicts)} wrong"
