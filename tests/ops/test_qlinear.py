# SPDX-License-Identifier: Apache-2.0
"""The fused product against fp64 on the dequantised weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from conftest import DEVICES, relative_error
from kvopt import ops
from kvopt.reference import Scheme
from kvopt.weights.formats import QuantizedWeight, WeightFormat
from ops.formats import (
    DTYPES,
    FORMATS,
    KINDS,
    arguments_of,
    check_product,
    exact,
    fused,
    in_torch,
    int8_rows,
    make,
)

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_format = pytest.mark.parametrize("format", FORMATS, ids=str)

INT4 = WeightFormat(4, 32, Scheme.ASYMMETRIC)


def rows_for(
    weight: QuantizedWeight, m: int, device: str, dtype: torch.dtype, activation_bits: int = 16
) -> torch.Tensor:
    """Random activations; where they are rounded to int8, such that the codes are beyond doubt."""
    k = weight.shape[1]
    if weight.format.scheme == Scheme.INT8_DYNAMIC or activation_bits == 8:
        return int8_rows(m, k, weight.format.group_columns(k), device, dtype)
    return torch.randn(m, k, device=device, dtype=dtype)


def check(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, activation_bits: int = 16
) -> None:
    """16-bit types may be as far off as torch's own operators, which round the weights too, as CUDA's kernels do."""
    torchs = 0.0
    if x.dtype != torch.float32 and activation_bits == 16 and weight.format.scheme != Scheme.INT8_DYNAMIC:
        torchs = (in_torch(x, weight, bias).double() - exact(x, weight, bias)).norm().item()
    y = fused(x, weight, bias, activation_bits=activation_bits)
    check_product(y, x, weight, bias, torchs, activation_bits=activation_bits)


@each_device
@each_dtype
@each_format
@pytest.mark.parametrize(("n", "k"), [(65, 704), (31, 256), (256, 128)])
def test_every_m(device, dtype, format, n, k):
    weight = make(n, k, format, device)
    bias = torch.randn(n, device=device, dtype=dtype)
    for m in (*range(1, 18), 33, 100):
        check(rows_for(weight, m, device, dtype), weight, random.choice([bias, None]))


@each_device
@each_dtype
@pytest.mark.parametrize("format", [f for f in FORMATS if f.scheme != Scheme.INT8_DYNAMIC], ids=str)
def test_int8_activations_at_every_m(device, dtype, format):
    weight = make(65, 704, format, device)
    for m in (*range(1, 18), 40):
        check(rows_for(weight, m, device, dtype, 8), weight, None, activation_bits=8)


@each_device
@each_format
def test_int8_activations_are_rounded_and_no_more(device, format):
    """Ordinary activations: a rounding near a tie may fall either way, which changes one code by one."""
    weight = make(64, 512, format, device)
    x = torch.randn(24, 512, device=device)
    y = fused(x, weight, None, activation_bits=8)
    assert relative_error(y, exact(x, weight, None, activation_bits=8)) < 2e-3
    unrounded = x.double() @ weight.dequantize().double().T
    assert 2e-3 < relative_error(y, unrounded) < 2e-2


@each_device
@each_dtype
@pytest.mark.parametrize("format", KINDS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1536, 2048), (520, 4096)])
def test_sizes_of_a_model(device, dtype, format, n, k):
    """Large enough for every path that a rule keeps for large products: threads or blocks, sums split over K."""
    weight = make(n, k, format, device)
    for m in (1, 8, 33, 160, 257) if device == "cuda" else (1, 33):
        for bits in (8, 16):
            check(rows_for(weight, m, device, dtype, bits), weight, None, bits)


@each_device
@each_dtype
def test_odd_n_and_k_tail(device, dtype):
    for _ in range(40):
        n, k = random.randrange(1, 200), random.randrange(1, 600)
        format = random.choice([f for f in FORMATS if f.group_size is None or f.group_size <= k])
        weight = make(n, k, format, device)
        bits = random.choice([8, 16])
        check(rows_for(weight, random.randrange(1, 40), device, dtype, bits), weight, None, bits)


@each_device
@each_dtype
@each_format
def test_empty_batch(device, dtype, format):
    weight = make(12, 128, format, device)
    assert fused(torch.zeros(0, 128, device=device, dtype=dtype), weight, None).shape == (0, 12)
    assert fused(torch.zeros(2, 0, 128, device=device, dtype=dtype), weight, None).shape == (2, 0, 12)


@each_device
@pytest.mark.parametrize("activation_bits", [8, 16])
@each_format
def test_zero_activations_give_the_bias(device, activation_bits, format):
    weight = make(20, 128, format, device)
    bias = torch.randn(20, device=device)
    for m in (1, 12):
        y = fused(torch.zeros(m, 128, device=device), weight, bias, activation_bits=activation_bits)
        assert torch.equal(y, bias.expand(m, 20))


@each_device
@pytest.mark.parametrize("format", [f for f in FORMATS if f.scheme != Scheme.INT8_DYNAMIC], ids=str)
def test_outlier_activations_keep_the_precision(device, format):
    """16-bit class: not worse than rounding the activations to fp16, which is 2^-11 / √3 off in norm."""
    k = 512
    weight = make(64, k, format, device)
    x = torch.randn(5, k, device=device)
    x[:, ::100] *= 300
    assert relative_error(fused(x, weight, None), exact(x, weight, None)) <= 2.0**-11 / 3**0.5


@each_device
@pytest.mark.parametrize("format", KINDS, ids=str)
def test_strided_and_many_dimensional_input(device, format):
    weight = make(48, 128, format, device)
    x = torch.randn(3, 128, 5, device=device).transpose(1, 2)
    assert not x.is_contiguous()
    assert torch.equal(fused(x, weight, None), fused(x.contiguous(), weight, None))
    assert fused(x, weight, None).shape == (3, 5, 48)
    wide = torch.randn(4, 200, device=device)
    assert torch.equal(fused(wide[:, 7:135], weight, None), fused(wide[:, 7:135].contiguous(), weight, None))
    assert fused(wide[0, :128], weight, None).shape == (48,)


@each_device
@each_dtype
@pytest.mark.parametrize("format", [f for f in KINDS if f.scheme != Scheme.INT8_DYNAMIC], ids=str)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_nan_and_infinity_come_out_as_from_linear(device, dtype, format, m):
    n, k = 40, 160
    weight = make(n, k, format, device)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(m, k, device=device, dtype=dtype)
        x[m // 2, random.randrange(k)] = value
        got = fused(x, weight, None)
        expected = torch.nn.functional.linear(x, weight.dequantize(dtype))
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isposinf(), expected.isposinf())
        assert torch.equal(got.isneginf(), expected.isneginf())
        finite = torch.isfinite(x).all(dim=1)
        if finite.any():
            check(x[finite], weight, None)


@each_device
@pytest.mark.parametrize("format", KINDS, ids=str)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_nan_among_int8_activations_spoils_its_row_alone(device, format, m):
    weight = make(40, 128, format, device)
    x = torch.randn(m, 128, device=device)
    clean = fused(x, weight, None, activation_bits=8)
    x[m // 2, random.randrange(128)] = float("nan")
    got = fused(x, weight, None, activation_bits=8)
    others = torch.arange(m, device=device) != m // 2
    assert torch.equal(got[others], clean[others])
    assert got[m // 2].isnan().all()


@each_device
@pytest.mark.parametrize("activation_bits", [8, 16])
@each_format
def test_run_to_run_changes_nothing(device, activation_bits, format):
    weight = make(130, 320, format, device)
    for m in (1, 20):
        x = torch.randn(m, 320, device=device)
        first = fused(x, weight, None, activation_bits=activation_bits)
        assert all(
            torch.equal(fused(x, weight, None, activation_bits=activation_bits), first) for _ in range(5)
        )


@each_device
@pytest.mark.parametrize("format", KINDS, ids=str)
def test_compiles_without_graph_breaks(device, format):
    torch._dynamo.reset()  # every format is a graph of its own, and dynamo allows eight of one function
    weight = make(64, 128, format, device)
    rest = arguments_of(weight, torch.empty(0))[1:]

    def f(x: torch.Tensor) -> torch.Tensor:
        return ops.qlinear(x * 2, *rest, residual=x[:, :64]) + 1

    x = torch.randn(3, 128, device=device)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), f(x))


@each_device
def test_errors_name_the_argument(device):
    weight = make(32, 96, INT4, device)
    x = torch.randn(2, 96, device=device)
    first = arguments_of(weight, x)

    def refused(message: str, changes: dict[int, object] | None = None, **options: object) -> str:
        arguments = [(changes or {}).get(i, value) for i, value in enumerate(first)]
        with pytest.raises(RuntimeError, match=f"qlinear: {message}") as info:
            torch.ops.kvopt.qlinear(*arguments, **options)
        return str(info.value)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, device=device)

    refused("packed must have shape", {0: torch.randn(2, 32, device=device)})
    refused("x must be float32, float16 or bfloat16", {0: x.double()})
    refused(r"bias must have shape \(32\), got \(31\)", {3: ones(31)})
    refused("bias must have the dtype of the first argument", {3: ones(32).half()})
    refused("meta must be int16", {2: weight.meta.int()})
    refused("scheme must be 0", {7: 9})
    refused("activation_bits must be 8 or 16, got 4", activation_bits=4)
    refused(r"input_scale must have shape \(96\), got \(95\)", input_scale=ones(95))
    refused("input_scale must have the dtype", input_scale=ones(96).bfloat16())
    refused("low_rank_x and low_rank_w come together, got only low_rank_x", low_rank_x=ones(2, 4))
    refused(r"low_rank_w must have shape \(32, 4\)", low_rank_x=ones(2, 4), low_rank_w=ones(31, 4))
    refused(
        r"low_rank_x must have shape \(2, 4\), got \(3, 4\)", low_rank_x=ones(3, 4), low_rank_w=ones(32, 4)
    )
    refused("low_rank_w must have shape .N, rank. with rank >= 1", low_rank_x=ones(2, 4), low_rank_w=ones(32))
    refused("low_rank_w must be contiguous", low_rank_x=ones(2, 4), low_rank_w=ones(4, 32).T)
    refused(r"residual must have shape \(2, 32\), got \(2, 16\)", residual=ones(2, 16))
    refused(r"residual must have shape \(2, 16\), got \(2, 32\)", residual=ones(2, 32), swiglu=True)
    odd = make(24, 96, INT4, device)
    with pytest.raises(RuntimeError, match=r"n must be a multiple of 16 with swiglu .*, got 24"):
        torch.ops.kvopt.qlinear(*arguments_of(odd, x), swiglu=True)
    message = refused("packed must have shape", {1: weight.packed[:-1]})
    assert str(Path.cwd()) not in message  # no path of the machine that built it


@each_device
def test_explain_names_a_path_for_every_format(device):
    for format in FORMATS:
        for m in (1, 16, 4096):
            text = ops.explain_qlinear(m, 4096, 4096, format, device=device)
            assert len(text.split()) > 3, text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 16, 100, 300])
@pytest.mark.parametrize("format", KINDS, ids=str)
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_graph_replay_equals_eager(m, format, activation_bits):
    weight = make(256, 512, format, "cuda")
    x = torch.randn(m, 512, device="cuda", dtype=torch.float16)
    expected = fused(x, weight, None, activation_bits=activation_bits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(x, weight, None, activation_bits=activation_bits)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_format
def test_cpu_equals_gpu(format):
    on_cpu = make(96, 704, format, "cpu")
    on_gpu = on_cpu.to("cuda")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu.codes(), on_gpu.codes(), strict=True))
    assert torch.equal(on_gpu.to("cpu").packed, on_cpu.packed)
    x = rows_for(on_cpu, 6, "cpu", torch.float32)
    assert relative_error(fused(x.cuda(), on_gpu, None), fused(x, on_cpu, None)) < 2e-4
