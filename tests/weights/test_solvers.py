# SPDX-License-Identifier: Apache-2.0
"""Statistics, clipping, HQQ and AWQ; and what every solver promises. GPTQ itself: test_solvers_gptq.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvopt
from conftest import DEVICES, relative_error
from kvopt import ops
from kvopt.reference import Scheme
from kvopt.weights.formats import WeightFormat, quantize_to
from kvopt.weights.solvers import SOLVERS, Statistics, awq, clip, hqq, output_error
from kvopt.weights.solvers.solution import keep_better_rows
from kvopt.weights.solvers.statistics import full_precision_products
from weights.correlated import correlated_inputs

each_device = pytest.mark.parametrize("device", DEVICES)
INT4, INT3, INT2 = (WeightFormat(bits, 32, Scheme.ASYMMETRIC) for bits in (4, 3, 2))


# --- statistics -------------------------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_are_those_of_all_tokens_however_they_come(device, dtype):
    x = correlated_inputs(600, 72).to(device, dtype)
    exact = x.double()
    bound = 2e-5 if device == "cuda" and dtype != torch.float32 else 1e-6  # tensor cores add up more coarsely
    statistics = Statistics.empty(72, device)
    for part in x.split([1, 250, 0, 349]):
        statistics.add(part[None])
    for got in (statistics, Statistics.of(x.view(20, 30, 72))):
        assert got.tokens == 600
        assert relative_error(got.hessian, exact.T @ exact) < bound
        assert relative_error(got.absmean, exact.abs().mean(dim=0)) < 1e-6
        assert torch.equal(got.absmax, x.abs().amax(dim=0).float())
        assert relative_error(got.mean_square, exact.square().mean(dim=0)) < bound
        assert all(t.dtype == torch.float32 for t in (got.hessian, got.absmean, got.absmax))


def test_statistics_of_scaled_inputs():
    x, factor = correlated_inputs(300, 40), torch.rand(40) + 0.1
    got, expected = Statistics.of(x).scaled(factor), Statistics.of(x * factor)
    for name in ("hessian", "absmean", "absmax"):
        assert relative_error(getattr(got, name), getattr(expected, name)) < 1e-5


def test_unusable_inputs_are_refused():
    statistics = Statistics.empty(16)
    with pytest.raises(ValueError, match=r"expected a floating \(..., 16\), got \(4, 17\)"):
        statistics.add(torch.zeros(4, 17))
    with pytest.raises(ValueError, match="int64"):
        statistics.add(torch.zeros(4, 16, dtype=torch.int64))
    assert statistics.tokens == 0


def test_products_are_exact_inside_and_settings_come_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_precision_products():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@each_device
def test_output_error_is_that_of_the_outputs(device):
    x, error = correlated_inputs(200, 64).to(device), torch.randn(9, 64, device=device)
    expected = (x.double() @ error.double().T).square().sum(dim=0)
    assert relative_error(output_error(error, Statistics.of(x)), expected) < 1e-5


# --- what every solver promises ---------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("text", ["4bit_g128", "3bit_g32", "2bit_g32", "4bit_gc", "3bit_g64_sym", "8bit_g64"])
def test_outputs_are_nearer_than_by_rounding(device, method, text):
    if method == "hqq" and "sym" in text:
        pytest.skip("HQQ has no symmetric formats")
    n, k = 96, 256
    w = (torch.randn(n, k) / k**0.5).to(device)
    x = correlated_inputs(1500, k).to(device)
    statistics = Statistics.of(x)
    recipe = kvopt.Recipe.parse(f"{method}_{text}")
    nearest = output_error(quantize_to(w, recipe.format).dequantize() - w, statistics)
    solution = SOLVERS[method](w, recipe.format, statistics, seed=3)
    error = output_error(solution.dequantize(recipe.format) - w, statistics)
    # HQQ looks at the weight alone: its gain is small in long groups, and the inputs may not share it.
    most = 1.0 if recipe.format.bits == 8 else 0.85
    if method == "hqq":
        most = 1.0 if recipe.format.group_size == 32 else 1.1
    assert error.sum() < most * nearest.sum()
    if method in ("gptq", "clip"):
        assert (error <= nearest * (1 + 1e-4) + 1e-6 * nearest.mean()).all()  # row by row

    again = SOLVERS[method](w, recipe.format, statistics, seed=3)
    assert torch.equal(solution.codes, again.codes) and torch.equal(solution.scale, again.scale)
    weight = kvopt.quantize_weight(w, recipe, x)
    assert relative_error(weight.dequantize(), solution.dequantize(recipe.format)) < 1e-6
    y = kvopt.qlinear(x[:5], weight)
    assert relative_error(y, x[:5].double() @ weight.dequantize().double().T) < 2e-4


@pytest.mark.parametrize("method", ["gptq", "awq", "clip"])
def test_methods_that_need_inputs_say_so(method):
    w = torch.randn(8, 64)
    with pytest.raises(ValueError, match=f"{method}: needs calibration data"):
        kvopt.quantize_weight(w, f"{method}_4bit_g32")
    with pytest.raises(ValueError, match=f"{method}: needs calibration data"):
        SOLVERS[method](w, INT4, Statistics.empty(64))
    with pytest.raises(ValueError, match=f"{method}: the inputs have 48 columns, the weight has 64"):
        kvopt.quantize_weight(w, f"{method}_4bit_g32", torch.randn(10, 48))
    with pytest.raises(ValueError, match=f"{method}: knows integer formats only, got nf4"):
        SOLVERS[method](w, WeightFormat(4, 64, Scheme.NF4), Statistics.of(torch.randn(9, 64)))


def test_unusable_weights_are_refused():
    x = torch.randn(20, 64)
    for w, message in [
        (torch.zeros(64), "non-empty floating"),
        (torch.full((4, 64), torch.nan), "NaN or infinity"),
        (torch.full((4, 64), 1e9), "beyond fp16"),
    ]:
        with pytest.raises(ValueError, match=message):
            kvopt.quantize_weight(w, "gptq_4bit_g32", x)
    with pytest.raises(ValueError, match="group size 128 is larger than the row: K = 64"):
        kvopt.quantize_weight(torch.randn(4, 64), "clip_4bit_g128", x)


# --- clipping ---------------------------------------------------------------------------------------------------------


def test_rows_that_rounding_serves_better_are_rounded():
    w, statistics = torch.randn(12, 64), Statistics.of(correlated_inputs(100, 64))
    nearest = clip.Solution(*ops.wquant_rtn(w, 4, 32, Scheme.ASYMMETRIC))
    bad = nearest.codes.clone()
    bad[[2, 7]] = 15 - bad[[2, 7]]
    mixed = keep_better_rows(w, INT4, statistics, clip.Solution(bad, nearest.scale, nearest.zero))
    assert torch.equal(mixed.codes, nearest.codes)
    assert mixed.note == "2 of 12 rows rounded to nearest"


def test_inputs_that_matter_are_rounded_better():
    """One column in eight carries the signal: clipping spends the range on it."""
    w = torch.randn(64, 256)
    x = torch.randn(400, 256) * 0.01
    x[:, ::8] *= 100
    statistics = Statistics.of(x)
    format = WeightFormat(2, 64, Scheme.ASYMMETRIC)
    found = clip.solve(w, format, statistics).dequantize(format)
    nearest = quantize_to(w, format).dequantize()
    assert (found - w)[:, ::8].square().sum() < 0.5 * (nearest - w)[:, ::8].square().sum()


def test_clipping_survives_dead_inputs():
    x = torch.randn(50, 64)
    x[:, :32] = 0  # a whole group without importance
    w = torch.randn(8, 64)
    dense = clip.solve(w, INT3, Statistics.of(x)).dequantize(INT3)
    assert (dense - w)[:, :32].norm() < 0.5 * w[:, :32].norm()
    dense = clip.solve(w, INT3, Statistics.of(torch.zeros(5, 64))).dequantize(INT3)
    assert (dense - w).norm() < 0.5 * w.norm()


# --- HQQ (its equations: tests/ops/test_wsearch.py) -------------------------------------------------------------------


def test_hqq_needs_no_data_and_refuses_symmetry():
    w = torch.randn(16, 64)
    weight = kvopt.quantize_weight(w, "hqq_3bit_g32")
    assert relative_error(weight.dequantize(), w) < relative_error(quantize_to(w, INT3).dequantize(), w)
    zero = weight.codes()[2]
    assert (zero != zero.round()).any()  # packed as the fraction it is
    with pytest.raises(ValueError, match="hqq: needs an asymmetric format"):
        hqq.solve(w, WeightFormat(4, 32, Scheme.SYMMETRIC))


# --- AWQ --------------------------------------------------------------------------------------------------------------


def awq_candidates(weights: list[np.ndarray], group: int, absmean: np.ndarray) -> list[np.ndarray]:
    """The paper's scales and the "duo" ones, in fp64, such that 1 / s is a bfloat16, and the identity first."""
    shares = []
    for w in weights:
        parts = np.split(np.abs(w), range(group, w.shape[1], group), axis=1)
        shares.append(np.concatenate([p / (p.max(axis=1, keepdims=True) + 1e-6) for p in parts], axis=1))
    mean = np.concatenate(shares).mean(axis=0)
    found = [np.ones_like(absmean)]
    for i in range(20):
        r = i / 20
        for s in (absmean**r, absmean**r / (mean ** (1 - r) + 1e-4)):
            inverse = torch.from_numpy(np.sqrt(s.max() * s.min()) / s)
            found.append(1 / inverse.bfloat16().double().numpy())
    return found


