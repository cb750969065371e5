# SPDX-License-Identifier: Apache-2.0
"""GPTQ against the paper's column-by-column procedure, written a second time in NumPy without its Cholesky trick."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import DEVICES
from kvopt.reference import Scheme
from kvopt.weights.formats import WeightFormat, quantize_to
from kvopt.weights.solvers import Statistics, gptq, output_error
from kvopt.weights.solvers.solution import SEARCH_STEPS, SMALLEST_RANGE
from weights.correlated import correlated_inputs

each_device = pytest.mark.parametrize("device", DEVICES)
each_order = pytest.mark.parametrize("order", ["natural", "groups", "static"])


def stored(scale: np.ndarray) -> np.ndarray:
    half = np.float16(np.float32(scale)).astype(np.float64)
    return np.clip(half, 2.0**-24, 65504.0)


def codes_of(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int) -> np.ndarray:
    return np.clip(np.rint(w / scale) + zero, 0, top)


def ranges(
    w: np.ndarray, importance: np.ndarray, bits: int, symmetric: bool, search: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point (N,) of one group (N, columns): rounding to nearest's, or the best of the search's."""
    top, middle = 2**bits - 1, 2.0 ** (bits - 1)
    low, high = np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)
    magnitude = np.maximum(high, -low)
    if not search:
        if symmetric:
            scale = magnitude / 127 if bits == 8 else 2 * magnitude / top
            return stored(scale), np.full_like(low, middle)
        scale = stored((high - low) / top)
        return scale, np.clip(np.rint(-low / scale), 0, top)
    best = np.full_like(low, np.inf)
    chosen = np.zeros((2, len(low)))
    for i in range(SEARCH_STEPS + 1):
        p = 1 - (1 - SMALLEST_RANGE) * i / SEARCH_STEPS
        if symmetric:
            full = [2 * magnitude / top, 2 * magnitude / (top - 1)]
            if bits == 8:
                full = [magnitude / 127, full[0]]
            listed = [(stored(p * scale), np.full_like(low, middle)) for scale in full]
        else:
            scale = stored(p * ((high - low) / top))
            below = np.floor(-low * p / scale)
            listed = [(scale, np.clip(below + shift, 0, top)) for shift in (-1, 0, 1, 2)]
        for scale, zero in listed:
            s, z = scale[:, None], zero[:, None]
            error = (importance * (s * (codes_of(w, s, z, top) - z) - w) ** 2).sum(axis=1)
            better = error < best
            best = np.where(better, error, best)
            chosen = np.where(better, np.stack([scale, zero]), chosen)
    return chosen[0], chosen[1]


def processing_order(diagonal: np.ndarray, group: int, order: str) -> np.ndarray:
    k = len(diagonal)
    if order == "natural":
        return np.arange(k)
    if order == "static":
        return np.array(sorted(range(k), key=lambda c: -diagonal[c]))
    members = [list(range(b, min(b + group, k))) for b in range(0, k, group)]
    short = [members.pop()] if len(members[-1]) < group else []
    members.sort(key=lambda m: -np.mean(diagonal[m]))
    return np.array([c for m in members + short for c in sorted(m, key=lambda c: -diagonal[c])])


