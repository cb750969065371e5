# SPDX-License-Identifier: Apache-2.0
"""What surrounds the product: input scale, bias, low rank, SwiGLU, residual, alone and together; and the gradients."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from conftest import DEVICES, relative_error
from kvopt import reference
from kvopt.reference import Scheme
from kvopt.weights.formats import QuantizedWeight, WeightFormat
from ops.formats import DTYPES, KINDS, arguments_of, check_product, exact, fused, in_torch, int8_rows, make

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_kind = pytest.mark.parametrize("format", KINDS, ids=str)

PARTS = ("input_scale", "low_rank", "swiglu", "residual")
COMBINATIONS = [chosen for count in range(len(PARTS) + 1) for chosen in itertools.combinations(PARTS, count)]


def options_for(
    parts: tuple[str, ...], x: torch.Tensor, weight: QuantizedWeight, rank: int = 5
) -> dict[str, Any]:
    n, k = weight.shape
    like = {"device": x.device, "dtype": x.dtype}
    options: dict[str, Any] = {}
    if "input_scale" in parts:  # powers of two: rounding to int8 stays beyond doubt
        options["input_scale"] = 2.0 ** torch.randint(-2, 3, (k,)).to(**like)
    if "low_rank" in parts:
        options["low_rank_x"] = torch.randn(*x.shape[:-1], rank, **like) / 4
        options["low_rank_w"] = torch.randn(n, rank, **like)
    if "swiglu" in parts:
        options["swiglu"] = True
    if "residual" in parts:
        options["residual"] = torch.randn(*x.shape[:-1], n // 2 if "swiglu" in parts else n, **like)
    return options


def scaled_rows(
    weight: QuantizedWeight, m: int, input_scale: torch.Tensor | None, device: str, dtype: torch.dtype
) -> torch.Tensor:
    """Activations that are beyond doubt after the input scale."""
    k = weight.shape[1]
    x = int8_rows(m, k, weight.format.group_columns(k), device, dtype)
    return x if input_scale is None else x / input_scale


@each_device
@each_dtype
@each_kind
@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
def test_every_combination(device, dtype, format, parts):
    n, k = random.choice([48, 80, 112]), random.choice([96, 160, 333, 512])
    weight = make(n, k, format, device)
    for m in (1, random.randrange(2, 9), random.randrange(9, 40)):
        x = torch.randn(m, k, device=device, dtype=dtype)
        options = options_for(parts, x, weight)
        bits = random.choice([8, 16])
        rounded = bits == 8 or format.scheme == Scheme.INT8_DYNAMIC
        if rounded:
            x = scaled_rows(weight, m, options.get("input_scale"), device, dtype)
        bias = torch.randn(n, device=device, dtype=dtype) if random.random() < 0.5 else None
        y = fused(x, weight, bias, activation_bits=bits, **options)
        torchs = 0.0
        if dtype != torch.float32:
            given = x
            if rounded:
                scale = options.get("input_scale", torch.ones(1, device=device))
                codes = reference.round_activations(x.float() * scale.float(), format.group_columns(k))
                given = (codes / scale).to(dtype)
            expected = exact(x, weight, bias, activation_bits=bits, **options)
            torchs = (in_torch(given, weight, bias, **options).double() - expected).norm().item()
        check_product(y, x, weight, bias, torchs, activation_bits=bits, **options)


@each_device
@pytest.mark.parametrize("format", [f for f in KINDS if f.scheme != Scheme.INT8_DYNAMIC], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 33, 128])
def test_every_rank(device, format, rank):
    weight = make(80, 160, format, device)
    for m in (1, 4, 20):
        x = torch.randn(m, 160, device=device)
        options = options_for(("low_rank",), x, weight, rank)
        check_product(fused(x, weight, None, **options), x, weight, None, **options)


@each_device
@each_dtype
@pytest.mark.parametrize("format", [f for f in KINDS if f.scheme != Scheme.INT8_DYNAMIC], ids=str)
def test_many_rows(device, dtype, format):
    """On CUDA the dense way: dequantise, cuBLAS, and the epilogue by torch's own operators."""
    weight = make(48, 96, format, device)
    x = torch.randn(2, 150, 96, device=device, dtype=dtype)
    bias = torch.randn(48, device=device, dtype=dtype)
    for parts in (("low_rank", "residual"), ("input_scale", "swiglu", "residual")):
        options = options_for(parts, x, weight)
        error = relative_error(fused(x, weight, bias, **options), exact(x, weight, bias, **options))
        allowed = relative_error(in_torch(x, weight, bias, **options), exact(x, weight, bias, **options))
        assert error <= max(
            1e-4 if dtype == torch.float32 else 1.1 * torch.finfo(dtype).eps / 2, 1.05 * allowed
        )


