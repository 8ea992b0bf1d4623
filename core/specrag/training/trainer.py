"""Training a drafter: LoRA by default, full fine-tuning by flag, on transformers' Trainer and peft.

The seed fixes the order of the examples before training begins.
A killed run therefore continues from its last checkpoint to the same result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from specrag._files import path_of
from specrag.engine.lora import adapter_files, read_lora
from specrag.engine.onednn import unpack
from specrag.engine.tensor_files import save_checked
from specrag.errors import InvalidInputError, SpecRAGError
from specrag.models.transformers import TransformersLM
from specrag.speculative.drafting import Drafter
from specrag.speculative.prompts import Prompts
from specrag.training.arguments import training_arguments
from specrag.training.checkpoints import SealCheckpoints, StopWhenDiverged, check_finite, claimed, results
from specrag.training.examples import IGNORED, EncodedExample, Example, encode_example, in_batches
from specrag.training.model_card import write_card
from specrag.training.quality import evaluate_drafter
from specrag.training.settings import TrainingSettings

# Every linear layer of the supported architectures.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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

    Checkpoints are in ``output/checkpoints``. When a run with the same examples and settings left some there,
    training continues from the last one, and the result is that of a run without interruption.

    Args:
        base: In float32 or bfloat16, not quantized. It is changed in place.
        rounds: Examples by epoch (``make_examples``).
        held: Examples to evaluate on, not trained on.
        adapter: Folder of a LoRA of ``base`` to continue from, with its rank and alpha; by default a new one.
        card: Added to the model card: data, licence.
        progress: Called with (step, steps, what was logged).

    Raises:
        InvalidInputError: No example fits, the checkpoints are another run's or another process trains with them, or
            the adapter is another model's.
        SpecRAGError: peft is not installed, the disk is full, or the loss became NaN.
    """
    if base.quantization:
        raise InvalidInputError(f"a quantized model cannot be trained: load {base.name} without quantization")
    if adapter is not None and settings.method != "lora":
        raise InvalidInputError(
            "an adapter is trained on as a LoRA: leave method='full', or merge it into the base first"
        )
    output = path_of(output)
    data, left_out = _encoded(base, rounds, prompts, settings)
    with claimed(output / "checkpoints", _content(data, settings, adapter)) as resumed:
        unpack(base.model)
        torch.manual_seed(settings.seed)
        model = _with_lora(base.model, settings, adapter) if settings.method == "lora" else base.model
        watch = _Watch(base, held, prompts, settings.evaluation_steps, progress)
        arguments = training_arguments(
            output / "checkpoints",
            settings,
            base.device,
            learning_rate=settings.peak,
            weight_decay=0.0,
            per_device_train_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
            logging_steps=10,
        )
        metrics = _fit(base, model, data, arguments, watch, resumed)
        quality = evaluate_drafter(base, held, prompts) if held else None
        with results(output, last="model" if settings.method == "full" else "adapter_model") as folder:
            _save(model, base, folder, settings)
            prompts.save_drafting(folder)
            write_card(folder, base, settings, len(data), left_out, metrics, quality, card or {})
    return output


def _fit(
    base: TransformersLM,
    model: Any,
    data: Sequence[EncodedExample],
    arguments: TrainingArguments,
    watch: TrainerCallback,
    resumed: str | None,
) -> Mapping[str, float]:
    """Train ``model``, which is ``base`` or wraps it; what was measured over the run."""
    base.model.train()
    base.model.config.use_cache = False
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_Examples(data),  # type: ignore[arg-type]
        data_collator=Collator(pad=_end_token(base)),
        callbacks=[watch, StopWhenDiverged(), SealCheckpoints()],
    )
    trainer.remove_callback(PrinterCallback)  # `progress` reports what is logged
    metrics: Mapping[str, float] = trainer.train(resume_from_checkpoint=resumed).metrics
    base.model.eval()
    base.model.config.use_cache = True
    return metrics


