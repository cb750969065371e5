# SPDX-License-Identifier: Apache-2.0
"""A weight that scales its inputs: every way through which it is used, moved, joined and stored."""

from __future__ import annotations

import copy

import pytest
import torch

import kvopt
from conftest import DEVICES, relative_error
from kvopt.weights.formats import QuantizedWeight, quantize_to
from kvopt.weights.linear import QuantLinear, TiedEmbedding

each_device = pytest.mark.parametrize("device", DEVICES)
FORMAT = kvopt.Recipe.parse("int4_g32").format
assert FORMAT is not None


def scaled_weight(n: int, k: int, device: str = "cpu", inputs: torch.Tensor | None = None) -> QuantizedWeight:
    """Random, with 1 / s among powers of two and their halves, exact in every type."""
    if inputs is None:
        inputs = 2.0 ** torch.randint(-3, 3, (k,)) * torch.tensor([1.0, 1.5])[torch.randint(0, 2, (k,))]
    plain = quantize_to(torch.randn(n, k), FORMAT)
    weight = QuantizedWeight.from_codes(*plain.codes(), FORMAT, input_scale=inputs.float())
    return weight.to(device)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_and_dense_weights_have_it(device, dtype):
    weight = scaled_weight(24, 96, device)
    bare = QuantizedWeight.from_codes(*weight.codes(), FORMAT)
    dense = weight.dequantize()
    assert torch.equal(dense, bare.dequantize() * weight.input_scale)
    assert torch.equal(weight.dequantize(dtype), dense.to(dtype))
    x = torch.randn(5, 96, device=device, dtype=dtype)
    bound = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    expected = x.double() @ dense.double().T
    assert relative_error(kvopt.qlinear(x, weight), expected) < bound
    assert relative_error(QuantLinear(weight)(x), expected) < bound
    more = torch.full((96,), 0.5, device=device, dtype=dtype)
    assert relative_error(kvopt.qlinear(x, weight, input_scale=more), expected / 2) < bound


@each_device
def test_it_is_counted_and_moved(device):
    weight = scaled_weight(16, 64, device)
    bare = QuantizedWeight.from_codes(*weight.codes(), FORMAT)
    assert weight.nbytes == bare.nbytes + 64 * 4
    assert weight.bits == 8 * weight.nbytes / (16 * 64)
    for target in DEVICES:
        moved = weight.to(target)
        assert moved.device.type == target and moved.input_scale.device.type == target
        assert torch.equal(moved.dequantize().cpu(), weight.dequantize().cpu())


def test_joining_needs_the_same():
    inputs = torch.rand(64) + 0.5
    a, b = scaled_weight(16, 64, inputs=inputs), scaled_weight(8, 64, inputs=inputs)
    joined = QuantizedWeight.cat([a, b])
    assert torch.equal(joined.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    woven = QuantizedWeight.interleave_swiglu(a, scaled_weight(16, 64, inputs=inputs))
    assert torch.equal(woven.dequantize()[:8], a.dequantize()[:8])
    for other in (scaled_weight(16, 64), quantize_to(torch.randn(16, 64), FORMAT)):
        with pytest.raises(ValueError, match="cat: the weights have different input scales"):
            QuantizedWeight.cat([a, other])
        with pytest.raises(ValueError, match="interleave_swiglu: the weights have different input scales"):
            QuantizedWeight.interleave_swiglu(other, a)


def test_a_wrong_one_is_refused():
    codes = quantize_to(torch.randn(4, 64), FORMAT).codes()
    for wrong in (torch.ones(63), torch.ones(64, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"input_scale: expected float32 of shape \(64,\)"):
            QuantizedWeight.from_codes(*codes, FORMAT, input_scale=wrong)


@each_device
def test_a_module_keeps_it_through_state_dict_copy_cast_and_move(device):
    module = QuantLinear(scaled_weight(16, 64, device), torch.randn(16, device=device))
    state = module.state_dict()
    assert set(state) == {"codes", "scale", "zero", "input_scale", "bias"}
    assert state["input_scale"].dtype == torch.float32
    other = QuantLinear(scaled_weight(16, 64, device), torch.zeros(16, device=device))
    other.load_state_dict(state)
    dense = module.quantized_weight.dequantize()
    for same in (other, copy.deepcopy(module), copy.deepcopy(module).half(), copy.deepcopy(module).cpu()):
        assert torch.equal(same.quantized_weight.dequantize().cpu(), dense.cpu())
    del state["input_scale"]
    with pytest.raises(RuntimeError, match="input_scale"):
        other.load_state_dict(state)


@each_device
def test_a_tied_embedding_reads_scaled_rows(device):
    head = QuantLinear(scaled_weight(40, 64, device))
    tokens = torch.randint(0, 40, (2, 3), device=device)
    rows = TiedEmbedding(head, torch.float32)(tokens)
    assert torch.equal(rows, head.quantized_weight.dequantize()[tokens])


@each_device
def test_gradients_reach_the_input(device):
    module = QuantLinear(scaled_weight(16, 64, device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    g = torch.randn(3, 16, device=device)
    module(x).backward(g)
    assert relative_error(x.grad, g @ module.quantized_weight.dequantize()) < 1e-5
