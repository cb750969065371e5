# SPDX-License-Identifier: Apache-2.0
"""Formats for a budget: the knapsack against brute force, the costs against the loss, the bytes as counted."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import kvopt
from families import Routed, TwoStreams, build
from kvopt import assets
from kvopt.eval import perplexity, read_documents, windows_of
from kvopt.weights import budget
from kvopt.weights.budget import Option, allocate
from kvopt.weights.calibration import prepare
from kvopt.weights.walk import head_of, is_linear, weight_of


def tokens(windows: int = 11, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (windows, length))


def inner_linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if is_linear(m) and m is not head_of(model)}


# --- the knapsack ---


def cost_of(tables: list[list[Option]], picks: Any) -> tuple[int, float]:
    chosen = [options[i] for options, i in zip(tables, picks, strict=True)]
    return sum(o.nbytes for o in chosen), sum(o.cost for o in chosen)


def some_tables(count: int, unit: int) -> list[list[Option]]:
    return [
        [Option(f"f{i}", unit * random.randint(1, 12), random.random()) for i in range(random.randint(1, 4))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("unit", [1, 48])
def test_knapsack_is_exact(unit: int) -> None:
    for _ in range(30):
        tables = some_tables(random.randint(1, 5), unit)
        least = sum(min(o.nbytes for o in options) for options in tables)
        capacity = least + random.randint(0, 20 * unit)
        every = [cost_of(tables, p) for p in itertools.product(*(range(len(o)) for o in tables))]
        best = min(cost for size, cost in every if size <= capacity)
        size, cost = cost_of(tables, allocate(tables, capacity))
        assert size <= capacity and cost == pytest.approx(best, abs=1e-12)


def least_cost(tables: list[list[Option]], capacity: int, unit: int) -> float:
    """Of all choices that fit: exact for sizes that are multiples of ``unit``."""
    best = [0.0] * (capacity // unit + 1)
    for options in tables:
        best = [
            min(
                (best[c - o.nbytes // unit] + o.cost for o in options if o.nbytes <= c * unit),
                default=math.inf,
            )
            for c in range(len(best))
        ]
    return best[-1]


def test_knapsack_in_coarse_units_loses_at_most_what_rounding_the_sizes_takes(monkeypatch: Any) -> None:
    """One size shares no unit with the others, so cells are coarse, and each size is rounded up by less than one."""
    monkeypatch.setattr(budget, "CELLS", 4096)
    count, unit = 60, 9973
    tables = some_tables(count, unit)
    cost = tables[0][0].cost
    below, above = ([[Option("odd", size, cost), *tables[0][1:]], *tables[1:]] for size in (unit, 2 * unit))
    tables[0][0] = Option("odd", unit + 1, cost)
    room = count * unit * 2
    capacity = sum(min(o.nbytes for o in options) for options in tables) + room
    cell = -(-room // 4096)
    found, cost = cost_of(tables, allocate(tables, capacity))
    assert found <= capacity
    low, high = least_cost(below, capacity, unit), least_cost(above, capacity - count * cell, unit)
    assert low - 1e-9 <= cost <= high + 1e-9


# --- costs ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_costs_are_those_of_the_formula(name: str) -> None:
    """Against the model run as a whole, in float64. OPT's has linears around its layers."""
    model: Any = build(name)
    windows = prepare(tokens(12, 32), None, model, seed=0)
    linears = inner_linears(model)
    probe = budget._Probe(linears, None, lambda name: None)
    budget._measure(model, probe, windows, None)
    found = probe.options("rtn")
    assert set(found) == set(linears)

    inputs: dict[str, list[torch.Tensor]] = {}
    slopes: dict[str, list[torch.Tensor]] = {}

    def listen(key: str) -> Any:
        def hook(module: Any, args: Any, out: torch.Tensor) -> None:
            inputs.setdefault(key, []).append(args[0].detach().double().flatten(0, -2))
            out.register_hook(lambda g: slopes.setdefault(key, []).append(g.double().flatten(0, -2)) and None)

        return hook

    handles = [m.register_forward_hook(listen(key)) for key, m in linears.items()]
    logits = model(windows.windows).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows.windows[:, 1:].flatten(), reduction="sum")
    loss.backward()
    for handle in handles:
        handle.remove()
    count = windows.windows.numel()
    for key, options in found.items():
        x, g = torch.cat(inputs[key]), torch.cat(slopes[key])
        assert [option.format for option in options] == [
            f for f in budget.FORMATS if f == "int8" or int(f.partition("_g")[2]) <= x.shape[1]
        ]
        for option in options:
            weight = weight_of(linears[key])
            packed = kvopt.quantize_weight(weight, option.format)
            moved = x @ (packed.dequantize().double() - weight.double()).T
            expected = (moved.square().mean(0) * g.square().sum(0) / count).sum().item() / 2
            assert option.nbytes == packed.nbytes
            assert option.cost == pytest.approx(expected, rel=1e-3), (key, option)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_search_leaves_the_model_as_it_was(name: str) -> None:
    model: Any = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    found = budget.search(model, inner_linears(model), prepare(tokens(), None, model, 0), 5.0)
    assert found.bits <= 5
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_cuda_costs_are_those_of_the_cpu_and_the_model_stays_on_the_host(name: str) -> None:
    model: Any = build(name)
    windows, linears = prepare(tokens(12, 32), None, model, seed=0), inner_linears(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    found = []
    for device in (None, "cuda"):
        probe = budget._Probe(linears, device, lambda name: None)
        with torch.no_grad():
            budget._measure(model, probe, windows, device)
        found.append(probe.options("rtn"))
    for key in linears:
        for here, there in zip(found[0][key], found[1][key], strict=True):
            assert here.format == there.format and there.cost == pytest.approx(here.cost, rel=2e-2)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    bits = 12  # matrices this small are mostly the padding of the device's layout
    report = kvopt.quantize(model, "gptq", windows.windows, budget_bits=bits, progress=False, device="cuda")
    held = sum(m.quantized_weight.nbytes for m in model.modules() if isinstance(m, kvopt.QuantLinear))
    weights = sum(8 * row.nbytes / row.bits for row in report.layers)
    assert report.bits <= bits and 8 * held <= bits * weights * 1.000001
    assert all(m.packed.is_cuda for m in model.modules() if isinstance(m, kvopt.QuantLinear))


# --- the whole ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("bits", [4.1, 5.5])
def test_true_bits_stay_within_the_budget(name: str, bits: float) -> None:
    model: Any = build(name)
    linears = inner_linears(model)
    weights = sum(m.weight.numel() for m in linears.values())
    names = set(linears)
    report = kvopt.quantize(model, calibration=tokens(), budget_bits=bits, progress=False)
    held = sum(m.quantized_weight.nbytes for m in model.modules() if isinstance(m, kvopt.QuantLinear))
    assert 8 * held <= bits * weights
    assert report.bits == pytest.approx(8 * held / weights)
    assert 8 * held > (bits - 0.5) * weights, "bits are left over"
    assert {row.name for row in report.layers} == set(report.chosen) == names
    assert {row.name: row.format for row in report.layers} == report.chosen
    assert report.budget_bits == bits and report.estimated_loss > 0
    shown = json.loads(report.to_json())
    assert shown["chosen"] == report.chosen and f"{report.bits:.3f} bits" in str(report)


@pytest.mark.parametrize("method", ["gptq", "awq", "clip", "hqq"])
def test_codes_come_from_the_method_asked_for(method: str) -> None:
    model, again = build("llama"), build("llama")
    again.load_state_dict(model.state_dict())
    windows = tokens(20)
    report = kvopt.quantize(model, method, windows, budget_bits=4.5, progress=False)
    weights = sum(8 * row.nbytes / row.bits for row in report.layers)
    assert 8 * sum(row.nbytes for row in report.layers) <= 4.5 * weights * (1 + 1e-9)
    assert all(recipe.startswith(method) or recipe == "int8" for recipe in report.chosen.values())
    assert any(row.method == method for row in report.layers)
    kvopt.quantize(again, report.chosen, windows, progress=False)  # the mapping says it all
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("make", [Routed, TwoStreams])
def test_models_in_no_librarys_style(make: Any) -> None:
    """Run as a whole where layers can't run singly; an expert that no token reaches gets what is usual."""
    torch.manual_seed(1)
    report = kvopt.quantize(make(), calibration=tokens(), budget_bits=6, progress=False)
    assert report.bits <= 6
    if make is Routed:
        unreached = [row for row in report.layers if "no calibration token" in row.note]
        assert unreached and all(row.bits > 3 for row in unreached)


def test_the_same_again_and_after_a_kill(tmp_path: Path) -> None:
    windows, models = tokens(), [build("llama") for _ in range(3)]
    for other in models[1:]:
        other.load_state_dict(models[0].state_dict())
    whole = kvopt.quantize(models[0], "clip", windows, budget_bits=4.5, progress=False, seed=2)

    class Killed(Exception):
        pass

    def kill(row: Any) -> None:
        if row.name.startswith("model.layers.1"):
            raise Killed

    options = {"budget_bits": 4.5, "seed": 2, "resume": tmp_path}
    with pytest.raises(Killed):
        kvopt.quantize(models[1], "clip", windows, progress=kill, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["budget.json", "layer-00000.safetensors"]
    report = kvopt.quantize(models[2], "clip", windows, progress=False, **options)
    assert report.chosen == whole.chosen and report.estimated_loss == whole.estimated_loss
    first, second = models[0].state_dict(), models[2].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ValueError, match=r"budget\.json is of another"):
        kvopt.quantize(build("llama"), "clip", windows, progress=False, **options)
    (tmp_path / "budget.json").write_text("{")
    with pytest.raises(ValueError, match=r"budget\.json is damaged"):
        kvopt.quantize(build("llama"), "clip", windows, progress=False, **options)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("int4_g128", {"budget_bits": 3.5}, "names a method, rtn, gptq"),
        ({"*": "int8"}, {"budget_bits": 3.5}, "names a method"),
        (None, {"budget_bits": 0}, "positive"),
        (None, {"budget_bits": float("nan")}, "positive"),
        (None, {"budget_bits": "four"}, "a number"),
        (None, {"budget_bits": True}, "a number"),
        (None, {"budget_bits": 2.0}, r"2 bits per weight are too few: the smallest formats take \d\.\d+"),
        (None, {"budget_bits": 4.0, "calibration": None}, "needs calibration"),
        (None, {}, "expected a recipe"),
    ],
)
def test_bad_input_changes_nothing(recipe: Any, options: dict[str, Any], message: str) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        kvopt.quantize(model, recipe, **{"calibration": tokens(), "progress": False, **options})
    assert not any(isinstance(module, kvopt.QuantLinear) for module in model.modules())


