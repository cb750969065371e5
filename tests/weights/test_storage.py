# SPDX-License-Identifier: Apache-2.0
"""Codes as a checkpoint stores them."""

from __future__ import annotations

import random

import pytest
import torch

from kvopt.weights.storage import from_stream, row_bytes, to_stream


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stream_round_trips_at_every_width(bits):
    for k in (*range(1, 20), random.randrange(20, 400)):
        codes = torch.randint(0, 2**bits, (5, k), dtype=torch.uint8)
        stream = to_stream(codes, bits)
        assert stream.shape == (5, row_bytes(k, bits)) and stream.is_contiguous()
        assert torch.equal(from_stream(stream, k, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_column_c_starts_at_bit_c_times_bits(bits):
    codes = torch.randint(0, 2**bits, (1, 21), dtype=torch.uint8)
    number = int.from_bytes(bytes(to_stream(codes, bits)[0].tolist()), "little")
    assert number == sum(code << bits * column for column, code in enumerate(codes[0].tolist()))


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="expected uint8 rows of 3 bytes for 8 columns of 3 bits"):
        from_stream(torch.zeros(2, 4, dtype=torch.uint8), 8, 3)
    with pytest.raises(ValueError, match="uint8"):
        from_stream(torch.zeros(2, 3), 8, 3)
