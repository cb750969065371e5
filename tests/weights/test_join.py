# SPDX-License-Identifier: Apache-2.0
"""Several weights in one: rows below each other, and gate and up in eights; and the product's optional parts."""

from __future__ import annotations

import pytest
import torch

import kvopt
from conftest import DEVICES, relative_error
from kvopt.weights.formats import QuantizedWeight

each_device = pytest.mark.parametrize("device", DEVICES)
each_recipe = pytest.mark.parametrize(
    "recipe", ["int8", "int8_dyn", "int4_g32", "int3_g32_sym", "int2_g16", "nf4"]
)


@each_device
@each_recipe
def test_cat_is_the_rows_below_each_other(device, recipe):
    weights = [kvopt.quantize_weight(torch.randn(n, 128, device=device), recipe) for n in (48, 7, 33)]
    joined = QuantizedWeight.cat(weights)
    assert joined.shape == (88, 128)
    assert torch.equal(joined.dequantize(), torch.cat([w.dequantize() for w in weights]))
    x = torch.randn(3, 128, device=device)
    outputs = kvopt.qlinear(x, joined).split([48, 7, 33], dim=1)
    for weight, y in zip(weights, outputs, strict=True):
        assert relative_error(y, kvopt.qlinear(x, weight)) < 1e-6


@each_device
@each_recipe
@pytest.mark.parametrize("m", [1, 5, 20])
def test_swiglu_of_interleaved_gate_and_up(device, recipe, m):
    gate, up = (kvopt.quantize_weight(torch.randn(40, 128, device=device) / 11, recipe) for _ in range(2))
    woven = QuantizedWeight.interleave_swiglu(gate, up)
    x = torch.randn(m, 128, device=device)
    residual = torch.randn(m, 40, device=device)
    got = kvopt.qlinear(x, woven, swiglu=True, residual=residual)
    expected = torch.nn.functional.silu(kvopt.qlinear(x, gate)) * kvopt.qlinear(x, up) + residual
    assert relative_error(got, expected) < 1e-5
    assert torch.equal(woven.dequantize()[8:16], up.dequantize()[:8])


@each_device
def test_optional_parts_of_the_product(device):
    weight = kvopt.quantize_weight(torch.randn(24, 96, device=device), "int4_g32")
    x = torch.randn(4, 96, device=device)
    bias, scale = torch.randn(24, device=device), torch.rand(96, device=device) + 0.5
    factors = (torch.randn(4, 3, device=device), torch.randn(24, 3, device=device))
    residual = torch.randn(4, 24, device=device)
    got = kvopt.qlinear(x, weight, bias, input_scale=scale, low_rank=factors, residual=residual)
    expected = (x * scale) @ weight.dequantize().T + bias + factors[0] @ factors[1].T + residual
    assert relative_error(got, expected) < 1e-4


@each_device
def test_the_recipe_decides_the_activations_and_an_argument_overrides_it(device):
    w, x = torch.randn(64, 128, device=device), torch.randn(20, 128, device=device)
    plain, a8 = (kvopt.quantize_weight(w, recipe) for recipe in ("int4_g32", "int4_g32+a8"))
    exact = x.double() @ plain.dequantize().double().T
    assert relative_error(kvopt.qlinear(x, plain), exact) < 1e-4
    assert relative_error(kvopt.qlinear(x, a8), exact) > 1e-3
    assert torch.equal(kvopt.qlinear(x, a8), kvopt.qlinear(x, plain, activation_bits=8))
    assert torch.equal(kvopt.qlinear(x, plain), kvopt.qlinear(x, a8, activation_bits=16))


def test_what_can_not_be_joined_is_refused():
    make = kvopt.quantize_weight
    a = make(torch.randn(16, 64), "int4_g32")
    with pytest.raises(ValueError, match="no weights"):
        QuantizedWeight.cat([])
    with pytest.raises(ValueError, match="one format, K and device"):
        QuantizedWeight.cat([a, make(torch.randn(16, 64), "int4_g64")])
    with pytest.raises(ValueError, match="one format, K and device"):
        QuantizedWeight.cat([a, make(torch.randn(16, 96), "int4_g32")])
    double = make(torch.randn(16, 64), "nf4_dq")
    with pytest.raises(ValueError, match="double-quantised scales"):
        QuantizedWeight.cat([double, double])
    with pytest.raises(ValueError, match="one shape and a multiple of 8 rows"):
        QuantizedWeight.interleave_swiglu(a, make(torch.randn(24, 64), "int4_g32"))
    odd = make(torch.randn(12, 64), "int4_g32")
    with pytest.raises(ValueError, match="one shape and a multiple of 8 rows"):
        QuantizedWeight.interleave_swiglu(odd, odd)
