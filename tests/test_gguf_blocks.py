"""Models from GGUF files whose blocks are kept, against transformers' own loading of the same files."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from gguf import quants
from transformers import AutoModelForCausalLM

from specrag.engine.blocks import Kind
from specrag.engine.gguf_file import GGUFFile
from specrag.engine.step import NativeDecoder, supports
from specrag.errors import InvalidInputError, ModelNotFoundError
from specrag.models._gguf import load_blocks
from specrag.models._loading import quiet_transformers
from specrag.models._weights import load_model
from tests.native import needs_native

pytestmark = needs_native

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY, LAYERS = 256, 512, 4, 2, 80, 2


def sizes(head):
    return {
        "attn_q": (HEADS * head, HIDDEN),
        "attn_k": (KV_HEADS * head, HIDDEN),
        "attn_v": (KV_HEADS * head, HIDDEN),
        "attn_output": (HIDDEN, HEADS * head),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }


def blocks_of(weights: np.ndarray, kind: Format) -> np.ndarray:
    """Weights in a format; of the K formats, which gguf cannot write, blocks with small random quants."""
    if kind not in (Format.Q4_K, Format.Q5_K, Format.Q6_K):
        return quants.quantize(weights, kind)
    count, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(weights.size)
    blocks = random.integers(0, 256, (len(weights), weights.shape[1] // count, size), dtype=np.uint8)
    scales = np.full((*blocks.shape[:2], 1), 2e-4 if kind == Format.Q6_K else 1e-3, np.float16).view(np.uint8)
    if kind == Format.Q6_K:
        blocks[..., 208:210] = scales
    else:
        blocks[..., 0:2] = blocks[..., 2:4] = scales
    return blocks.reshape(len(weights), -1)


def write_gguf(path, architecture, kinds, *, output=None, embeddings=Format.Q8_0, name="test", kv_heads=KV_HEADS):
    """A small random model; ``kinds``: the formats of the matrices, in turn; ``output``: "same", "other" or none."""
    random = np.random.default_rng(0)
    head = 128 if architecture == "qwen3" else HIDDEN // HEADS
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    if architecture == "llama":
        writer.add_rope_dimension_count(head)
    if architecture == "qwen3":
        writer.add_key_length(head)
        writer.add_value_length(head)

    def add(name, weights, kind):
        if kind in (Format.F32, Format.F16):
            writer.add_tensor(name, weights.astype(np.float32 if kind == Format.F32 else np.float16))
        else:
            writer.add_tensor(name, blocks_of(weights, kind), raw_dtype=kind)

    def matrix(*shape):
        return (random.standard_normal(shape) * 0.08).astype(np.float32)

    def vector(size, around=1.0):
        return (around + 0.1 * random.standard_normal(size)).astype(np.float32)

    tokens = matrix(VOCABULARY, HIDDEN)
    add("token_embd.weight", tokens, embeddings)
    if output is not None:
        add("output.weight", tokens if output == "same" else matrix(VOCABULARY, HIDDEN), Format.Q8_0)
    writer.add_tensor("output_norm.weight", vector(HIDDEN))
    turn = 0
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", vector(HIDDEN))
        if architecture == "qwen3":
            for norm in ("attn_q_norm", "attn_k_norm"):
                writer.add_tensor(f"blk.{i}.{norm}.weight", vector(head))
        for part, shape in sizes(head).items():
            add(f"blk.{i}.{part}.weight", matrix(*shape), kinds[turn % len(kinds)])
            turn += 1
            if architecture == "qwen2" and part in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(f"blk.{i}.{part}.bias", vector(shape[0], 0.0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def divergence(path, model, ids):
    """Mean KL of the native pass, and of transformers' pass over the blocks, from the dequantised model."""
    with quiet_transformers():
        reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0].log_softmax(-1)
        own = model(ids[None]).logits[0].log_softmax(-1)
    decoder = NativeDecoder(model)
    made = decoder(ids, torch.arange(len(ids)), decoder.cache(len(ids))).log_softmax(-1)
    assert expected.std() > 0.5  # a model whose predictions differ
    return [(expected.exp() * (expected - other)).sum(-1).mean() for other in (made, own)]


