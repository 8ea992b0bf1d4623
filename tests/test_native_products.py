"""Products of weights in blocks, against the gguf package's own dequantisation and float64."""

import ctypes

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from specrag.engine import native
from specrag.engine.blocks import BlockEmbedding, BlockLinear, BlockMatrix, Kind, allocate
from specrag.engine.native.build import BuildError, compile_to, find_compiler, instructions
from specrag.errors import InvalidInputError
from tests.native import needs_native

pytestmark = needs_native

KINDS = list(Kind)


def stored(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks as a GGUF file holds them: every bit pattern of the quants, small scales."""
    random = np.random.default_rng(seed)
    if kind == Kind.BF16:
        return quants.quantize(random.standard_normal((rows, columns)).astype(np.float32), Format.BF16)
    weights, size = gguf.GGML_QUANT_SIZES[Format(kind)]
    blocks = random.integers(0, 256, (rows, columns // weights, size), dtype=np.uint8)
    places = {Kind.Q6_K: (208,), Kind.Q4_1: (0, 2), Kind.Q5_1: (0, 2), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2)}
    for at in places.get(kind, (0,)):
        scales = random.standard_normal((*blocks.shape[:2], 1)) * 0.01
        blocks[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return np.ascontiguousarray(blocks.reshape(rows, -1))


def dequantised(kind: Kind, blocks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(quants.dequantize(blocks, Format(kind)).astype(np.float32))


def matrix_of(kind: Kind, blocks: np.ndarray, columns: int) -> BlockMatrix:
    return BlockMatrix(kind, len(blocks), columns).read_blocks(torch.from_numpy(blocks))


def rounded(kind: Kind, x: torch.Tensor) -> torch.Tensor:
    """Activations as the kernels see them: int8 with a scale for every 32, or bfloat16."""
    if kind == Kind.BF16:
        return x.bfloat16().float()
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(127.0) / largest  # of `127 / largest` torch makes two roundings
    return torch.where(largest > 0, (blocks * inverse).round() * (largest / 127), 0).flatten(-2)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 70), blocks=st.integers(1, 5), count=st.integers(1, 21), seed=st.integers(0, 999))
def test_a_product_equals_that_of_the_dequantised_weights(kind, rows, blocks, count, seed):
    columns = blocks * kind.block
    held = stored(kind, rows, columns, seed)
    weights = dequantised(kind, held)
    matrix = matrix_of(kind, held, columns)
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(count, columns, generator=generator), torch.randn(rows, generator=generator)
    made = matrix.multiply(x, bias)
    seen = rounded(kind, x).double()
    exact, terms = seen @ weights.double().T + bias, seen.abs() @ weights.double().abs().T + bias.abs()
    assert ((made - exact).abs() <= 3e-6 * terms).all()
    assert torch.allclose(matrix.unpack(), weights, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(kind):
    matrix = matrix_of(kind, stored(kind, 100, 512), 512)
    x = torch.randn(40, 512)
    single = torch.cat([matrix.multiply(row[None]) for row in x])
    for count in (*range(2, 18), 40):
        assert torch.equal(matrix.multiply(x[:count]), single[:count])
        assert torch.equal(matrix.multiply(x[-count:]), single[-count:])


def test_threads_do_not_change_a_bit():
    matrix = matrix_of(Kind.Q4_K, stored(Kind.Q4_K, 300, 512), 512)
    x, threads = torch.randn(5, 512), torch.get_num_threads()
    try:
        made = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            made.append(matrix.multiply(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, made[0]) for other in made)


def test_zeros_and_large_values_are_multiplied():
    matrix = matrix_of(Kind.Q8_0, stored(Kind.Q8_0, 16, 64), 64)
    x = torch.zeros(2, 64)
    x[1, 3] = 1e6
    made = matrix.multiply(x)
    assert torch.equal(made[0], torch.zeros(16))
    assert torch.allclose(made[1], 1e6 * matrix.unpack()[:, 3], rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "reference"), [(Kind.Q8_0, Format.Q8_0), (Kind.Q4_1, Format.Q4_1), (Kind.BF16, Format.BF16)]
)
def test_rounding_floats_loses_no_more_than_ggufs_own(kind, reference):
    weights = torch.randn(50, 320) * torch.rand(50, 1)
    ours = BlockMatrix(kind, 50, 320).read_floats(weights).unpack()
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(weights.numpy(), reference), reference))
    assert (ours - weights).square().mean() <= 1.0001 * (theirs - weights).square().mean()


def test_weights_are_not_rounded_to_formats_that_files_alone_bring():
    with pytest.raises(InvalidInputError, match="not to Q4_K"):
        BlockMatrix(Kind.Q4_K, 16, 256).read_floats(torch.randn(16, 256))


def test_rows_can_be_taken_in_another_order():
    held = stored(Kind.Q5_0, 40, 64)
    order = torch.randperm(40)
    matrix = BlockMatrix(Kind.Q5_0, 40, 64).read_blocks(torch.from_numpy(held), order)
    assert torch.equal(matrix.unpack(), dequantised(Kind.Q5_0, held)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_rows_of_the_matrix(dtype):
    matrix = matrix_of(Kind.Q6_K, stored(Kind.Q6_K, 90, 512), 512)
    ids = torch.tensor([[3, 89, 0], [17, 3, 42]])
    assert torch.equal(BlockEmbedding(matrix, dtype)(ids), matrix.unpack().to(dtype)[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_keeps_shape_and_dtype(dtype):
    layer = torch.nn.Linear(64, 48).requires_grad_(False)
    ours = BlockLinear(BlockMatrix(Kind.Q8_0, 48, 64).read_floats(layer.weight), layer.bias)
    x = torch.randn(2, 3, 64, dtype=dtype)
    made = ours(x)
    assert made.dtype == dtype
    assert torch.allclose(made.float(), layer(x.float()), atol=0.05)


def test_matrices_lie_side_by_side_and_do_not_overlap():
    shapes = [(Kind.Q4_0, 33, 96), (Kind.Q8_0, 16, 32), (Kind.Q6_K, 20, 256)]
    held = [stored(*shape) for shape in shapes]
    matrices = allocate(shapes)
    for matrix, blocks in zip(matrices, held, strict=True):
        matrix.read_blocks(torch.from_numpy(blocks))
    for matrix, blocks in zip(matrices, held, strict=True):
        assert torch.allclose(matrix.unpack(), dequantised(matrix.kind, blocks))


@pytest.mark.parametrize("ids", [[0, 90], [-1]])
def test_ids_that_are_no_rows_are_refused(ids):
    matrix = matrix_of(Kind.Q8_0, stored(Kind.Q8_0, 90, 64), 64)
    with pytest.raises(InvalidInputError, match="from 0 to 89, got"):
        matrix.unpack(torch.tensor(ids))


def test_too_few_bytes_are_refused():
    with pytest.raises(InvalidInputError, match="1020 bytes are not those of a Q8_0 matrix 16 x 64"):
        BlockMatrix(Kind.Q8_0, 16, 64).read_blocks(torch.zeros(1020, dtype=torch.uint8))


def test_columns_that_a_format_cannot_hold_are_refused():
    with pytest.raises(InvalidInputError, match="multiple of 256 columns, got 4 x 96"):
        BlockMatrix(Kind.Q4_K, 4, 96)


def test_blocks_are_multiplied_with_float32_alone():
    matrix = matrix_of(Kind.Q4_0, stored(Kind.Q4_0, 4, 32), 32)
    with pytest.raises(InvalidInputError, match="with float32, got torch.float64"):
        matrix.multiply(torch.randn(1, 32, dtype=torch.float64))


# How many of this CPU's instructions to use: AVX2 alone, or AVX-512 without VNNI and BF16.
OLDER = {"avx2": 3, "avx512": 7}


@pytest.mark.parametrize("count", OLDER.values(), ids=OLDER)
@pytest.mark.slow
def test_older_instructions_give_the_same_integers(count, tmp_path, monkeypatch):
    flags = instructions()[:count]
    if len(flags) < count:
        pytest.skip("this CPU has no AVX-512")
    try:
        compile_to(tmp_path / "older.so", flags, find_compiler())
    except BuildError as error:
        pytest.skip(str(error))
    older = native.Library(tmp_path / "older.so")
    for kind in KINDS:
        matrix = matrix_of(kind, stored(kind, 40, 512), 512)
        x = torch.randn(9, 512)
        here, there = matrix.multiply(x), torch.empty(9, 40)
        assert older.multiply(ctypes.byref(matrix.struct), None, x.data_ptr(), 9, there.data_ptr())
        assert torch.allclose(here, there, atol=1e-4 * float(here.std()), rtol=1e-4)
        one = torch.empty(1, 40)
        assert older.multiply(ctypes.byref(matrix.struct), None, x[4:].data_ptr(), 1, one.data_ptr())
        assert torch.equal(one[0], there[4])
