# SPDX-License-Identifier: Apache-2.0
"""``llm_int8`` as a recipe: modules, moves, checkpoints, gradients."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import kvopt
from conftest import DEVICES, relative_error
from kvopt import ops
from kvopt.weights import QuantLinear
from kvopt.weights.formats import QuantizedWeight, WeightFormat, quantize_to
from tiny_models import logits, some_tokens, tiny_gpt2, tiny_llama

each_device = pytest.mark.parametrize("device", DEVICES)


def some_rows(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., [1, 5]] *= 30
    return x


@pytest.mark.parametrize("threshold", [0.0, -6.0, 6.05, 100.1, float("inf"), float("nan")])
def test_impossible_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match=r"outlier threshold must be a multiple of 0.1 in 0.1…100.0"):
        WeightFormat(8, None, 4, outlier_threshold=threshold)


def test_only_int8_dynamic_has_one():
    with pytest.raises(ValueError, match="only int8 dynamic keeps outlier columns"):
        WeightFormat(8, None, 1, outlier_threshold=6.0)


@each_device
@pytest.mark.parametrize("recipe", ["llm_int8", "llm_int8_t25"])
def test_modules_and_weights_use_the_threshold(device, recipe):
    threshold = kvopt.Recipe.parse(recipe).format.outlier_threshold
    dense, bias = torch.randn(24, 64, device=device), torch.randn(24, device=device)
    weight = kvopt.quantize_weight(dense, recipe)
    same = kvopt.quantize_weight(dense, "int8_dyn")
    assert torch.equal(weight.packed, same.packed) and torch.equal(weight.meta, same.meta)
    x = some_rows(7, 64).to(device)
    y = ops.qlinear_outliers(x, weight.packed, weight.meta, bias, 24, threshold)
    assert not torch.equal(y, kvopt.qlinear(x, same, bias))
    assert torch.equal(kvopt.qlinear(x, weight, bias), y)
    assert torch.equal(QuantLinear(weight, bias)(x), y)
    residual = torch.randn(7, 12 * 2, device=device)
    assert relative_error(kvopt.qlinear(x, weight, bias, residual=residual), y + residual) < 1e-6
    scaled = QuantizedWeight.from_codes(*weight.codes(), weight.format, input_scale=x.new_full((64,), 0.5))
    assert relative_error(QuantLinear(scaled, bias)(2 * x), y) < 1e-6
    for target in DEVICES:
        moved = weight.to(target)
        assert moved.format == weight.format
        assert relative_error(kvopt.qlinear(x.to(target), moved, bias.to(target)), y) < 1e-5


def test_explain_says_what_is_outside():
    arguments = (16, 64, 64)
    plain = ops.explain_qlinear(*arguments, WeightFormat(8, None, 4))
    text = ops.explain_qlinear(*arguments, WeightFormat(8, None, 4, outlier_threshold=4.5))
    assert text.startswith(plain) and "4.5" in text.removeprefix(plain)


def test_two_thresholds_are_two_formats():
    w = torch.randn(16, 64)
    a, b = (kvopt.quantize_weight(w, recipe) for recipe in ("llm_int8", "llm_int8_t50"))
    with pytest.raises(ValueError, match="one format"):
        QuantizedWeight.cat([a, b])
    assert QuantizedWeight.cat([a, a]).format.outlier_threshold == 6.0


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("recipe", ["llm_int8", "llm_int8_t3", "llm_int8_t3+head_int8"])
def test_save_and_load_give_the_same_logits(tmp_path, build, recipe):
    model, tokens = build(), some_tokens()
    report = kvopt.quantize(model, recipe, progress=False)
    assert {row.format for row in report.layers} == {*recipe.replace("head_", "").split("+")}
    expected = logits(model, tokens)
    kvopt.save_quantized(model, tmp_path / "saved")
    for loaded in (
        kvopt.load_quantized(tmp_path / "saved", device="cpu"),
        copy.deepcopy(model),
    ):
        assert torch.equal(logits(loaded, tokens), expected)
        formats = {m.format for m in loaded.modules() if isinstance(m, QuantLinear)}
        assert kvopt.Recipe.parse(recipe).format in formats


@pytest.mark.parametrize("value", ["6", True, -1, 0.05, 1e400, [6.0]])
def test_a_hostile_threshold_is_refused(tmp_path, value):
    model = tiny_llama()
    kvopt.quantize(model, "llm_int8", progress=False)
    kvopt.save_quantized(model, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["groups"][0]["outlier_threshold"] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"outlier.threshold"):
        kvopt.load_quantized(tmp_path / "saved", device="cpu")


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors", "bnb"])
def test_formats_that_have_no_threshold_refuse_it(tmp_path, format):
    model = tiny_llama()
    kvopt.quantize(model, "llm_int8", progress=False)
    with pytest.raises(ValueError, match=f"format '{format}' can't hold"):
        kvopt.save_quantized(model, tmp_path / "saved", format=format)
    assert not (tmp_path / "saved").exists()


@each_device
def test_gradients_reach_the_input(device):
    module = QuantLinear(quantize_to(torch.randn(16, 64), WeightFormat(8, None, 4, outlier_threshold=6.0)))
    module = module.to(device)
    x = some_rows(3, 64).to(device).requires_grad_()
    g = torch.randn(3, 16, device=device)
    module(x).backward(g)
    assert relative_error(x.grad, g @ module.quantized_weight.dequantize()) < 1e-5


def test_a_method_does_not_choose_its_codes():
    with pytest.raises(ValueError, match="gptq: the format must be asymmetric or symmetric, got llm_int8"):
        kvopt.Recipe(format=WeightFormat(8, None, 4, outlier_threshold=6.0), method="gptq")
