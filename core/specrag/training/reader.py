"""Training a span reader: shared normalisation over a question's passages, on transformers' Trainer.

The loss of a question is minus the log-probability of all its right spans together.
The probabilities are normalised over the spans of all its passages and "no answer" (Clark and Gardner,
arXiv 1710.10723, section 3.2).
The seed fixes the order of the examples before training begins.
A killed run therefore continues from its last checkpoint to the same result.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback

from specrag._files import path_of
from specrag.engine.tensor_files import save_checked
from specrag.errors import InvalidInputError, SpecRAGError, kind_of
from specrag.models.bundled import READER_SETTINGS
from specrag.models.reader import ADAPTER_FILE, grouped_logsumexp, shared_log_normalizer, span_scores
from specrag.training.arguments import training_arguments
from specrag.training.checkpoints import SealCheckpoints, StopWhenDiverged, check_finite, claimed, results
from specrag.training.reader_batches import ReaderCollator, in_order
from specrag.training.reader_examples import ReaderExample
from specrag.training.settings import check_learning_rate

# The module that gives a token its two logits, in every AutoModelForQuestionAnswering.
_HEAD = "qa_outputs"
_AVERAGE_FILE = "average.safetensors"
# Arguments of this training alone; an entry of the data is a whole batch.
_OWN = {"weight_decay": 0.01, "per_device_train_batch_size": 1, "logging_steps": 20}


@dataclass(frozen=True, kw_only=True)
class ReaderSettings:
    """How a reader is trained.

    Args:
        learning_rate: The peak, reached after the share ``warmup`` of the steps; it then falls to 0 as a cosine.
        rows: The most passages per step of the optimiser.
        max_tokens: Of question and passage together; the end of a longer passage is cut off.
        longest: The most tokens of a span.
        averaging: Decay of the running mean of the weights, which becomes the result; 0 keeps the last weights.
        train_embeddings: Train the embeddings too (with ``method="full"``). Frozen embeddings need not be shipped.
        method: ``"full"`` trains all weights; ``"lora"`` trains low-rank updates of the encoder's linear layers, for
            large encoders.
        rank, alpha: Of the LoRA; the update is scaled by alpha / rank.
        checkpoint_steps: Steps between checkpoints. A killed run loses at most this many.
        precision: ``"auto"`` computes in bfloat16 where the hardware multiplies it, with float32 weights.
    """

    learning_rate: float = 3e-4
    warmup: float = 0.05
    rows: int = 64
    max_tokens: int = 224
    longest: int = 24
    averaging: float = 0.998
    train_embeddings: bool = False
    method: Literal["full", "lora"] = "full"
    rank: int = 16
    alpha: int = 32
    checkpoint_steps: int = 100
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_learning_rate(self.learning_rate)
        for name in ("rows", "max_tokens", "longest", "checkpoint_steps", "rank", "alpha"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.method not in ("full", "lora"):
            raise InvalidInputError(f"method must be 'full' or 'lora', got {self.method!r}")
        if not 0 <= self.averaging < 1:
            raise InvalidInputError(f"averaging must lie in [0, 1), got {self.averaging}")


def reader_loss(
    start_logits: Tensor,  # [rows, tokens]
    end_logits: Tensor,  # [rows, tokens]
    inside: Tensor,  # [rows, tokens], bool
    questions: Tensor,  # [rows], from 0
    gold: Tensor,  # [spans, 3]: row, first token, width - 1
    longest: int,
) -> Tensor:  # []
    """Minus log P of each question's right spans together, mean over questions, in nats.

    Where no span is right, it is minus log P of "no answer".
    """
    scores = span_scores(start_logits, end_logits, inside, inside, longest)
    count = int(questions.max()) + 1
    normalizer = shared_log_normalizer(scores, questions, count)
    answered = torch.zeros(count, dtype=torch.bool, device=scores.device)
    answered[questions[gold[:, 0]]] = True
    right = grouped_logsumexp(scores[gold[:, 0], gold[:, 1], gold[:, 2]], questions[gold[:, 0]], count)
    return (normalizer - torch.where(answered, right, 0.0)).mean()


def train_reader(
    model: Any,
    tokenizer: Any,
    rounds: Sequence[Sequence[ReaderExample]],
    output: str | Path,
    *,
    settings: ReaderSettings = ReaderSettings(),
    base: str | None = None,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    evaluation_steps: int = 0,
) -> Path:
    """Train a question-answering encoder; returns ``output``, an adapter of its base (``load_reader(output)``).

    Checkpoints are in ``output/checkpoints``. When a run with the same examples and settings left some there,
    training continues from the last one, and the result is that of a run without interruption.

    Args:
        model, tokenizer: Of transformers. The model is changed in place; the tokenizer must be a fast one.
        rounds: Examples by epoch (``make_reader_examples``).
        base: What ``load_reader`` loads the base from: a bundled model's name, a folder or a hub id. By default where
            ``model`` came from.
        progress: Called with (step, steps, what was logged).
        evaluate: Called with the averaged model every ``evaluation_steps`` steps; its result goes to ``progress``.

    Raises:
        InvalidInputError: There is nothing to train on, the checkpoints are another run's, or the tokenizer is slow.
        SpecRAGError: The loss became NaN.
    """
    output = path_of(output)
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidInputError(f"{kind_of(tokenizer)} gives no character offsets: load a fast tokenizer")
    batches = in_order(rounds, settings.rows, settings.seed)
    if not batches:
        raise InvalidInputError("there are no examples to train on")
    checkpoints = output / "checkpoints"
    content = json.dumps(
        [dataclasses.asdict(settings), [[e.question, [p.text for p in e.passages]] for b in batches for e in b]]
    )
    with claimed(checkpoints, content.encode()) as resumed:
        torch.manual_seed(settings.seed)
        trained = _trainable(model, settings).train()
        average = _Average(trained, settings.averaging, resumed)
        report = _Report(average, progress, evaluate, evaluation_steps)
        trainer = _ReaderTrainer(
            longest=settings.longest,
            model=trained,
            args=training_arguments(checkpoints, settings, model.device, learning_rate=settings.learning_rate, **_OWN),
            train_dataset=_Batches(batches),  # type: ignore[arg-type]
            data_collator=ReaderCollator(tokenizer, settings.max_tokens, settings.longest),
            callbacks=[average, report, StopWhenDiverged(), SealCheckpoints()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resumed)
        average.into(trained)
        trained.eval()
        with results(output, last=ADAPTER_FILE) as folder:
            save_reader(trained, folder, settings, base or str(model.name_or_path))
    return output


def _trainable(model: Any, settings: ReaderSettings) -> Any:
    """``model`` with all weights that are trained, and no others, asking for gradients."""
    if settings.method == "lora":
        return with_lora(model, settings)
    if not settings.train_embeddings:
        for parameter in model.base_model.embeddings.parameters():
            parameter.requires_grad_(False)
    return model


def with_lora(model: Any, settings: ReaderSettings) -> Any:
    """``model`` with LoRA factors in every linear layer of its encoder; they and the head are what is trained.

    Raises:
        SpecRAGError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SpecRAGError("training a LoRA needs peft: pip install 'specrag[train]'") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    encoder = [name for name in linear if name != _HEAD]
    wrapped = get_peft_model(
        model, LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=encoder, lora_dropout=0.0)
    )
    for parameter in model.get_submodule(_HEAD).parameters():
        parameter.requires_grad_(True)
    return wrapped


