"""Models and texts that are too large for memory: both figures are said before anything is loaded or read."""

import contextlib
import re
import types

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Format
from safetensors.torch import load_file, save_file

from specrag.engine import memory, native, onednn
from specrag.engine.kv_cache import token_bytes
from specrag.engine.memory import check_room, free_memory
from specrag.errors import ModelError
from specrag.models import TransformersLM, _room
from specrag.models._room import check_weights_fit
from specrag.models._weights import load_model
from specrag.rapid import LongContext
from specrag.rapid.cached_model import CachedModel
from tests.conftest import tiny_llama
from tests.native import needs_native
from tests.rapid_parts import DOCUMENT, generator
from tests.test_gguf_blocks import write_gguf

CPU = torch.device("cpu")
needs_layout = pytest.mark.skipif(not onednn.available(), reason="weights of a file are mapped here, not copied")


@pytest.fixture
def with_free(monkeypatch):
    """``with_free(bytes)``: as if so many were free."""
    return lambda count: monkeypatch.setattr(memory, "free_memory", lambda device: count)


def refused(load) -> float:
    """The bytes that ``load`` needs, as its error says."""
    with pytest.raises(ModelError) as error:
        load()
    said = re.search(r" need ([\d.]+) (MB|GB) of memory, 0.0 MB are free on cpu: (take|give)", str(error.value))
    assert said is not None, str(error.value)
    return float(said[1]) * {"MB": 1e6, "GB": 1e9}[said[2]]


def held_by(model) -> int:
    """The bytes of all weights of a loaded model, wherever they lie."""
    tensors = [*model.parameters(), *model.buffers(), *(m.packed for m in model.modules() if hasattr(m, "packed"))]
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


@needs_layout
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"quantization": "int8"}, {"quantization": "int4"}])
def test_weights_that_do_not_fit_are_refused_unread_and_others_are_not(
    tiny, tiny_path, with_free, monkeypatch, options
):
    if "quantization" in options and native.library() is None:
        pytest.skip("torch's int8 keeps embeddings as they are")
    needed = held_by(TransformersLM(tiny_path, tiny.tokenizer, **options).model)
    with_free(needed)
    TransformersLM(tiny_path, tiny.tokenizer, **options)
    with_free(0)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert refused(lambda: TransformersLM(tiny_path, tiny.tokenizer, **options)) == pytest.approx(needed, rel=0.03)


@needs_layout
def test_all_shards_count_and_a_tied_output_layer_counts_once(tmp_path, tiny_path, with_free):
    model = tiny_llama(2000, tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with_free(0)
    expected = sum(p.numel() for p in model.parameters())  # tied ones once
    assert refused(lambda: load_model(tmp_path, None, torch.bfloat16)) == pytest.approx(2 * expected, abs=6e4)


@needs_layout
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_causal_masks_that_older_files_hold_do_not_count(tmp_path, with_free, dtype):
    with_free(0)
    tiny_llama(2000).save_pretrained(tmp_path)
    needed = refused(lambda: load_model(tmp_path, None, torch.bfloat16))
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 1024, 1024, dtype=dtype)
    save_file(weights, tmp_path / "model.safetensors")
    assert refused(lambda: load_model(tmp_path, None, torch.bfloat16)) == needed


@needs_layout
def test_a_converted_copy_counts_beside_what_is_made_of_it(tiny_path, tmp_path, with_free):
    tiny_llama(2000).bfloat16().save_pretrained(tmp_path)
    with_free(0)
    from_copy = refused(lambda: load_model(tmp_path, "int8", torch.float32))
    without = refused(lambda: load_model(tmp_path, "int8", torch.bfloat16))
    if native.library() is not None:  # torch's int8 drops a matrix of the copy before it rounds the next
        copied = 4 * sum(p.numel() for p in tiny_llama(2000).parameters())
        assert from_copy == pytest.approx(without + copied, abs=1.5e5)
    assert from_copy > 3 * without
    with pytest.raises(ModelError, match=r"to float32 before .* dtype=torch.bfloat16 needs no such copy"):
        load_model(tmp_path, "int8", torch.float32)


def test_mapped_weights_take_no_memory(tiny_path, with_free, monkeypatch):
    monkeypatch.setattr(_room, "available", lambda: False)  # as on a CPU for which nothing is laid out anew
    with_free(0)
    assert load_model(tiny_path, None, torch.float32).num_parameters() > 0


def test_a_gguf_file_is_checked_as_it_will_be_kept(tmp_path, with_free):
    path = write_gguf(tmp_path / "model.gguf", "llama", [Format.Q4_0])
    with_free(0)
    unpacked = refused(lambda: load_model(path, None, torch.float32))
    if native.library() is not None:
        assert 0 < refused(lambda: load_model(path, "gguf", None)) < unpacked / 4


@needs_native
def test_blocks_that_fit_are_loaded(tmp_path, with_free):
    path = write_gguf(tmp_path / "model.gguf", "llama", [Format.Q4_0])
    with_free(held_by(load_model(path, "gguf", None)))
    load_model(path, "gguf", None)


def test_where_nothing_is_known_nothing_is_refused(tiny_path, with_free):
    with_free(None)
    load_model(tiny_path, None, torch.bfloat16)


def test_a_little_more_than_is_free_is_allowed(with_free):
    with_free(1000)
    check_room(1090, CPU, "they", "take less")
    with pytest.raises(ModelError, match=r"they need 0.0 MB of memory, 0.0 MB are free on cpu: take less"):
        check_room(1110, CPU, "they", "take less")


