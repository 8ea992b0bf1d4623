"""Compiles the C sources of the engine, once per version, CPU and machine, into the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from specrag._files import put, scratch, turn_of

SOURCES = Path(__file__).parent

_OPTIONS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread")
_TIME_LIMIT = 600  # seconds; it takes five to thirty

# What the sources use, by the names of /proc/cpuinfo and of the compilers.
AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
AVX512 = {"avx512f": "-mavx512f", "avx512bw": "-mavx512bw", "avx512dq": "-mavx512dq", "avx512vl": "-mavx512vl"}
_FURTHER = {"avx512_vnni": "-mavx512vnni", "avx512_bf16": "-mavx512bf16"}


class BuildError(Exception):
    """There is no library, and this is why."""


class CompilerError(BuildError):
    """A compiler is there, and it failed."""


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The compiler's options for the instructions that this CPU has and the sources use.

    Raises:
        BuildError: Not Linux on x86-64, or a CPU without AVX2.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise BuildError(f"there is no native engine for {sys.platform} on {platform.machine()}")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    has = set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
    if not has >= set(AVX2):
        raise BuildError("this CPU has no AVX2")
    flags = tuple(AVX2.values())
    if has >= set(AVX512):
        flags += (*AVX512.values(), *(flag for name, flag in _FURTHER.items() if name in has))
    return flags


def compiled(flags: Sequence[str], cache: Path | None = None) -> Path:
    """The library for ``flags``, from the cache or compiled now. One process compiles; the others wait for it.

    Args:
        flags: As ``instructions`` returns them.
        cache: Where compiled libraries are kept; by default the user's cache.

    Raises:
        BuildError: There is no compiler, or it failed.
        OSError: The cache cannot be written.
    """
    folder = cache or Path(platformdirs.user_cache_dir("specrag")) / "native"
    target = folder / file_name(flags)
    if target.exists():
        return target
    compiler = find_compiler()
    with turn_of(target):
        if not target.exists():
            with scratch(target) as work:
                compile_to(work / target.name, flags, compiler)
                put(work / target.name, target)
    return target


def file_name(flags: Sequence[str]) -> str:
    """A name that changes with the sources, the compiler's options, the instructions and the C library."""
    digest = hashlib.sha256(" ".join([*_OPTIONS, *flags, platform.machine(), *platform.libc_ver()]).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + source.read_bytes())
    return f"specrag-{digest.hexdigest()[:16]}.so"


def find_compiler() -> str:
    """The compiler that ``CC`` names, or cc, gcc or clang on the search path.

    Raises:
        BuildError: There is none.
    """
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        raise BuildError("there is no C compiler (cc, gcc or clang)")
    return compiler


def compile_to(target: Path, flags: Sequence[str], compiler: str) -> None:
    """Compile the sources.

    Raises:
        CompilerError: With what the compiler said.
    """
    sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
    command = [compiler, *_OPTIONS, *flags, *sources, "-o", str(target), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIME_LIMIT)
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{compiler} did not end in {_TIME_LIMIT} seconds") from error
    if done.returncode or not target.exists():
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise CompilerError(f"{compiler} could not compile the native engine: {said or 'no message'}")