def rounding_error(w: np.ndarray, s: np.ndarray, format: WeightFormat, h: np.ndarray) -> float:
    scaled = torch.from_numpy(w * s).float()
    error = quantize_to(scaled, format).dequantize().double().numpy() / s - w
    return float(np.einsum("nk,kj,nj->", error, h, error))


@pytest.mark.parametrize(
    "format", [INT3, WeightFormat(4, None, Scheme.SYMMETRIC), WeightFormat(4, 48, Scheme.ASYMMETRIC)], ids=str
)
def test_awq_finds_what_brute_force_finds(format):
    k = 144
    weights = [torch.randn(n, k) * torch.rand(k).add(0.1) for n in (20, 7)]
    statistics = Statistics.of(correlated_inputs(700, k))
    scale = awq.search(weights, format, statistics)
    h, plain = statistics.hessian.double().numpy(), [w.double().numpy() for w in weights]

    def total(s: np.ndarray) -> float:
        return sum(rounding_error(w, s, format, h) for w in plain)

    group = format.group_columns(k)
    listed = awq_candidates(plain, group, statistics.absmean.double().numpy())
    errors = [total(s) for s in listed]
    # It is one of the candidates but for a column whose bfloat16 powers in fp32 put on the other side of a tie: 0.8 %
    # in one column of 144, which may change its codes.
    assert total(scale.double().numpy()) <= 1.01 * min(errors)
    apart = min((np.abs(np.log(scale.double().numpy() / s)) for s in listed), key=np.max)
    assert apart.max() < 8e-3 and (apart > 1e-6).sum() <= 2
    assert min(errors) < errors[0]