def gptq_in_numpy(
    w: np.ndarray, h: np.ndarray, bits: int, group: int, symmetric: bool, order: str, search: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, K), and each row's distance to the nearest tie, in codes.

    The inverse of H over the columns that are left is kept by Gaussian elimination (the paper, equation 3).
    """
    w, (n, k) = w.copy(), w.shape
    top = 2**bits - 1
    columns = processing_order(np.diag(h), group, order)
    damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(k)
    inverse = np.linalg.inv(damped[np.ix_(columns, columns)])
    left = inverse.copy()
    importance = np.empty(k)  # by natural column: 1 / [H^-1]_ii when column i's turn comes
    for i, column in enumerate(columns):
        importance[column] = 1 / left[i, i]
        left -= np.outer(left[:, i], left[i]) / left[i, i]
    groups = -(-k // group)
    members = [np.arange(g * group, min((g + 1) * group, k)) for g in range(groups)]
    found: list[tuple[np.ndarray, np.ndarray] | None] = [None] * groups
    if order == "static":
        found = [ranges(w[:, m], importance[m], bits, symmetric, search) for m in members]
    codes, tie = np.empty((n, k)), np.full(n, np.inf)
    for i, column in enumerate(columns):
        g = column // group
        if found[g] is None:
            own = columns[i : i + len(members[g])]
            found[g] = ranges(w[:, own], importance[own], bits, symmetric, search)
        scale, zero = found[g]
        position = w[:, column] / scale
        tie = np.minimum(tie, np.abs(position - np.floor(position) - 0.5))
        codes[:, column] = codes_of(w[:, column], scale, zero, top)
        error = (w[:, column] - scale * (codes[:, column] - zero)) / inverse[i, i]
        w[:, columns[i:]] -= np.outer(error, inverse[i, i:])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes, tie


@each_order
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("scheme", [Scheme.ASYMMETRIC, Scheme.SYMMETRIC], ids=["asym", "sym"])
@pytest.mark.parametrize(
    ("bits", "group"), [*((b, g) for b in (2, 3, 4) for g in (32, 128, None)), (3, 48), (3, 144), (8, 64)]
)
def test_codes_are_those_of_the_paper(bits, group, scheme, search, order):
    n, k = 10, 176  # a short last group for all of them, and a short last block
    w = torch.randn(n, k, dtype=torch.float64)
    statistics = Statistics.of(correlated_inputs(500, k))
    format = WeightFormat(bits, group, scheme)
    arguments = (bits, group or k, scheme == Scheme.SYMMETRIC, order, search)
    expected, tie = gptq_in_numpy(w.numpy(), statistics.hessian.double().numpy(), *arguments)
    solution = gptq.solve(w, format, statistics, order=order, search=search, guard=False)
    clear = torch.from_numpy(tie > 1e-8)
    assert clear.sum() >= n - 1
    assert torch.equal(solution.codes[clear], torch.from_numpy(expected).to(torch.uint8)[clear])
    assert solution.damping == gptq.DAMPING and not solution.note

    single = gptq.solve(w.float(), format, statistics, order=order, search=search, guard=False)
    dense = [s.dequantize(format) - w.float() for s in (solution, single)]
    errors = [output_error(difference, statistics).sum().item() for difference in dense]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@each_device
@each_order
def test_error_in_fp32_is_that_of_fp64(device, order):
    n, k = 200, 384
    w = (torch.randn(n, k) / k**0.5).to(device)
    statistics = Statistics.of(correlated_inputs(2000, k).to(device))
    for bits, group in [(4, 128), (3, 32), (2, None)]:
        format = WeightFormat(bits, group, Scheme.ASYMMETRIC)
        errors = [
            output_error(gptq.solve(v, format, statistics, order=order).dequantize(format) - w, statistics)
            .sum()
            .item()
            for v in (w, w.double())
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


@each_order
@pytest.mark.parametrize("scheme", [Scheme.ASYMMETRIC, Scheme.SYMMETRIC])
def test_columns_without_input_become_zero(order, scheme):
    x = correlated_inputs(300, 96)
    dead = torch.randperm(96)[:7]
    x[:, dead] = 0
    w = torch.randn(10, 96)
    format = WeightFormat(3, 32, scheme)
    solution = gptq.solve(w, format, Statistics.of(x), order=order, guard=False)
    dense = solution.dequantize(format)
    assert (dense[:, dead] == 0).all()
    assert solution.note == "7 dead input columns set to 0"
    alive = torch.ones(96, dtype=torch.bool).index_fill(0, dead, False)
    assert (dense[:, alive] != 0).any(dim=0).all()


def test_no_input_at_all_is_survived():
    w = torch.randn(6, 64)
    format = WeightFormat(4, 32, Scheme.ASYMMETRIC)
    solution = gptq.solve(w, format, Statistics.of(torch.zeros(10, 64)))
    assert torch.isfinite(solution.dequantize(format)).all()
    assert "64 dead" in solution.note


def test_fewer_tokens_than_columns():
    """H is singular; the usual damping is enough, and what the tokens see is matched far better than by rounding."""
    x = torch.randn(40, 256)
    w = torch.randn(32, 256)
    statistics = Statistics.of(x)
    format = WeightFormat(3, 64, Scheme.ASYMMETRIC)
    solution = gptq.solve(w, format, statistics)
    assert solution.damping == gptq.DAMPING
    nearest = output_error(quantize_to(w, format).dequantize() - w, statistics).sum()
    assert output_error(solution.dequantize(format) - w, statistics).sum() < 0.5 * nearest


def test_damping_is_raised_until_the_factorisation_succeeds_and_reported():
    k = 48
    hessian = torch.eye(k)
    hessian[0, 1] = hessian[1, 0] = 1.05  # eigenvalue -0.05: 0.01 is not enough, 0.1 is
    statistics = Statistics(100, hessian, torch.ones(k), torch.ones(k))
    w = torch.randn(5, k)
    format = WeightFormat(4, 16, Scheme.ASYMMETRIC)
    solution = gptq.solve(w, format, statistics)
    assert solution.damping == pytest.approx(0.1)
    assert "damping raised from 0.01 to 0.1" in solution.note
    hessian[0, 1] = hessian[1, 0] = 1e4
    with pytest.raises(ValueError, match="can't be factorised with damping up to 100"):
        gptq.solve(w, format, statistics)
    hessian[0, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        gptq.solve(w, format, statistics)


@pytest.mark.parametrize("k", [5, 700, 1300])
def test_factor_is_that_of_the_inverse(k):
    x = correlated_inputs(2 * k, k)
    statistics = Statistics.of(x)
    columns = torch.randperm(k)
    factor = gptq.inverse_factor(statistics.hessian, columns, 0.01)
    h = statistics.hessian.double()[columns][:, columns]
    h += 0.01 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    assert torch.equal(factor.u, factor.u.triu())
    assert (factor.u @ h @ factor.u.T - torch.eye(k)).abs().max() < 1e-9


@each_device
@pytest.mark.parametrize("size", [1, 7, 64, 150, 2048])
def test_factorising_in_blocks_gives_the_matrix_back(device, size):
    x = torch.randn(300, 150, dtype=torch.float64, device=device)
    h = x.T @ x
    r = h.clone()
    assert gptq.factorize_upper(r, size)
    assert torch.equal(r, r.triu()) and (r.diagonal() > 0).all()
    assert torch.allclose(r @ r.T, h, rtol=0, atol=1e-11 * h.norm().item())
    h[40, 40] = -1.0
    assert not gptq.factorize_upper(h, size)


@pytest.mark.parametrize("group", [16, 48, 128, 144, 1024, 2000])
@pytest.mark.parametrize("static", [False, True])
def test_blocks_cover_all_columns_in_order(group, static):
    k = 2000
    listed = gptq.blocks(k, group, static)
    assert [c for begin, end in listed for c in range(begin, end)] == list(range(k))
    assert all(0 < end - begin <= gptq.BLOCK for begin, end in listed)
    if not static:
        for begin, end in listed:
            assert begin // group == (end - 1) // group or (
                begin % group == 0 and (end % group == 0 or end == k)
            )


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="natural, groups or static, got 'random'"):
        gptq.column_order(torch.ones(4), 2, "random")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_order
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (3, 32), (2, None)])
def test_cuda_gives_the_codes_of_the_cpu(order, bits, group):
    w = torch.randn(40, 320, dtype=torch.float64)
    statistics = Statistics.of(correlated_inputs(800, 320))
    format = WeightFormat(bits, group, Scheme.ASYMMETRIC)
    here, there = (
        gptq.solve(w.to(device), format, statistics, order=order).codes.cpu() for device in ("cpu", "cuda")
    )
    assert (here == there).all(dim=1).float().mean() > 0.9  # a row may meet a tie


def test_the_result_does_not_depend_on_how_the_weight_lies_in_memory():
    w = torch.randn(96, 24)
    statistics = Statistics.of(correlated_inputs(200, 96))
    format = WeightFormat(4, 32, Scheme.ASYMMETRIC)
    for order in ("groups", "static"):
        codes = [gptq.solve(v, format, statistics, order=order).codes for v in (w.T, w.T.contiguous())]
        assert torch.equal(*codes)
