"""Training a drafter: LoRA by default, full fine-tuning by flag, on transformers' Trainer and peft.

The order of the examples is fixed by the seed before training begins, so a run that is killed goes on from its
last checkpoint to the same end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from specrag.engine.lora import read_lora
from specrag.engine.onednn import multiplies_bfloat16, unpack
from specrag.errors import InvalidInputError, SpecRAGError
from specrag.evaluation.metrics import contains_answer, wilson_interval
from specrag.models.base import LanguageModel
from specrag.models.transformers import TransformersLM
from specrag.speculative.drafting import Drafter
from specrag.speculative.prompts import Prompts
from specrag.training.examples import IGNORED, EncodedExample, Example, encode_example, in_batches

# Every linear layer of the supported architectures.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a drafter is trained.

    Args:
        method: ``"lora"`` or ``"full"`` (all weights).
        rank, alpha: Of the LoRA; the update is scaled by alpha / rank.
        learning_rate: Peak, reached after ``warmup`` of the steps, then falling to 0 as a cosine; by default
            5e-4 for LoRA and 1e-4 for full fine-tuning.
        batch_size: Examples a step of the optimiser.
        micro_batch_size: Examples in memory at once; gradients accumulate up to ``batch_size``.
        max_tokens: Longer examples are left out.
        checkpoint_steps: Steps between checkpoints; what a kill can cost.
        evaluation_steps: Steps between evaluations on the held part; 0: at the end only.
        precision: ``"auto"``: bfloat16 where the hardware multiplies it, with float32 weights.
    """

    method: Literal["lora", "full"] = "lora"
    rank: int = 32
    alpha: int = 64
    learning_rate: float | None = None
    warmup: float = 0.05
    batch_size: int = 8
    micro_batch_size: int = 8
    max_tokens: int = 1024
    checkpoint_steps: int = 50
    evaluation_steps: int = 0
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise InvalidInputError(f"method must be 'lora' or 'full', got {self.method!r}")
        for name in ("rank", "alpha", "batch_size", "micro_batch_size", "max_tokens", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.micro_batch_size:
            raise InvalidInputError(
                f"batch_size must be a multiple of micro_batch_size, got {self.batch_size} and {self.micro_batch_size}"
            )

    @property
    def peak(self) -> float:
        return self.learning_rate or (5e-4 if self.method == "lora" else 1e-4)


@dataclass(frozen=True)
class DraftingQuality:
    """How a drafter does on examples: shares of those with an answer, and of those without."""

    answerable: int
    right: float
    wrongly_abstained: float
    unanswerable: int
    rightly_abstained: float
    right_interval: tuple[float, float]


def evaluate_drafter(lm: LanguageModel, examples: Sequence[Example], prompts: Prompts = Prompts()) -> DraftingQuality:
    """Draft every example greedily, as the pipeline would, and count.

    Right: the answer holds one of the example's right answers (containment on the answer's text alone).
    """
    drafter = Drafter(lm, prompts)
    right = lost = kept = 0
    with_answer = sum(example.answerable for example in examples)
    for at in range(0, len(examples), 8):
        group = examples[at : at + 8]
        completions = lm.generate([drafter.request(e.question, e.passages) for e in group])
        for example, completion in zip(group, completions, strict=True):
            text = completion.parts[-1].text
            abstained = prompts.is_abstention(text)
            if example.answerable:
                right += not abstained and contains_answer(text, example.right or [example.answer])
                lost += abstained
            else:
                kept += abstained
    without = len(examples) - with_answer
    return DraftingQuality(
        answerable=with_answer,
        right=right / max(with_answer, 1),
        wrongly_abstained=lost / max(with_answer, 1),
        unanswerable=without,
        rightly_abstained=kept / max(without, 1),
        right_interval=wilson_interval(right, with_answer),
    )


def train(
    base: TransformersLM,
    rounds: Sequence[Sequence[Example]],
    output: str | Path,
    *,
    settings: TrainingSettings = TrainingSettings(),
    held: Sequence[Example] = (),
    adapter: str | Path | None = None,
    prompts: Prompts = Prompts(),
    card: Mapping[str, str] | None = None,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> Path:
    """Train ``base`` to draft; returns the folder of the result: an adapter (LoRA) or a model (full).

    Checkpoints lie in ``output/checkpoints`` while training runs. When they are there at the start, made by the
    same examples and settings, training goes on from the last one, to the same end as if never interrupted.

    Args:
        base: In float32 or bfloat16, not quantized. It is changed in place.
        rounds: Examples by epoch (``make_examples``).
        held: Examples to evaluate on, not trained on.
        adapter: Folder of a LoRA of ``base`` to go on from, with its rank and alpha; by default a new one.
        card: Added to the model card: data, licence.
        progress: Called with (step, steps, what was logged).

    Raises:
        InvalidInputError: No example fits, the checkpoints are another run's, or the adapter is another model's.
        SpecRAGError: peft is not installed.
    """
    if base.quantization:
        raise InvalidInputError(f"a quantized model cannot be trained: load {base.name} without quantization")
    if adapter is not None and settings.method != "lora":
        raise InvalidInputError(
            "an adapter is trained on as a LoRA: leave method='full', or merge it into the base first"
        )
    output = Path(output)
    drafter = Drafter(base, prompts)
    end = _end_token(base)
    encoded = [[encode_example(e, drafter, base.encoder, end) for e in part] for part in rounds]
    fitting = [[e for e in part if len(e.ids) <= settings.max_tokens] for part in encoded]
    left_out = sum(map(len, encoded)) - sum(map(len, fitting))
    data = in_batches(fitting, settings.micro_batch_size, settings.seed)
    if not data:
        raise InvalidInputError(f"no example has at most max_tokens={settings.max_tokens} tokens")
    unpack(base.model)
    checkpoints = output / "checkpoints"
    resumed = claim_checkpoints(checkpoints, _content(data, settings, adapter))
    torch.manual_seed(settings.seed)
    model = _with_lora(base.model, settings, adapter) if settings.method == "lora" else base.model
    base.model.train()
    base.model.config.use_cache = False
    trainer = _Trainer(
        model=model,
        args=_arguments(checkpoints, settings, base.device),
        train_dataset=_Examples(data),  # type: ignore[arg-type]
        data_collator=Collator(pad=end),
        callbacks=[_Watch(base, held, prompts, settings.evaluation_steps, progress)],
    )
    trainer.remove_callback(PrinterCallback)  # `progress` reports what is logged
    result = trainer.train(resume_from_checkpoint=resumed)
    base.model.eval()
    base.model.config.use_cache = True
    quality = evaluate_drafter(base, held, prompts) if held else None
    _save(model, base, output, settings)
    prompts.save_drafting(output)
    _describe(output, base, settings, len(data), left_out, result.metrics, quality, card or {})
    return output


def _end_token(base: TransformersLM) -> int:
    """What closes the assistant's turn, or else ends the sequence."""
    closing = [i for i in base.end_tokens if i != base.tokenizer.eos_token_id]
    return int(base.tokenizer.eos_token_id if base.tokenizer.eos_token_id is not None else closing[0])


class _Examples(torch.utils.data.Dataset[EncodedExample]):
    def __init__(self, examples: Sequence[EncodedExample]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> EncodedExample:
        return self._examples[i]


@dataclass(frozen=True)
class Collator:
    """Left-padded batches: completions end together, so that logits are needed for the last positions only.

    Lengths are rounded up: the CPU's kernels are made anew for every new shape, and kept.
    """

    pad: int

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        longest = _rounded(max(len(e.ids) for e in examples), 32)
        kept = min(_rounded(max(e.completion for e in examples), 16), longest - 1)
        ids = torch.full((len(examples), longest), self.pad)
        mask = torch.zeros(len(examples), longest, dtype=torch.long)
        labels = torch.full((len(examples), kept), IGNORED)
        for i, e in enumerate(examples):
            ids[i, longest - len(e.ids) :] = torch.tensor(e.ids)
            mask[i, longest - len(e.ids) :] = 1
            own = torch.tensor(e.labels[-kept:])
            labels[i, kept - len(own) :] = own
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "labels": labels,
        }


def _rounded(length: int, to: int) -> int:
    return -(-length // to) * to


class _Trainer(Trainer):  # type: ignore[misc]
    """Loss over the completions alone; logits are computed for no other position."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = True  # the loss is a sum over the whole batch's labels: see compute_loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")  # [batch, kept]
        outputs = model(**inputs, logits_to_keep=labels.shape[1] + 1, use_cache=False)
        logits = outputs.logits[:, :-1].float()  # position i predicts label i
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
        )
        loss = loss / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports what is logged, and evaluates on the held part now and then."""

    def __init__(
        self, base: TransformersLM, held: Sequence[Example], prompts: Prompts, every: int, progress: Any
    ) -> None:
        self._base, self._held, self._prompts, self._every = base, held, prompts, every
        self._progress = progress or (lambda step, steps, logged: None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps, logs or {})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps, {})
        if not (self._every and self._held and state.global_step % self._every == 0):
            return
        self._base.model.eval()
        quality = dataclasses.asdict(evaluate_drafter(self._base, self._held, self._prompts))
        self._base.model.train()
        self._progress(state.global_step, state.max_steps, quality)


def _with_lora(model: Any, settings: TrainingSettings, adapter: str | Path | None) -> Any:
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise SpecRAGError("training a LoRA needs peft: pip install 'specrag[train]'") from error
    if adapter is not None:
        read_lora(model, adapter)  # refuses another model's before peft wraps anything
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(LORA_TARGETS),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _arguments(folder: Path, settings: TrainingSettings, device: torch.device) -> TrainingArguments:
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and multiplies_bfloat16(device))
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        learning_rate=settings.peak,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bfloat16,
        use_cpu=device.type == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
        dataloader_pin_memory=device.type == "cuda",
    )


