# SPDX-License-Identifier: Apache-2.0
"""The fused product against fp64 on the dequantised weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from conftest import DEVICES, relative_error
from kvopt import ops
from kvopt.weights.formats import QuantizedWeight, WeightFormat, quantize_to

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [
    WeightFormat(8, None, True),
    WeightFormat(8, 64, False),
    WeightFormat(4, 128, False),
    WeightFormat(4, 128, True),
    WeightFormat(4, 64, False),
    WeightFormat(4, 32, True),
    WeightFormat(4, 16, False),
    WeightFormat(4, None, False),
    WeightFormat(4, None, True),
]


def make(n: int, k: int, format: WeightFormat, device: str) -> QuantizedWeight:
    return quantize_to((torch.randn(n, k) / k**0.5).to(device), format)


def exact(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.double() @ weight.dequantize(torch.float32).double().T
    return y if bias is None else y + bias.double()


def torch_error(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> float:
    """The error of torch's own linear in the type of ``x``, on the dequantised weight in that type."""
    return relative_error(
        torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias), exact(x, weight, bias)
    )


def check(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
    y = weight.linear(x, bias)
    assert y.dtype == x.dtype
    error = relative_error(y, exact(x, weight, bias))
    if x.dtype == torch.float32:
        assert error <= 1e-4
    else:  # one rounding of the result, 2^-9 or 2^-12 relative on average, is the least any kernel can have
        assert error <= max(torch_error(x, weight, bias), 1.1 * torch.finfo(x.dtype).eps / 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(65, 704), (31, 256), (256, 128)])
def test_every_m(device, dtype, format, n, k):
    weight = make(n, k, format, device)
    bias = torch.randn(n, device=device, dtype=dtype)
    for m in (*range(1, 18), 33, 100):
        check(torch.randn(m, k, device=device, dtype=dtype), weight, random.choice([bias, None]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_n_and_k_tail(device, dtype):
    for _ in range(20):
        n, k = random.randrange(1, 200), random.randrange(1, 600)
        format = random.choice([f for f in FORMATS if f.group_size is None or f.group_size <= k])
        weight = make(n, k, format, device)
        check(torch.randn(random.randrange(1, 40), k, device=device, dtype=dtype), weight, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(device, dtype):
    weight = make(12, 64, WeightFormat(4, 32, False), device)
    assert weight.linear(torch.zeros(0, 64, device=device, dtype=dtype)).shape == (0, 12)
    assert weight.linear(torch.zeros(2, 0, 64, device=device, dtype=dtype)).shape == (2, 0, 12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_outlier_activations_keep_the_precision(device, format):
    k = 512
    weight = make(64, k, format, device)
    x = torch.randn(5, k, device=device)
    x[:, ::100] *= 300
    check(x, weight, None)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_many_dimensional_input(device):
    weight = make(48, 128, WeightFormat(4, 64, False), device)
    x = torch.randn(3, 128, 5, device=device).transpose(1, 2)
    assert not x.is_contiguous()
    assert torch.equal(weight.linear(x), weight.linear(x.contiguous()))
    assert weight.linear(x).shape == (3, 5, 48)
    wide = torch.randn(4, 200, device=device)
    assert torch.equal(weight.linear(wide[:, 7:135]), weight.linear(wide[:, 7:135].contiguous()))
    assert weight.linear(wide[0, :128]).shape == (48,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 3, 20])
def test_nan_and_infinity_come_out_as_from_linear(device, dtype, bits, m):
    n, k = 40, 160
    weight = make(n, k, WeightFormat(bits, 32, False), device)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(m, k, device=device, dtype=dtype)
        x[m // 2, random.randrange(k)] = value
        got = weight.linear(x)
        expected = torch.nn.functional.linear(x, weight.dequantize(dtype))
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isposinf(), expected.isposinf())
        assert torch.equal(got.isneginf(), expected.isneginf())
        finite = torch.isfinite(x).all(dim=1)
        if finite.any():
            check(x[finite], weight, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_run_to_run_and_batch_position_change_nothing(device, format):
    weight = make(130, 320, format, device)
    x = torch.randn(1, 320, device=device)
    first = weight.linear(x)
    assert all(torch.equal(weight.linear(x), first) for _ in range(5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck_with_gradients(device, dtype, with_bias):
    weight = make(24, 96, WeightFormat(4, 32, False), device)
    x = torch.randn(3, 96, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(24, device=device, dtype=dtype, requires_grad=True) if with_bias else None
    arguments = (x, weight.packed, weight.meta, bias, 24, 4, 32, False)
    torch.library.opcheck(torch.ops.kvopt.qlinear, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_to_input_and_bias(device):
    weight = make(24, 96, WeightFormat(4, 32, False), device)
    x = torch.randn(2, 5, 96, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)
    upstream = torch.randn(2, 5, 24, device=device)
    weight.linear(x, bias).backward(upstream)
    assert relative_error(x.grad, upstream.double() @ weight.dequantize().double()) < 1e-5
    assert relative_error(bias.grad, upstream.double().sum((0, 1))) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_breaks(device):
    weight = make(64, 128, WeightFormat(4, 64, False), device)

    def f(x: torch.Tensor) -> torch.Tensor:
        return ops.qlinear(x * 2, weight.packed, weight.meta, None, 64, 4, 64, False) + 1

    x = torch.randn(3, 128, device=device)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), f(x))


@pytest.mark.parametrize("device", DEVICES)
def test_errors_name_the_argument(device):
    weight = make(24, 96, WeightFormat(4, 32, False), device)
    call = torch.ops.kvopt.qlinear
    x = torch.randn(2, 96, device=device)
    rest = (weight.packed, weight.meta, None, 24, 4, 32, False)
    with pytest.raises(RuntimeError, match="packed must have shape"):
        call(torch.randn(2, 32, device=device), weight.packed, weight.meta, None, 24, 4, 32, False)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        call(x.double(), *rest)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        call(x, weight.packed, weight.meta, torch.zeros(23, device=device), 24, 4, 32, False)
    with pytest.raises(RuntimeError, match="meta must be int16"):
        call(x, weight.packed, weight.meta.int(), None, 24, 4, 32, False)
    with pytest.raises(RuntimeError, match="packed must have shape") as info:
        call(x, weight.packed[:-1], weight.meta, None, 24, 4, 32, False)
    assert str(Path.cwd()) not in str(info.value)  # no path of the machine that built it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 16, 100])
def test_graph_replay_equals_eager(m):
    weight = make(256, 512, WeightFormat(4, 128, False), "cuda")
    x = torch.randn(m, 512, device="cuda", dtype=torch.float16)
    expected = weight.linear(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = weight.linear(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_cpu_equals_gpu(format):
    on_cpu = make(96, 704, format, "cpu")
    on_gpu = on_cpu.to("cuda")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu.codes(), on_gpu.codes(), strict=True))
    x = torch.randn(6, 704)
    assert relative_error(on_gpu.linear(x.cuda()), on_cpu.linear(x)) < 2e-4
