# SPDX-License-Identifier: Apache-2.0
"""Moving a factor per channel into the module before it: the function stays, or the move is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import kvopt
from conftest import relative_error
from families import KNOWN, build
from kvopt.models.adapters import Source, find_layers, groups_of
from kvopt.weights import candidates, folding
from kvopt.weights.walk import weight_of

# Per family: how many of a layer's groups have a source that takes a factor up.
FOLDABLE = {
    "llama": 3,  # two query heads share a value head: v → o is not legal
    "llama-mha-bias": 4,
    "mistral": 3,
    "qwen2": 4,
    "qwen3": 3,
    "smollm3": 3,
    "gemma": 3,
    "gemma2": 3,
    "gemma3": 3,
    "phi": 2,
    "phi3": 4,
    "opt": 4,  # ReLU lets a positive factor through: fc1 → fc2
    "opt-post-norm": 2,
    "gpt2": 3,
    "gpt_neox": 3,
    "gpt_neox-serial": 3,
}


def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (8, 20))


def outliers(model: Any) -> None:
    """Two input channels of every group that has a source become a hundred times as large; the function stays."""
    with torch.no_grad():
        for layer in find_layers(model)[1]:
            for group in groups_of(model) or ():
                columns = weight_of(layer.get_submodule(group.linears[0])).shape[1]
                factor = torch.ones(columns)
                factor[torch.randperm(columns)[:2]] = 0.01
                fold = group.source and folding.prepare(layer, group.source, model.config, factor)
                if fold:
                    fold.commit()
                    for linear in group.linears:
                        weight_of(layer.get_submodule(linear)).mul_(fold.factor)


@pytest.mark.parametrize("name", KNOWN)
def test_every_fold_preserves_the_function_in_fp64(name):
    model: Any = build(name, torch.float64)
    windows = tokens()
    with torch.no_grad():
        expected = model(windows).logits
    moved = 0
    for layer in find_layers(model)[1]:
        groups = groups_of(model)
        assert groups is not None
        for group in groups:
            columns = weight_of(layer.get_submodule(group.linears[0])).shape[1]
            factor = torch.empty(columns, dtype=torch.float64).uniform_(0.1, 5.0)
            fold = group.source and folding.prepare(layer, group.source, model.config, factor)
            if not fold:
                continue
            fold.commit()
            moved += 1
            for linear in group.linears:
                weight_of(layer.get_submodule(linear)).mul_(fold.factor)
    assert moved == 2 * FOLDABLE[name]
    with torch.no_grad():
        # Gemma's norms compute in fp32, whatever the model's type
        assert relative_error(model(windows).logits, expected) < (1e-5 if "gemma" in name else 1e-11)


@pytest.mark.parametrize("name", KNOWN)
def test_awq_folds_and_the_quantised_model_computes_the_same(name):
    """8 bits are nearly exact, so a factor that went astray would show at once; without scaling the outliers cost."""
    model: Any = build(name)
    outliers(model)
    plain = copy.deepcopy(model)
    windows = tokens()
    with torch.no_grad():
        expected = model(windows).logits
    report = kvopt.quantize(model, "awq_8bit_g16", calibration=windows, progress=False)
    kvopt.quantize(plain, "clip_8bit_g16", calibration=windows, progress=False)
    with torch.no_grad():
        unscaled = relative_error(plain(windows).logits, expected)
        error = relative_error(model(windows).logits, expected)
    assert error < 0.1 and error < unscaled / 3
    assert sum(row.method == "awq" for row in report.layers) > len(report.layers) / 2


def test_awq_uses_norms_and_rows_where_it_may_and_an_input_scale_elsewhere():
    model: Any = build("llama")
    outliers(model)
    for layer in model.model.layers:  # and in what o_proj reads, or no scale at all might be best there
        values, rows = layer.self_attn.v_proj.weight.data, layer.self_attn.o_proj.weight.data
        values[::8] *= 100  # the first channel of each of two value heads, which two query heads share
        rows[:, ::8] /= 100
    norms = {n: p.clone() for n, p in model.named_parameters() if n.endswith("layernorm.weight")}
    report = kvopt.quantize(model, "awq_4bit_g16", calibration=tokens(), progress=False)
    rows = {row.name: row for row in report.layers}
    after = dict(model.named_parameters())
    layers = model.model.layers
    for index in range(2):
        names = [f"model.layers.{index}.self_attn.{part}_proj" for part in "qkv"]
        chosen = [rows[name].method == "awq" for name in names]
        norm = f"model.layers.{index}.input_layernorm.weight"
        assert any(chosen) == (not torch.equal(norms[norm], after[norm]))
        for name, folded in zip(names, chosen, strict=True):
            scale = model.get_submodule(name).quantized_weight.input_scale
            if folded:
                assert scale is None
            elif any(chosen):  # rounded to nearest behind a divided norm
                assert torch.allclose(scale, norms[norm] / after[norm], rtol=1e-5)
        if rows[f"model.layers.{index}.self_attn.o_proj"].method == "awq":
            assert layers[index].self_attn.o_proj.quantized_weight.input_scale is not None


@pytest.mark.parametrize("bad", [None, "k_proj"])
def test_fold_only_leaves_no_input_scale_and_is_never_worse_than_rounding(bad, monkeypatch, tmp_path):
    """Not even where a linear behind a folded norm would be rounded to nearest: then nothing is folded there."""
    model: Any = build("llama")  # grouped queries: nothing takes up the factor of o_proj
    outliers(model)
    norms = {n: p.clone() for n, p in model.named_parameters() if n.endswith("layernorm.weight")}
    if bad is not None:
        solve = candidates.solve_folded

        def spoiled(w: torch.Tensor, *args: Any) -> Any:
            found = solve(w, *args)
            if w.shape[0] == 16:  # k and v
                found.weight = kvopt.quantize_weight(torch.randn(w.shape), "int4_g16")
            return found

        monkeypatch.setattr(candidates, "solve_folded", spoiled)
    report = kvopt.quantize(model, "awq_4bit_g16_fold", calibration=tokens(), progress=False)
    packed = [m for m in model.modules() if isinstance(m, kvopt.QuantLinear)]
    assert len(packed) == 14 and all(m.quantized_weight.input_scale is None for m in packed)
    rows = {row.name: row for row in report.layers}
    assert all(row.held_out_error <= row.rtn_held_out_error for row in report.layers)
    for index in range(2):
        o = rows[f"model.layers.{index}.self_attn.o_proj"]
        assert o.method in ("clip", "rtn") and (o.method == "rtn" or "no factor that can be folded" in o.note)
        norm = f"model.layers.{index}.input_layernorm.weight"
        folded = not torch.equal(norms[norm], dict(model.named_parameters())[norm])
        kinds = {rows[f"model.layers.{index}.self_attn.{part}_proj"].method for part in "qkv"}
        assert ("awq" in kinds) == folded and (kinds == {"awq"} or not folded)
        assert not (bad and folded)
    assert any(row.method == "awq" for row in report.layers)
    assert report.recipe == "awq_4bit_g16_fold"


def test_half_precision_norms_are_made_good_exactly():
    """What rounding the divided norm to bf16 changes goes into the factor: the product keeps its value."""
    norm = nn.LayerNorm(64)
    nn.init.uniform_(norm.weight, 0.3, 2)
    norm = norm.bfloat16()
    whole = norm.weight.detach().double()
    fold = folding.prepare(nn.ModuleDict({"norm": norm}), Source("norm"), None, torch.rand(64) + 0.3)
    assert fold is not None
    fold.commit()
    assert norm.weight.dtype == torch.bfloat16
    assert relative_error(norm.weight.double() * fold.factor, whole) < 1e-6


def test_what_would_lose_precision_is_refused():
    layer = nn.ModuleDict(
        {"rounded": nn.Linear(8, 16).bfloat16(), "free": nn.LayerNorm(16, elementwise_affine=False)}
    )
    factor = torch.rand(16) + 0.5
    assert folding.prepare(layer, Source("rounded"), None, factor) is None
    assert folding.prepare(layer, Source("free"), None, factor) is None
    assert folding.prepare(layer, Source("absent"), None, factor) is None
    layer["rounded"] = nn.Linear(8, 16)
    assert folding.prepare(layer, Source("rounded"), None, factor) is not None
    assert folding.prepare(layer, Source("rounded"), None, factor[:8]) is None  # other channels
    assert folding.prepare(layer, Source("rounded", when=lambda config: False), None, factor) is None
    tiny = kvopt.QuantLinear(kvopt.quantize_weight(torch.randn(16, 32), "int4_g16"))
    quantised = nn.ModuleDict({"tiny": tiny})
    assert folding.prepare(quantised, Source("tiny"), None, factor) is not None
    assert (
        folding.prepare(quantised, Source("tiny"), None, factor * 1e5) is None
    )  # scales below fp16's normal range
    double = kvopt.QuantLinear(kvopt.quantize_weight(torch.randn(16, 32), "nf4_b32_dq"))
    assert folding.prepare(nn.ModuleDict({"d": double}), Source("d"), None, factor) is None
