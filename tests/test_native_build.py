"""How the native engine is compiled, found, and done without."""

import os
import shutil
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from specrag.engine import native
from specrag.engine.blocks import BlockMatrix, Kind
from specrag.engine.native import build
from specrag.errors import InvalidInputError

GENOA = (
    "flags\t\t: fpu sse avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_vp2intersect\n"
)
LAPTOP = "flags\t\t: fpu sse avx2 fma f16c avx_vnni\n"
OLD = "flags\t\t: fpu sse sse2 avx\n"
AVX2, AVX512 = tuple(build.AVX2.values()), tuple(build.AVX512.values())


@pytest.fixture
def without_engine(monkeypatch, tmp_path):
    """This process as on a machine that has no compiler and has never compiled anything."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._found.cache_clear()
    yield
    native._found.cache_clear()


def fake_compiler(folder, script):
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\necho run >> {folder / 'runs'}\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (GENOA, (*AVX2, *AVX512, "-mavx512vnni", "-mavx512bf16")),
        (GENOA.replace(" avx512_bf16", ""), (*AVX2, *AVX512, "-mavx512vnni")),
        (LAPTOP, AVX2),
    ],
)
def test_the_library_uses_the_instructions_that_the_cpu_has(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}", encoding="utf-8")
    assert build.instructions(tmp_path / "cpuinfo") == expected


@pytest.mark.parametrize(
    ("system", "machine", "flags", "message"),
    [
        ("darwin", "arm64", GENOA, "no native engine for darwin on arm64"),
        ("linux", "aarch64", GENOA, "for linux on aarch64"),
        ("linux", "x86_64", OLD, "no AVX2"),
        ("linux", "x86_64", "", "no AVX2"),
    ],
)
def test_other_machines_have_none(tmp_path, monkeypatch, system, machine, flags, message):
    monkeypatch.setattr(build.sys, "platform", system)
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    (tmp_path / "cpuinfo").write_text(flags, encoding="utf-8")
    with pytest.raises(build.BuildError, match=message):
        build.instructions(tmp_path / "cpuinfo")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that writes "made" in place of a library: ``compiler(script)`` to make it do something else before."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CC", raising=False)

    def write(script=""):
        fake_compiler(tmp_path, f'{script}\nwhile [ "$1" != -o ]; do shift; done; echo made > "$2"')

    write()
    return write


def test_it_is_compiled_once_for_each_cpu(tmp_path, compiler):
    first = build.compiled(AVX2, tmp_path / "cache")
    assert build.compiled(AVX2, tmp_path / "cache") == first
    assert build.compiled((*AVX2, *AVX512), tmp_path / "cache") != first
    assert (tmp_path / "runs").read_text().count("run") == 2
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".so", ".so"]


def test_those_who_need_it_at_once_wait_for_one_compiler(tmp_path, compiler):
    compiler("sleep 0.3")
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: build.compiled(AVX2, tmp_path / "cache"), range(4)))
    assert len(made) == 1 and made.pop().read_text() == "made\n"
    assert (tmp_path / "runs").read_text().count("run") == 1


def test_other_sources_have_another_library(tmp_path, monkeypatch):
    before = build.file_name(AVX2)
    shutil.copytree(build.SOURCES, tmp_path / "native")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "native")
    assert build.file_name(AVX2) == before
    with (tmp_path / "native" / "simd.h").open("a") as file:
        file.write("/* newer */\n")
    assert build.file_name(AVX2) != before
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("glibc", "1.0"))
    assert build.file_name(AVX2) != before


def test_a_compiler_that_fails_says_why_and_leaves_nothing(tmp_path, compiler):
    compiler("echo 'In file blocks.h:' >&2; echo 'blocks.h:7: error: no such luck' >&2; exit 1")
    with pytest.raises(build.CompilerError, match=r"could not compile the native engine: blocks\.h:7: error: no such"):
        build.compiled(AVX2, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_fails_warns_once_and_torch_serves(tmp_path, compiler, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "instructions", lambda: AVX2)
    native._found.cache_clear()
    compiler("echo 'error: no such luck' >&2; exit 1")
    try:
        with pytest.warns(RuntimeWarning, match="error: no such luck; models run in torch"):
            assert native.library() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native.library() is None
    finally:
        native._found.cache_clear()


def test_without_a_compiler_there_is_none_and_blocks_say_so(without_engine):
    assert native.library() is None
    assert "no C compiler" in native.unavailable() or "no native engine for" in native.unavailable()
    with pytest.raises(InvalidInputError, match="blocks need the native engine: there is no"):
        BlockMatrix(Kind.Q8_0, 16, 32)


def test_a_file_that_is_no_library_is_reported(without_engine, monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not ELF")
    monkeypatch.setattr(native, "compiled", lambda flags: broken)
    monkeypatch.setattr(native, "instructions", lambda: ())
    assert native.library() is None
    assert "broken.so" in native.unavailable()