EVERY_FORMAT = [Format(kind) for kind in Kind if kind != Kind.BF16] + [Format.F16, Format.F32, Format.BF16]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "specrag" / "gguf"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_blocks_give_the_logits_of_the_dequantised_model(tmp_path, architecture):
    path = write_gguf(tmp_path / "model.gguf", architecture, EVERY_FORMAT)
    model = load_blocks(path, torch.float32)
    assert supports(model)
    ids = torch.randint(VOCABULARY, (120,), generator=torch.Generator().manual_seed(0))
    assert max(divergence(path, model, ids)) < 2e-3


def test_every_matrix_keeps_its_format(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", [Format.Q4_K, Format.Q6_K, Format.F16])
    layer = load_blocks(path, torch.bfloat16).model.layers[0]
    assert layer.self_attn.q_proj.matrix.kind == Kind.Q4_K
    assert layer.self_attn.k_proj.matrix.kind == Kind.Q6_K
    assert layer.self_attn.v_proj.matrix.kind == Kind.BF16  # float16 has no kernel
    assert layer.input_layernorm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("output", "embeddings", "kind"), [(None, Format.Q5_0, Kind.Q5_0), ("same", Format.Q5_0, Kind.Q8_0)]
)
def test_embeddings_and_output_that_are_one_matrix_are_kept_once(tmp_path, output, embeddings, kind):
    path = write_gguf(tmp_path / "model.gguf", "qwen2", [Format.Q8_0], output=output, embeddings=embeddings)
    model = load_blocks(path, torch.float32)
    assert model.lm_head.matrix is model.model.embed_tokens.matrix
    assert model.lm_head.matrix.kind == kind  # of two copies the better


def test_embeddings_and_output_that_differ_are_both_kept(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", [Format.Q8_0], output="other")
    model = load_blocks(path, torch.float32)
    assert model.lm_head.matrix is not model.model.embed_tokens.matrix
    ids = torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(0))
    assert max(divergence(path, model, ids)) < 2e-3


def test_a_format_that_is_not_read_is_named(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", [Format.Q8_0, Format.TQ2_0])
    with pytest.raises(InvalidInputError, match=r"attn_k\.weight in .* is stored as TQ2_0, which is not read; Q4_0, "):
        load_blocks(path, torch.float32)


def test_an_architecture_that_is_not_read_is_named(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "gpt2", [Format.Q8_0])
    with pytest.raises(InvalidInputError, match="architecture 'gpt2'; blocks are read of llama, mistral, qwen2, qwen3"):
        load_blocks(path, torch.float32)


def test_a_matrix_of_another_shape_than_the_configuration_says_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "qwen2", [Format.Q8_0], kv_heads=4)
    with pytest.raises(
        InvalidInputError, match=r"attn_k\.weight in .* has the shape \(128, 256\), .* says \(256, 256\)"
    ):
        load_blocks(path, torch.float32)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", [Format.Q8_0])
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelNotFoundError, match=r"model\.gguf could not be loaded as a causal language model"):
        load_model(path, "gguf", torch.float32)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x09\0\0\0" + bytes(64), b"something else" * 10])
def test_what_is_no_gguf_file_is_refused(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelNotFoundError, match="could not be read as a GGUF file"):
        GGUFFile(path)


def test_the_header_equals_what_the_gguf_package_reads(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "qwen2", [Format.Q4_K, Format.Q8_0])
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert ours.metadata["qwen2.embedding_length"] == HIDDEN
    assert ours.metadata["general.architecture"] == "qwen2"
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        own = ours.tensors[tensor.name]
        assert own.shape == tuple(reversed(tensor.shape.tolist()))
        assert own.kind_name == tensor.tensor_type.name
        assert ours.read(own).numpy().tobytes() == tensor.data.tobytes()


def test_the_configuration_is_read_by_transformers_once(tmp_path, own_cache, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", "qwen2", [Format.Q8_0])
    load_blocks(path, torch.float32)
    assert len(list(own_cache.iterdir())) == 1
    monkeypatch.setattr(gguf, "GGUFReader", lambda *args: pytest.fail("read again"))
    load_blocks(path, torch.float32)