def test_a_model_that_cant_be_differentiated_or_gives_nan_is_refused() -> None:
    with torch.inference_mode():
        model = build("llama")
    with pytest.raises(ValueError, match="inference mode"):
        kvopt.quantize(model, calibration=tokens(), budget_bits=4, progress=False)
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[7, 5] = float("inf")
    with pytest.raises(ValueError, match="gradient on the calibration tokens holds NaN"):
        kvopt.quantize(model, calibration=tokens(), budget_bits=5, progress=False)
    with torch.inference_mode():  # around the call does no harm
        fine = kvopt.quantize(_outside("llama"), calibration=tokens(), budget_bits=5, progress=False)
    assert fine.bits <= 5


def _outside(name: str) -> Any:
    with torch.inference_mode(False):
        return build(name)


def test_beats_a_uniform_format_of_the_same_bits() -> None:
    """On the embedded model, other windows of the same text; the formula's order of magnitude holds as well."""
    documents = read_documents(assets.path("wiki-heldout.txt"))

    def loss(**how: Any) -> tuple[float, Any]:
        model, tokenizer = kvopt.load("llama-6m", device="cpu", dtype="fp32")
        windows = windows_of(documents, tokenizer, 512, 12)
        report = None
        if how:
            report = kvopt.quantize(model, calibration=windows[:8], progress=False, **how)
        return torch.tensor(perplexity(model, windows[8:]).perplexity).log().item(), report

    base, _ = loss()
    uniform, rounded = loss(recipe="int3_g64")
    searched, report = loss(budget_bits=3.5)
    assert report.bits <= rounded.bits == pytest.approx(3.5)
    assert searched - base < 0.75 * (uniform - base)
    assert 0.3 < report.estimated_loss / (searched - base) < 3