def test_whoever_knows_better_switches_the_check_off(tiny, tiny_path, with_free, monkeypatch):
    with_free(0)
    with pytest.raises(ModelError, match="To try it all the same, set SPECRAG_MEMORY_CHECK=0"):
        check_room(10**6, CPU, "they", "take less")
    monkeypatch.setenv("SPECRAG_MEMORY_CHECK", "1")
    with pytest.raises(ModelError, match="take less"):
        check_room(10**6, CPU, "they", "take less")
    monkeypatch.setenv("SPECRAG_MEMORY_CHECK", "0")
    check_room(10**6, CPU, "they", "take less")
    assert TransformersLM(tiny_path, tiny.tokenizer).model.num_parameters() > 0


def test_weights_for_a_gpu_must_fit_there_and_their_converted_copy_on_the_cpu(tiny_path, monkeypatch):
    free = {"cuda": 10**9, "cpu": 0}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])
    gpu = torch.device("cuda")
    check_weights_fit(tiny_path, None, torch.float32, gpu)  # as in the file: mapped on the CPU
    with pytest.raises(ModelError, match=r"free on cpu: free some, for the file is converted to bfloat16"):
        check_weights_fit(tiny_path, None, torch.bfloat16, gpu)
    free["cuda"] = 0
    with pytest.raises(ModelError, match=r"free on cuda: take a smaller model, or device_map='auto'"):
        check_weights_fit(tiny_path, None, torch.float32, gpu)


@pytest.mark.parametrize(("places", "checked"), [({"": "cpu"}, True), ({"a": "cpu", "b": "disk"}, False)])
def test_a_cache_on_several_devices_is_not_checked(tiny, with_free, monkeypatch, places, checked):
    monkeypatch.setattr(tiny.model, "hf_device_map", places, raising=False)
    with_free(0)
    with pytest.raises(ModelError) if checked else contextlib.nullcontext():
        CachedModel(tiny, 64, 100)


def test_keys_and_values_that_do_not_fit_are_refused_before_reading(tiny, with_free, forward_passes):
    rapid = generator(tiny, candidates=0)
    counts = forward_passes(tiny.model)
    with_free(0)
    needed = refused(lambda: LongContext(DOCUMENT * 4, rapid))
    assert counts == []
    with_free(needed / 2)
    assert LongContext("A short text.", rapid).ask("who?", max_tokens=2).stats.tokens == 2


def test_a_session_that_cannot_grow_is_refused_and_answers_from_what_it_has(tiny, with_free):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0, proposer="match"))
    expected = session.ask("who?", max_tokens=4).text
    with_free(0)
    room = session.model.cache.capacity - session.tokens
    long = "word " * 2 * room
    with pytest.raises(ModelError, match=r"keys and values of \d+ tokens need .* give a shorter text"):
        session.ask(long, max_tokens=4)
    assert session.ask("who?", max_tokens=4).text == expected
    assert session.nbytes == session.model.cache.capacity * token_bytes(tiny.model.config, tiny.dtype)


# --- what the system tells ------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system with 1,000 KiB available; ``system(groups, files)`` puts the process into control groups."""

    def with_groups(groups: str = "", files=(), meminfo="MemTotal: 9000 kB\nMemAvailable:  1000 kB\nSwapFree: 0 kB\n"):
        for name, content in {"meminfo": meminfo, "own": groups, **dict(files)}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
        monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
        monkeypatch.setattr(memory, "_ZFS", tmp_path / "arcstats")
        return free_memory(CPU)

    return with_groups


def test_free_memory_is_what_linux_can_free_and_free_swap(system):
    assert system() == 1000 * 1024
    assert system(meminfo="MemAvailable: 1000 kB\nSwapFree: 24 kB\n") == 1024 * 1024
    assert system(meminfo="MemTotal: 9000 kB\n") is None


def test_the_cache_of_zfs_counts_as_free_beyond_its_least_size(system):
    arcstats = "13 1 0x01 147 39984 1 2\nname type data\nhits 4 77\nsize 4 614400\nc_min 4 102400\n"
    assert system(files={"arcstats": arcstats}) == 1500 * 1024
    assert system(files={"arcstats": arcstats.replace("614400", "51200")}) == 1000 * 1024


@pytest.mark.parametrize(("integrated", "free"), [(True, 1000 * 1024), (False, 5000)])
def test_a_gpu_in_the_cpus_memory_has_what_linux_can_free(system, monkeypatch, integrated, free):
    system()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2000)
    properties = types.SimpleNamespace(is_integrated=int(integrated))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert free_memory(torch.device("cuda")) == free


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a/b\n", {"a/memory.max": "409600", "a/memory.current": "204800", "a/b/memory.max": "max"}),
        ("0::/not/seen/here\n", {"memory.max": "409600", "memory.current": "204800"}),
        (
            "4:cpu,memory:/a\n0::/\n",
            {
                "memory/a/memory.limit_in_bytes": "409600",
                "memory/a/memory.usage_in_bytes": "307200",
                "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 51200\ntotal_active_file 51200\n",
            },
        ),
        (
            "0::/a\n",
            {
                "a/memory.max": "409600",
                "a/memory.current": "307200",
                "a/memory.stat": "anon 5\ninactive_file 51200\nactive_file 0\nslab_reclaimable 51200\n",
            },
        ),
    ],
    ids=["a group above", "a container's root", "version 1", "cached files"],
)
def test_a_control_group_limits_what_is_free(system, groups, files):
    assert system(groups, {f"groups/{name}": content for name, content in files.items()}) == 200 * 1024


def test_a_limit_above_what_is_free_changes_nothing(system):
    files = {"groups/memory.max": str(2**40), "groups/memory.current": "0"}
    assert system("0::/\n", files) == 1000 * 1024
    assert system("a line of another kind\n") == 1000 * 1024


def test_this_machine_tells_what_is_free():
    free = free_memory(CPU)
    assert free is None or free > 0
    assert free_memory(torch.device("meta")) is None
