# SPDX-License-Identifier: Apache-2.0
"""Scales that are themselves stored in 8 bits: compiled against reference, and how far they move."""

from __future__ import annotations

import pytest
import torch

from conftest import DEVICES
from kvopt import ops, reference
from kvopt.reference import Scheme

each_device = pytest.mark.parametrize("device", DEVICES)
each_scheme = pytest.mark.parametrize("scheme", [Scheme.NF4, Scheme.FP4])


def random_absmax(n: int, groups: int, device: str) -> tuple[torch.Tensor, ...]:
    absmax = torch.randn(n, groups).abs() + 0.5
    absmax[0] = 0  # rows of zeros lie below the mean
    return tuple(t.to(device) for t in reference.double_quantize(absmax))


@each_device
@each_scheme
@pytest.mark.parametrize(
    ("n", "k", "group"), [(33, 704, 64), (7, 100, 64), (64, 256, 32), (1, 64, 64), (129, 300, 128)]
)
def test_expanded_scales_equal_reference_bit_for_bit(device, scheme, n, k, group):
    absmax = random_absmax(n, reference.group_count(k, group), device)
    got = ops.wquant_expand_scales(*absmax, n, k, 4, group, scheme)
    expected = reference.wquant_expand_scales(
        *(t.cpu() for t in absmax), n, k, 4, group, scheme, "tile32" if device == "cpu" else "mma16"
    )
    assert torch.equal(got.cpu(), expected)


@each_device
def test_every_code_of_the_map(device):
    """256 groups in one row, one of each code, scale 1 and offset 2: the map itself, as the compiled code knows it."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    one, two = torch.ones(1, device=device), torch.tensor(2.0, device=device)
    k = 256 * 32
    meta = ops.wquant_expand_scales(codes, one, two, 1, k, 4, 32, Scheme.NF4)
    plain = ops.wquant_unpack(
        torch.zeros(
            reference.packed_bytes(1, k, 4, Scheme.NF4, reference.layout_of(codes.device)),
            dtype=torch.uint8,
            device=device,
        ),
        *(meta, 1, k, 4, 32, Scheme.NF4),
    )
    assert torch.equal(plain[1][0].cpu(), (reference.dynamic_map() + 2).half())


def test_map_is_the_published_one():
    book = reference.dynamic_map()
    assert book.shape == (256,) and (book.diff() > 0).all()
    assert torch.equal(-book[:127].flip(0), book[128:255])
    assert (book[127], book[255]) == (0, 1)
    assert book[128] == pytest.approx(0.55e-6) and book[254] == pytest.approx(1 - 0.9 / 128)


def test_double_quantising_picks_the_nearest_value():
    absmax = torch.rand(40, 33) * 3
    codes, scale, offset = reference.double_quantize(absmax)
    assert (codes.shape, scale.shape, offset.shape) == ((1320,), (6,), ())
    per_value = scale.repeat_interleave(256)[:1320]
    scaled = (absmax.flatten().double() - offset) / per_value
    distance = scaled[:, None] - reference.dynamic_map().double()
    nearest = distance.abs().amin(dim=1)
    chosen = distance.gather(1, codes.long()[:, None])[:, 0].abs()
    # A difference, a reciprocal, a product and a middle in fp32: 4 * 2^-24, on either side of a middle.
    assert (chosen <= nearest + 2.0**-21 * scaled.abs()).all()


@each_device
def test_bad_arguments_are_named(device):
    n, k = 8, 128
    codes, scale, offset = random_absmax(n, 2, device)
    call = torch.ops.kvopt.wquant_expand_scales
    for arguments, message in [
        ((codes[:-1], scale, offset, n, k, 4, 64, 2), r"absmax_codes must have shape \(16\), got \(15\)"),
        ((codes, scale.half(), offset, n, k, 4, 64, 2), "absmax_scale must be float32"),
        ((codes, scale.repeat(2), offset, n, k, 4, 64, 2), r"absmax_scale must have shape \(1\), got \(2\)"),
        ((codes, scale, offset.view(1), n, k, 4, 64, 2), r"offset must have shape \(\), got \(1\)"),
        ((codes, scale, offset, n, k, 4, 64, 1), r"scheme must be 2 \(nf4\) or 3 \(fp4\), got 1"),
    ]:
        with pytest.raises(RuntimeError, match=f"wquant_expand_scales: {message}"):
            call(*arguments)


@each_device
@each_scheme
def test_opcheck(device, scheme):
    absmax = random_absmax(20, 3, device)
    torch.library.opcheck(torch.ops.kvopt.wquant_expand_scales, (*absmax, 20, 96, 4, 32, int(scheme)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_replay_equals_eager():
    absmax = random_absmax(40, 3, "cuda")
    expected = ops.wquant_expand_scales(*absmax, 40, 192, 4, 64, Scheme.NF4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        meta = ops.wquant_expand_scales(*absmax, 40, 192, 4, 64, Scheme.NF4)
    meta.zero_()
    graph.replay()
    assert torch.equal(meta, expected)