def _content(data: Sequence[EncodedExample], settings: TrainingSettings, adapter: str | Path | None) -> bytes:
    """What makes a run this one."""
    content = json.dumps([dataclasses.asdict(settings), [e.ids for e in data]], sort_keys=True).encode()
    if adapter is not None:
        content += (Path(adapter) / "adapter_model.safetensors").read_bytes()
    return content


def claim_checkpoints(checkpoints: Path, content: bytes) -> str | None:
    """The checkpoint to go on from; the folder is marked as that of the run with ``content`` (examples, settings).

    Raises:
        InvalidInputError: The folder holds another run's checkpoints.
    """
    digest = hashlib.sha256(content).hexdigest()
    mark = checkpoints / "run.json"
    if mark.exists() and json.loads(mark.read_text())["digest"] != digest:
        raise InvalidInputError(
            f"{checkpoints} holds the checkpoints of a run with other examples or settings: remove it or choose another output"
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"digest": digest}))
    done = [p for p in checkpoints.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return str(max(done, key=lambda p: int(p.name.split("-")[1]))) if done else None


def _save(model: Any, base: TransformersLM, output: Path, settings: TrainingSettings) -> None:
    if settings.method == "full":
        model.save_pretrained(output)
        base.tokenizer.save_pretrained(output)
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(output)
    card = output / "README.md"
    card.unlink(missing_ok=True)  # peft's template; ours follows


def _describe(
    output: Path,
    base: TransformersLM,
    settings: TrainingSettings,
    examples: int,
    left_out: int,
    metrics: Mapping[str, float],
    quality: DraftingQuality | None,
    card: Mapping[str, str],
) -> None:
    """The model card, and the same for programs."""
    facts = {
        "base": base.name,
        "settings": dataclasses.asdict(settings),
        "examples": examples,
        "left_out": left_out,
        "training": dict(metrics),
        "held": None if quality is None else dataclasses.asdict(quality),
        "command": shlex.join(sys.argv),
        **card,
    }
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    lines = [f"# A drafter for Speculative RAG, made from {Path(base.name).name}", ""]
    lines += [f"- **{name}**: {text}" for name, text in card.items()]
    lines += [
        f"- **method**: {settings.method}" + (f", rank {settings.rank}" if settings.method == "lora" else ""),
        f"- **examples**: {examples} ({left_out} longer than {settings.max_tokens} tokens left out), "
        f"batches of {settings.batch_size}, peak learning rate {settings.peak:g}",
        f"- **loss** (mean over the run): {metrics.get('train_loss', float('nan')):.3f}",
    ]
    if quality is not None:
        low, high = quality.right_interval
        lines += [
            f"- **held part**: {quality.right:.1%} right of {quality.answerable} that can be answered "
            f"(95 % interval {low:.1%} to {high:.1%}), {quality.wrongly_abstained:.1%} of them abstained; "
            f"{quality.rightly_abstained:.1%} of {quality.unanswerable} that cannot were abstained from"
        ]
    lines += ["", "Made by:", "", f"    {facts['command']}", ""]
    (output / "README.md").write_text("\n".join(lines), encoding="utf-8")
