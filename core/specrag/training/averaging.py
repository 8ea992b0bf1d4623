"""The mean of several adapters: a model soup (Wortsman et al., arXiv 2203.05482).

The mean is one adapter, so it costs no more to run than one of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from specrag._files import path_of, writing
from specrag.engine.lora import adapter_files
from specrag.engine.tensor_files import save_checked
from specrag.errors import InvalidInputError
from specrag.speculative.prompts import Prompts
from specrag.training.checkpoints import results

# These fields of a config must agree. The others say how the adapter was trained, not what it is.
_SAME = ("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out")


def average_adapters(adapters: Sequence[str | Path], output: str | Path) -> Path:
    """Write the mean of LoRA adapters' factors, in their own dtype, with the config and the prompts of the first.

    A mean of factors approximates the mean of the weight updates only for related adapters: one was trained from
    the other (``train(adapter=...)``), or all from the same one.

    Args:
        adapters: Folders, at least two.
        output: A folder, which is created if needed. It must not be one of ``adapters``.

    Raises:
        ModelNotFoundError: An adapter cannot be read.
        InvalidInputError: They differ in shape or in the prompts that they were trained with.
    """
    folders, output = [path_of(adapter) for adapter in adapters], path_of(output)
    if len(folders) < 2:
        raise InvalidInputError(f"a mean needs at least two adapters, got {len(folders)}")
    if output.resolve() in {folder.resolve() for folder in folders}:
        raise InvalidInputError(f"{output} is one of the adapters: give another folder for their mean")
    first, *others = [adapter_files(folder) for folder in folders]
    prompts = [Prompts.of_drafter(folder) for folder in folders]
    for folder, (config, tensors) in zip(folders[1:], others, strict=True):
        if {name: config.get(name) for name in _SAME} != {name: first[0].get(name) for name in _SAME} or (
            {name: tensor.shape for name, tensor in tensors.items()}
            != {name: tensor.shape for name, tensor in first[1].items()}
        ):
            raise InvalidInputError(f"the adapters in {folders[0]} and {folder} differ in shape, rank or scale")
    if len(set(prompts)) > 1:
        raise InvalidInputError("the adapters were trained with different prompts: each drafts badly with another's")
    mean = {}
    for name, tensor in first[1].items():
        stacked = torch.stack([tensors[name].float() for _, tensors in (first, *others)])
        mean[name] = stacked.mean(0).to(tensor.dtype).contiguous()
    with writing(output), results(output, last="adapter_model") as folder:
        save_checked(mean, folder / "adapter_model.safetensors")
        shutil.copyfile(folders[0] / "adapter_config.json", folder / "adapter_config.json")
        if prompts[0] is not None:
            prompts[0].save_drafting(folder)
    return output