@each_device
def test_strided_rows_of_the_epilogue(device):
    weight = make(48, 96, WeightFormat(4, 32, Scheme.ASYMMETRIC), device)
    x = torch.randn(3, 2, 96, device=device)
    residual = torch.randn(3, 48, 2, device=device).transpose(1, 2)
    low_rank_x = torch.randn(3, 4, 2, device=device).transpose(1, 2)
    low_rank_w = torch.randn(48, 4, device=device)
    got = fused(x, weight, None, low_rank_x=low_rank_x, low_rank_w=low_rank_w, residual=residual)
    dense = [t.contiguous() for t in (low_rank_x, low_rank_w, residual)]
    expected = fused(x, weight, None, low_rank_x=dense[0], low_rank_w=dense[1], residual=dense[2])
    assert torch.equal(got, expected)


@each_device
@each_dtype
@each_kind
@pytest.mark.parametrize("parts", [(), PARTS], ids=["plain", "everything"])
def test_opcheck_with_gradients(device, dtype, format, parts):
    weight = make(32, 128, format, device)
    x = torch.randn(3, 128, device=device, dtype=dtype)
    options = options_for(parts, x, weight)
    bias = torch.randn(32, device=device, dtype=dtype)
    for t in (x, bias, *(value for value in options.values() if isinstance(value, torch.Tensor))):
        t.requires_grad_()
    arguments = (*arguments_of(weight, x, bias), random.choice([8, 16]))
    torch.library.opcheck(torch.ops.kvopt.qlinear, arguments, options)


@each_device
@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
def test_gradients_are_those_of_plain_torch(device, parts):
    weight = make(48, 96, random.choice(KINDS), device)
    x = torch.randn(2, 5, 96, device=device)
    bias = torch.randn(48, device=device)
    options = options_for(parts, x, weight)
    tensors = {"x": x, "bias": bias, **{k: v for k, v in options.items() if isinstance(v, torch.Tensor)}}
    for t in tensors.values():
        t.requires_grad_()
    upstream = torch.randn(2, 5, 24 if "swiglu" in parts else 48, device=device)
    # int8 activations count as what they were; without SwiGLU the gradient does not see the rounded product at all
    fused(x, weight, bias, **options).backward(upstream)
    got = {name: t.grad for name, t in tensors.items()}
    for t in tensors.values():
        t.grad = None
    in_torch(x, weight, bias, **options).backward(upstream)
    rounded = weight.format.scheme == Scheme.INT8_DYNAMIC and "swiglu" in parts
    for name, t in tensors.items():
        assert relative_error(got[name], t.grad) < (3e-2 if rounded else 5e-4), name


@each_device
def test_gradient_passes_straight_through_the_rounding(device):
    weight = make(48, 96, WeightFormat(4, 32, Scheme.ASYMMETRIC), device)
    x = torch.randn(7, 96, device=device, requires_grad=True)
    upstream = torch.randn(7, 48, device=device)
    fused(x, weight, None, activation_bits=8).backward(upstream)
    assert relative_error(x.grad, upstream.double() @ weight.dequantize().double()) < 1e-5


def test_swiglu_halves_are_where_the_layout_says():
    h = torch.arange(32.0)
    gate, up = reference.split_swiglu(h)
    assert gate.tolist() == [*range(8), *range(16, 24)]
    assert up.tolist() == [*range(8, 16), *range(24, 32)]
    assert torch.equal(reference.join_swiglu(gate, up), h)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 20, 300])
@each_kind
def test_graph_replay_equals_eager(m, format):
    weight = make(64, 256, format, "cuda")
    x = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16)
    options = options_for(PARTS, x, weight)
    expected = fused(x, weight, None, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(x, weight, None, **options)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
