# SPDX-License-Identifier: Apache-2.0
"""One layer at a time gives what the whole model gives: inputs, order, groups; for each architecture."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import kvopt
from conftest import DEVICES, relative_error
from families import KNOWN, UNKNOWN, Routed, TwoStreams, build
from kvopt.models.adapters import find_layers, groups_of
from kvopt.weights.calibration import prepare
from kvopt.weights.formats import quantize_to
from kvopt.weights.solvers import SOLVERS, Solution
from kvopt.weights.streaming import Stream
from kvopt.weights.walk import is_linear, weight_of


def tokens(windows: int = 11, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (windows, length))


def rounding(w: torch.Tensor, format: Any) -> Solution:
    codes, scale, zero = quantize_to(w, format).codes()
    return Solution(codes, scale, zero)


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def hessians_of(model: nn.Module, names: list[str], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The sum of x xᵀ of each linear's inputs in the whole model, in fp64."""
    sums: dict[str, torch.Tensor] = {}

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().double().reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(listen(name)) for name in names]
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN, "routed", "two streams"])
def test_each_method_sees_the_inputs_of_the_finished_model(name, device, monkeypatch):
    """True sequential order: what a solver saw is what reaches its linear once all before it are quantised."""
    built = {"routed": Routed, "two streams": TwoStreams}
    model = (built[name]() if name in built else build(name)).to(device)
    windows = tokens().to(device)
    originals = {name: weight_of(module).clone() for name, module in linears_of(model).items()}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(w: torch.Tensor, format: Any, statistics: Any, *, seed: int = 0) -> Solution:
        seen.append((w.clone(), statistics.hessian.clone()))
        return rounding(w, format)

    monkeypatch.setitem(SOLVERS, "gptq", spy)
    report = kvopt.quantize(model, "gptq_3bit_g16", calibration=windows, progress=False)
    quantised = [row.name for row in report.layers]
    calibration = prepare(windows, None, model, seed=0)
    expected = hessians_of(model, quantised, calibration.windows.to(device))
    assert len(seen) == len(expected)
    for row in quantised:
        if row not in expected:  # an expert that no token chose
            assert ".2" in row and name == "routed"
            continue
        hessian = next(
            h for w, h in seen if w.shape == originals[row].shape and torch.equal(w, originals[row])
        )
        assert relative_error(hessian, expected[row]) < 2e-3, row


@pytest.mark.parametrize("name", KNOWN)
def test_tables_agree_with_what_runs(name):
    model = build(name)
    windows = tokens()
    layers_name, layers = find_layers(model)
    stream = Stream(model, layers_name, layers, prepare(windows, None, model, seed=0), None)
    stream.embed()
    assert stream.layers == layers
    stage = stream.layer(0)
    linears = {n: m for n, m in linears_of(model).items() if n.startswith(stage.prefix)}
    found = [{n.removeprefix(stage.prefix) for n in s.linears} for s in stage.discover(linears, stream.seen)]
    table = groups_of(model)
    assert table is not None
    assert [set(group.linears) for group in table] == found
    assert not any(parameter.grad_fn for parameter in model.parameters())


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_streamed_logits_are_the_models(name):
    """Nothing quantised: what comes out behind the layers is what the model computes."""
    model = build(name)
    windows = tokens()
    calibration = prepare(windows, None, model, seed=1)
    stream = Stream(model, *find_layers(model), calibration, None)
    stream.embed()
    assert stream.layers
    for index in range(len(stream.layers)):
        stream.layer(index)
        stream.advance(index)
    with torch.no_grad():
        logits = torch.cat([stream.outside().run(batch).logits for batch in (*stream.seen, *stream.held_out)])
        expected = model(torch.cat([calibration.windows, calibration.held_out])).logits
    assert relative_error(logits, expected) < 1e-5


def test_layers_that_pass_two_states_on_run_as_a_whole():
    model = TwoStreams()
    stream = Stream(model, *find_layers(model), prepare(tokens(), None, model, seed=0), None)
    stream.embed()
    assert not stream.layers
    report = kvopt.quantize(model, "int4_g16", calibration=tokens(), progress=False)
    assert len(report.layers) == 5 and all(row.held_out_error for row in report.layers)