def test_awq_takes_the_identity_where_nothing_is_better():
    """Columns on the grid of their groups: any scale can only lose."""
    codes = torch.randint(0, 16, (16, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    w = (codes - 8.0) * 0.125
    statistics = Statistics.of(correlated_inputs(200, 64))
    assert (awq.search([w], INT4, statistics) == 1).all()
    solution = awq.solve(w, INT4, statistics)
    assert solution.input_scale is None
    assert torch.equal(solution.dequantize(INT4), w)


def test_awq_scales_are_exact_in_every_type_and_ignore_dead_inputs():
    x = correlated_inputs(400, 96)
    x[:, 5] = 0
    w = torch.randn(30, 96)
    scale = awq.search([w], INT3, Statistics.of(x))
    assert scale[5] == 1 and (scale != 1).any()
    solution = awq.solve(w, INT3, Statistics.of(x))
    assert solution.input_scale is not None
    assert torch.equal(solution.input_scale.bfloat16().float(), solution.input_scale)
    assert torch.equal(solution.input_scale.half().float(), solution.input_scale)
    nearest = output_error(quantize_to(w, INT3).dequantize() - w, Statistics.of(x)).sum()
    assert output_error(solution.dequantize(INT3) - w, Statistics.of(x)).sum() < nearest  # 0.57 ± 0.05 of it
    with pytest.raises(ValueError, match="no weights"):
        awq.search([], INT3, Statistics.of(x))


# --- CPU and CUDA -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", SOLVERS)
def test_cuda_gives_what_the_cpu_gives(method):
    w, statistics = torch.randn(64, 256), Statistics.of(correlated_inputs(900, 256))
    for format in (INT4, INT2, WeightFormat(3, None, Scheme.ASYMMETRIC)):
        here = SOLVERS[method](w, format, statistics)
        there = SOLVERS[method](w.cuda(), format, statistics)
        if method == "clip":
            assert torch.equal(here.codes, there.codes.cpu()) and torch.equal(here.scale, there.scale.cpu())
        errors = [
            output_error(s.dequantize(format).cpu() - w, statistics).sum().item() for s in (here, there)
        ]
        assert errors[1] == pytest.approx(errors[0], rel=0.02)