def save_reader(model: Any, output: Path, settings: ReaderSettings, base: str) -> None:
    """Write what was trained, in half precision: the LoRA in peft's format, the other weights in ``ADAPTER_FILE``.

    ``base`` is what ``load_reader`` loads the base from.
    """
    output.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if settings.method == "lora":
        model.save_pretrained(output)
        (output / "README.md").unlink(missing_ok=True)  # peft's template
        trained = {name.removeprefix("base_model.model."): p for name, p in trained.items() if "lora_" not in name}
    save_checked({name: p.half().contiguous() for name, p in trained.items()}, output / ADAPTER_FILE)
    facts = {"base": base, "longest": settings.longest}
    (output / READER_SETTINGS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


class _Batches(torch.utils.data.Dataset[list[ReaderExample]]):
    def __init__(self, batches: Sequence[list[ReaderExample]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: int) -> list[ReaderExample]:
        return self._batches[i]


class _ReaderTrainer(Trainer):  # type: ignore[misc]
    def __init__(self, *, longest: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._longest = longest

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tokens = inputs["inside"].shape[1]
        starts: list[Tensor] = []
        ends: list[Tensor] = []
        for part in inputs["parts"]:
            count = int(part.pop("rows"))
            outputs = model(**part)
            for logits, kept in ((outputs.start_logits, starts), (outputs.end_logits, ends)):
                kept.append(torch.nn.functional.pad(logits[:count].float(), (0, tokens - logits.shape[1])))
        loss = reader_loss(
            torch.cat(starts), torch.cat(ends), inputs["inside"], inputs["questions"], inputs["gold"], self._longest
        )
        check_finite([loss.detach()], "loss", self.state.global_step + 1)
        return (loss, {}) if return_outputs else loss


class _Average(TrainerCallback):  # type: ignore[misc]
    """The exponential mean of the trained weights (Polyak averaging), kept in each checkpoint beside the weights.

    The weights themselves are kept too: for a LoRA, the trainer's checkpoint holds the factors alone, not the head.
    """

    def __init__(self, model: Any, decay: float, resumed: str | None) -> None:
        self._decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._kept = load_file(Path(resumed) / _AVERAGE_FILE) if resumed is not None else {}
        self.mean = {name: self._kept.get(f"mean.{name}", p.detach()).clone() for name, p in self._trained.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self._kept.get(f"own.{name}", parameter))
        self._kept = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        decay = min(self._decay, state.global_step / (state.global_step + 10))  # early weights fade quickly
        with torch.no_grad():
            for name, parameter in self._trained.items():
                self.mean[name].lerp_(parameter, 1 - decay)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = {f"mean.{name}": value for name, value in self.mean.items()}
        kept |= {f"own.{name}": p.detach().contiguous() for name, p in self._trained.items()}
        save_file(kept, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _AVERAGE_FILE)

    def into(self, model: Any) -> None:
        """Copy the mean into the weights of ``model``, which has the same architecture."""
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, value in self.mean.items():
                parameters[name].copy_(value)


class _Report(TrainerCallback):  # type: ignore[misc]
    def __init__(self, average: _Average, progress: Any, evaluate: Any, every: int) -> None:
        self._average, self._evaluate, self._every = average, evaluate, every
        self._progress = progress or (lambda step, steps, logged: None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps, logs or {})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps, {})
        if self._every and self._evaluate is not None and state.global_step % self._every == 0:
            examined = copy.deepcopy(model).eval()
            self._average.into(examined)
            self._progress(state.global_step, state.max_steps, self._evaluate(examined))