def test_experts_without_tokens_are_rounded_and_say_so():
    model = Routed()
    report = kvopt.quantize(model, "gptq_4bit_g16", calibration=tokens(), progress=False)
    rows = {row.name: row for row in report.layers}
    lonely = [row for name, row in rows.items() if name.startswith("blocks.") and name.endswith(".2")]
    assert len(lonely) == 6
    assert all(row.method == "rtn" and "no calibration token reached it" in row.note for row in lonely)
    assert all(row.held_out_error is None for row in lonely)
    assert rows["blocks.0.up.0"].held_out_error is not None


def test_fused_experts_stay_and_are_named():
    model = build("qwen2_moe")
    report = kvopt.quantize(model, "int4_g16", calibration=tokens(), progress=False)
    fused = [name for name in report.kept if "experts.gate_up_proj" in name]
    assert len(fused) == 2
    assert report.kept[fused[0]] == dict(model.named_parameters())[fused[0]].nbytes
    assert "model.embed_tokens.weight" in report.kept
    assert not any("q_proj" in name for name in report.kept)


def test_the_heads_inputs_come_through_the_quantised_layers(monkeypatch):
    model = build("llama")
    windows = tokens()
    head = model.lm_head.weight.detach().clone()
    seen = []

    def spy(w: torch.Tensor, format: Any, statistics: Any, *, seed: int = 0) -> Solution:
        if torch.equal(w, head):
            seen.append(statistics.hessian.clone())
        return rounding(w, format)

    monkeypatch.setitem(SOLVERS, "gptq", spy)
    kvopt.quantize(model, {"lm_head": "gptq_4bit_g16", "*": "int3_g16"}, calibration=windows, progress=False)
    calibration = prepare(windows, None, model, seed=0)
    expected = hessians_of(model, ["lm_head"], calibration.windows)
    assert len(seen) == 1 and relative_error(seen[0], expected["lm_head"]) < 2e-3


def test_training_mode_dropout_and_forward_are_as_before():
    model = build("gpt2")
    model.train()
    model.transformer.h[0].eval()
    kvopt.quantize(model, "int4_g16", calibration=tokens(), progress=False)
    assert model.training and model.transformer.h[1].attn.training and not model.transformer.h[0].training
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_midway_leaves_no_hooks(monkeypatch):
    def broken(w: torch.Tensor, format: Any, statistics: Any, *, seed: int = 0) -> Solution:
        raise ValueError("no solution")

    monkeypatch.setitem(SOLVERS, "gptq", broken)
    model = build("llama")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: no solution"):
        kvopt.quantize(model, "gptq_4bit_g16", calibration=tokens(), progress=False)
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "opt", "routed", "two streams"])
def test_a_model_on_the_cpu_is_quantised_on_the_gpu(name):
    built = {"routed": Routed, "two streams": TwoStreams}
    model = built[name]() if name in built else build(name)
    recipe = {"*.0.*": "int8", "lm_head" if name in KNOWN else "out": "gptq_4bit_g16", "*": "gptq_4bit_g16"}
    report = kvopt.quantize(model, recipe, calibration=tokens(), progress=False, device="cuda")
    quantised = [module for module in model.modules() if isinstance(module, kvopt.QuantLinear)]
    assert len(quantised) == len(report.layers) and all(module.packed.is_cuda for module in quantised)
    model.to("cuda")
    with torch.no_grad():
        out = model(tokens().cuda())
    assert torch.isfinite(out if isinstance(out, torch.Tensor) else out.logits).all()


def test_finished_layers_hold_no_full_precision_weight():
    model = build("llama")
    weights = {name: weakref.ref(module.weight) for name, module in linears_of(model).items()}
    alive: list[list[str]] = []

    def done(row: Any) -> None:
        gc.collect()
        alive.append([name for name, weight in weights.items() if weight() is not None])

    kvopt.quantize(model, "gptq_4bit_g16", calibration=tokens(), progress=done)
    for first, names in zip(("model.layers.0", "model.layers.1"), (alive[7], alive[-1]), strict=True):
        assert (
            len([name for name in names if name.startswith(first)]) <= 1
        )  # the last of a layer is being replaced
    gc.collect()
    assert [name for name, weight in weights.items() if weight() is not None] == ["lm_head"]
