# SPDX-License-Identifier: Apache-2.0
"""A block of GPTQ: compiled against reference, and what it refuses. Whole solutions: tests/weights/test_solvers.py."""

from __future__ import annotations

import pytest
import torch

from conftest import DEVICES, relative_error
from kvopt import ops, reference_solvers
from kvopt.reference import Scheme
from ops.formats import random_weight

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
each_format = pytest.mark.parametrize(
    ("bits", "scheme"),
    [(b, s) for b in (2, 3, 4, 8) for s in (Scheme.ASYMMETRIC, Scheme.SYMMETRIC)],
    ids=lambda value: str(int(value)),
)


def random_factor(k: int, dtype: torch.dtype) -> torch.Tensor:
    """Upper triangular, neighbours passing on some of their error."""
    factor = torch.randn(k, k, dtype=dtype).triu(1) * 0.1
    return factor + torch.diag(torch.rand(k, dtype=dtype) + 0.5)


@each_device
@each_dtype
@each_format
@pytest.mark.parametrize(
    ("k", "begin", "end", "group"),
    [(256, 128, 256, 32), (256, 0, 128, 256), (200, 96, 192, 48), (200, 192, 200, 48), (77, 0, 77, 77)],
)
@pytest.mark.parametrize("steps", [0, 6])
def test_block_equals_reference(device, dtype, bits, scheme, k, begin, end, group, steps):
    n = 9
    weight, factor = random_weight(n, k, device).to(dtype), random_factor(k, dtype).to(device)
    importance = factor.diagonal().square().reciprocal() if steps else None
    options = (begin, end, bits, group, scheme, steps, 0.5)
    got = ops.gptq_block(weight, factor, importance, None, None, *options)
    on_cpu = None if importance is None else importance.cpu()
    expected = reference_solvers.gptq_block(weight.cpu(), factor.cpu(), on_cpu, None, None, *options)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b)


@each_device
@each_dtype
@each_format
def test_block_with_given_scales_equals_reference(device, dtype, bits, scheme):
    n, k, begin, end = 11, 192, 64, 160
    weight, factor = random_weight(n, k, device).to(dtype), random_factor(k, dtype).to(device)
    scale = (torch.rand(n, end - begin, device=device) + 0.01).half()
    middle = 2 ** (bits - 1)
    zero = torch.full_like(scale, middle)
    if scheme == Scheme.ASYMMETRIC:
        zero = (torch.rand(n, end - begin, device=device) * 2**bits).half()  # fractions too
    options = (begin, end, bits, 64, scheme, 0, 1.0)
    got = ops.gptq_block(weight, factor, None, scale, zero, *options)
    expected = reference_solvers.gptq_block(
        weight.cpu(), factor.cpu(), None, scale.cpu(), zero.cpu(), *options
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b)
    assert got[2].shape == got[3].shape == (n, 0)


@each_device
def test_errors_are_those_of_the_working_copy(device):
    """Without anything passed on, a block is rounding to nearest and its errors are the differences."""
    weight = random_weight(20, 128, device)
    codes, errors, scale, zero = ops.gptq_block(
        weight, torch.eye(128, device=device), None, None, None, 0, 128, 4, 32, Scheme.ASYMMETRIC, 0, 1.0
    )
    nearest = ops.wquant_rtn(weight, 4, 32, Scheme.ASYMMETRIC)
    assert all(torch.equal(a, b) for a, b in zip((codes, scale, zero), nearest, strict=True))
    back = scale.float().repeat_interleave(32, 1) * (codes.float() - zero.float().repeat_interleave(32, 1))
    assert relative_error(errors, weight - back) < 1e-6


@each_device
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 256, dtype=torch.bfloat16)}, "weight must be float32 or float64"),
        ({"factor": torch.zeros(256, 255)}, r"factor must have shape \(256, 256\), got \(256, 255\)"),
        ({"factor": torch.zeros(256, 256, dtype=torch.float64)}, "factor must have the dtype"),
        ({"importance": torch.zeros(128)}, "importance must have shape"),
        ({"begin": 0, "end": 129}, "begin and end must be a block of at most 128 of the 256 columns"),
        ({"begin": 64, "end": 64}, "begin and end must be a block"),
        ({"begin": 200, "end": 257}, "begin and end must be a block"),
        ({"begin": 0, "end": 48}, "whole groups of 32 columns"),
        ({"scale": torch.zeros(4, 64, dtype=torch.float16)}, "scale and zero must both be given"),
        (
            {"scale": torch.zeros(4, 2, dtype=torch.float16), "zero": torch.zeros(4, 2, dtype=torch.float16)},
            r"scale must have shape \(4, 64\), got \(4, 2\)",
        ),
        ({"scale": torch.zeros(4, 64), "zero": torch.zeros(4, 64)}, "scale must be float16"),
        ({"scheme": 2}, "scheme must be an integer one"),
    ],
)
def test_bad_arguments_are_named(device, change, message):
    given = {
        "weight": torch.zeros(4, 256),
        "factor": torch.zeros(256, 256),
        **dict.fromkeys(("importance", "scale", "zero")),
        **{"begin": 64, "end": 128, "bits": 4, "group": 32, "scheme": 0, "steps": 0, "smallest": 1.0},
        **change,
    }
    arguments = [v.to(device) if isinstance(v, torch.Tensor) else v for v in given.values()]
    with pytest.raises(RuntimeError, match=f"gptq_block: {message}|gptq_block: .*{message}"):
        torch.ops.kvopt.gptq_block(*arguments)


@each_device
@each_dtype
def test_opcheck(device, dtype):
    weight, factor = random_weight(5, 160, device).to(dtype), random_factor(160, dtype).to(device)
    importance = torch.rand(160, device=device, dtype=dtype)
    scale = torch.rand(5, 64, device=device).half()
    check = torch.library.opcheck
    check(torch.ops.kvopt.gptq_block, (weight, factor, importance, None, None, 32, 96, 3, 32, 0, 4, 0.5))
    check(torch.ops.kvopt.gptq_block, (weight, factor, None, None, None, 128, 160, 3, 160, 1, 0, 1.0))
    check(torch.ops.kvopt.gptq_block, (weight, factor, None, scale, scale, 32, 96, 3, 160, 0, 0, 1.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_replay_equals_eager():
    weight, factor = random_weight(40, 256, "cuda"), random_factor(256, torch.float32).cuda()

    def run() -> tuple[torch.Tensor, ...]:
        block = ops.gptq_block(weight, factor, None, None, None, 128, 256, 4, 64, 0, 8, 0.5)
        hqq = ops.wsearch_hqq(weight, 4, 64, 0, 20, 10.0, 1.01, 0.7)
        return (*block, *ops.wsearch(weight, None, 4, 64, 1, 8, 0.5), *hqq)

    expected = [t.clone() for t in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
