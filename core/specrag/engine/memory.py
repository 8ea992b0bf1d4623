"""How much memory is free, and whether a failure is a lack of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from specrag.errors import ModelError

# What torch's allocators say where they raise a plain RuntimeError.
_WORDS = ("not enough memory", "can't allocate memory", "out of memory")
# What is needed may exceed what is free by this share. Both figures are estimates, and a wrong refusal is worse.
_TOLERANCE = 0.1
# The environment variable that switches the check off, with the value 0.
_SWITCH = "SPECRAG_MEMORY_CHECK"
# Where Linux tells of memory, and of control groups, which limit the memory of containers.
_MEMINFO, _OWN_GROUPS, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Statistics of the cache of ZFS. The system drops it when memory is needed, but does not count it as available.
_ZFS = Path("/proc/spl/kstat/zfs/arcstats")
# What the system drops when memory is needed: pages of files, and what it knows of them. Version 1 of control groups
# has other names for the pages, which begin with "total_".
_DROPPED = ("inactive_file", "active_file", "slab_reclaimable")


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that no more memory could be allocated, on any device."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(w in str(error) for w in _WORDS))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; ``None`` where the system does not tell.

    On the CPU: what Linux can free without swapping, at most what the process's control groups leave, and free swap.
    On CUDA: what the device has free, and what torch holds unused. A GPU that shares the CPU's memory has at least what
    is free there.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        if getattr(torch.cuda.get_device_properties(device), "is_integrated", False):
            free = max(free, _free_on_cpu() or 0)  # CUDA does not count what Linux can free
        return free
    return _free_on_cpu() if device.type == "cpu" else None


def _free_on_cpu() -> int | None:
    known = _figures(_MEMINFO)
    if "MemAvailable" not in known:
        return None
    available = known["MemAvailable"] + _cached_by_zfs()
    return (min([available, *_left_by_groups()]) + known.get("SwapFree", 0)) * 1024


def check_room(needed: int, device: torch.device, what: str, advice: str) -> None:
    """Check that ``needed`` bytes can be allocated. Where the system does not tell what is free, they are allowed.

    With ``SPECRAG_MEMORY_CHECK=0`` in the environment, they always are.

    Args:
        what: What they are for, in the plural: "the weights of x".
        advice: What to do when they are too many.

    Raises:
        ModelError: They cannot; with both figures.
    """
    free = free_memory(device)
    if free is not None and needed > free * (1 + _TOLERANCE) and os.environ.get(_SWITCH) != "0":
        raise ModelError(
            f"{what} need {_size(needed)} of memory, {_size(free)} are free on {device}: {advice}. "
            f"To try it all the same, set {_SWITCH}=0"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _figures(file: Path, column: int = 1) -> dict[str, int]:
    """The numbers of a file with lines such as "MemAvailable:  16294204 kB" or "active_file 4096"; none without it."""
    try:
        lines = [line.replace(":", " ").split() for line in file.read_text(errors="replace").splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[column]) for line in lines if len(line) > column and line[column].isdigit()}


def _cached_by_zfs() -> int:
    """KiB that ZFS would give back. The lines have a name, a type and a number."""
    known = _figures(_ZFS, 2)
    return max(0, known.get("size", 0) - known.get("c_min", 0)) // 1024


def _left_by_groups() -> Iterator[int]:
    """KiB that each control group of this process leaves."""
    try:
        lines = _OWN_GROUPS.read_text(errors="replace").splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if number == "0":
            names, root = ("memory.max", "memory.current"), _GROUPS
        elif "memory" in controllers.split(","):
            names, root = ("memory.limit_in_bytes", "memory.usage_in_bytes"), _GROUPS / "memory"
        else:
            continue
        own = root / path.lstrip("/")
        # A container may see its own group at the root, under any path.
        for group in {own, *own.parents} if own.is_relative_to(root) else {root}:
            if group.is_relative_to(root):
                yield from _left_by_group(group, *names)


def _left_by_group(group: Path, limit: str, usage: str) -> Iterator[int]:
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return
    statistics = _figures(group / "memory.stat")
    dropped = sum(statistics.get(f"total_{name}", statistics.get(name, 0)) for name in _DROPPED)
    yield max(0, most - used + dropped) // 1024