def _encoded(
    base: TransformersLM, rounds: Sequence[Sequence[Example]], prompts: Prompts, settings: TrainingSettings
) -> tuple[list[EncodedExample], int]:
    """The examples as tokens, in the order of training, and how many were too long and are left out."""
    drafter, end = Drafter(base, prompts), _end_token(base)
    encoded = [[encode_example(e, drafter, base.encoder, end) for e in part] for part in rounds]
    fitting = [[e for e in part if len(e.ids) <= settings.max_tokens] for part in encoded]
    data = in_batches(fitting, settings.micro_batch_size, settings.seed)
    if not data:
        raise InvalidInputError(f"no example has at most max_tokens={settings.max_tokens} tokens")
    return data, sum(map(len, encoded)) - sum(map(len, fitting))


def _end_token(base: TransformersLM) -> int:
    """The token that ends a draft: the end of the sequence, or else the end of the assistant's turn."""
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
    """Pads a batch on the right: causal attention then needs no mask, and no row is without a key.

    A row whose keys are all masked, as padding on the left makes it, is NaN in some CUDA kernels.
    ``labels`` are those of the last positions, from the first one that has a loss in any example.
    Lengths are rounded up, because oneDNN compiles and caches a kernel for each new shape.
    """

    pad: int

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        longest = _rounded(max(len(e.ids) for e in examples), 32)
        before = min(len(e.ids) - e.completion for e in examples)  # tokens without a loss, in every example
        kept = min(_rounded(longest - before, 16), longest - 1)
        ids = torch.full((len(examples), longest), self.pad)
        labels = torch.full((len(examples), longest), IGNORED)
        for i, e in enumerate(examples):
            ids[i, : len(e.ids)] = torch.tensor(e.ids)
            labels[i, : len(e.ids)] = torch.tensor(e.labels)
        return {"input_ids": ids, "labels": labels[:, longest - kept :]}


def _rounded(length: int, to: int) -> int:
    return -(-length // to) * to


def completion_loss(model: Any, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
    """The summed loss of a batch that ``Collator`` made, in nats, and the model's outputs.

    Args:
        input_ids: [batch, length].
        labels: [batch, kept], of the last ``kept`` positions. Logits are computed for these alone.
    """
    outputs = model(input_ids=input_ids, logits_to_keep=labels.shape[1] + 1, use_cache=False)
    logits = outputs.logits[:, :-1].float()  # position i predicts label i
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    return loss, outputs


class _Trainer(Trainer):  # type: ignore[misc]
    """Loss over the completions alone; logits are computed for no other position."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = True  # the loss is a sum over the whole batch's labels: see compute_loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        loss, outputs = completion_loss(model, **inputs)
        loss = loss / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        check_finite([loss.detach()], "loss", self.state.global_step + 1)
        return (loss, outputs) if return_outputs else loss


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports what is logged, and evaluates on the held part every ``every`` steps."""

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


def check_peft() -> None:
    """Whether a LoRA can be trained.

    Raises:
        SpecRAGError: peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise SpecRAGError("training a LoRA needs peft: pip install 'specrag[train]'") from error


def _with_lora(model: Any, settings: TrainingSettings, adapter: str | Path | None) -> Any:
    check_peft()
    from peft import LoraConfig, PeftModel, get_peft_model

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


def _content(data: Sequence[EncodedExample], settings: TrainingSettings, adapter: str | Path | None) -> bytes:
    """What identifies a run: its settings, its examples and the adapter that it starts from."""
    content = json.dumps([dataclasses.asdict(settings), [[e.ids, e.labels] for e in data]], sort_keys=True).encode()
    if adapter is not None:
        adapter_files(adapter)  # what cannot be read is refused here
        content += (path_of(adapter) / "adapter_model.safetensors").read_bytes()
    return content


def _save(model: Any, base: TransformersLM, output: Path, settings: TrainingSettings) -> None:
    if settings.method == "full":
        model.save_pretrained(output)
        base.tokenizer.save_pretrained(output)
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(output)
    weights = output / "adapter_model.safetensors"
    save_checked(load_file(weights), weights)
    card = output / "README.md"
    card.unlink(missing_ok=True)  # peft's template; ours follows
