# SPDX-License-Identifier: Apache-2.0
"""Hidden states wait on the host: the device's memory does not grow with the windows, and no result changes."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pytest
import torch

import kvopt
from conftest import DEVICES
from families import build
from kvopt.models.adapters import find_layers
from kvopt.weights import hidden, streaming
from kvopt.weights.calibration import prepare
from kvopt.weights.hidden import HiddenStates
from kvopt.weights.solvers.gptq import _reordered
from kvopt.weights.streaming import Stream
from weights.live_bytes import LiveBytes

LENGTH = 16  # tokens in a window


@pytest.fixture
def one_window_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BATCH_TOKENS", LENGTH)


def everywhere(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """The CPU as a device that hidden states leave, or CUDA as one where they stay."""
    monkeypatch.setattr(hidden, "waits_on_host", lambda device: waits)


def peak_of(windows: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The most bytes beside the hidden states' own buffers on the way through two layers, and how many of those."""
    own: set[int] = set()
    make = hidden._host_buffer

    def noting(like: torch.Tensor, pinned: bool) -> torch.Tensor:
        buffer = make(like, pinned)
        own.add(buffer.untyped_storage().data_ptr())
        return buffer

    model = build("llama")
    tokens = torch.randint(3, 96, (windows, LENGTH))
    stream = Stream(model, *find_layers(model), prepare(tokens, None, model, seed=0), None)
    with monkeypatch.context() as patch:
        patch.setattr(hidden, "_host_buffer", noting)
        with LiveBytes(own) as live:
            stream.embed()
            for index in range(2):
                stage = stream.layer(index)
                stage.collect(stage.module.mlp.down_proj, stream.seen)
                stream.advance(index)
    return live.peak, len(own)


@pytest.mark.usefixtures("one_window_a_batch")
def test_memory_on_the_device_does_not_grow_with_the_windows(monkeypatch):
    growth = {}
    for waits in (True, False):
        everywhere(monkeypatch, waits)
        (few, _), (many, buffers) = (peak_of(windows, monkeypatch) for windows in (4, 14))
        growth[waits] = many - few
        assert buffers == (14 if waits else 0)  # written again in place, not made anew for the second layer
    assert growth[True] <= 10 * LENGTH * 8  # the token numbers
    assert growth[False] >= 10 * LENGTH * 32 * 4  # all states


@pytest.mark.usefixtures("one_window_a_batch")
@pytest.mark.parametrize(
    ("device", "recipe"),  # gradients on CUDA have no order of their sums
    [
        *((device, recipe) for device in DEVICES for recipe in ("gptq_3bit_g16", "awq_4bit_g16")),
        ("cpu", "budget"),
    ],
)
def test_where_they_wait_changes_no_bit(device, recipe, monkeypatch):
    tokens = torch.randint(3, 96, (11, LENGTH))
    original = build("llama").state_dict()
    results: list[tuple[dict[str, torch.Tensor], list[dict[str, Any]]]] = []
    for waits in (True, False):
        everywhere(monkeypatch, waits)
        model = build("llama")
        model.load_state_dict(original)
        settings = {"budget_bits": 4.0} if recipe == "budget" else {"recipe": recipe}
        report = kvopt.quantize(
            model, calibration=tokens, progress=False, **settings, device=None if device == "cpu" else device
        )
        rows = [asdict(row) | {"seconds": 0} for row in report.layers]
        results.append((model.state_dict(), rows))
    assert results[0][1] == results[1][1]
    assert results[0][0].keys() == results[1][0].keys()
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("waits", [True, False])
def test_any_order_of_calls_gives_what_was_put(device, waits, monkeypatch):
    """Against a plain list; on CUDA this is a test of the copies' order, with products between that take time."""
    everywhere(monkeypatch, waits)
    place = torch.empty(0, device=device).device
    states, expected, kept = HiddenStates(), [], []
    shape = (1, 257, 512) if device == "cuda" else (1, 3, 8)
    work = torch.randn(2048, 2048, device=device) if device == "cuda" else None
    for _ in range(7):
        first = torch.randn(shape)
        states.add(first.clone() if random.random() < 0.5 else first.to(place), place)
        expected.append(first)
    for step in range(100):
        batch, following = random.randrange(7), random.choice([None, *range(7)])
        if work is not None:
            work = (work @ work).clamp(-1, 1)
        if random.random() < 0.5:
            got = states.take(batch, place, following)
            assert got.device == place and torch.equal(got.cpu(), expected[batch]), step
        elif random.random() < 0.7:
            if random.random() < 0.1:
                shape = (1, shape[1] + 1, 8)
            new = torch.randn(shape, dtype=random.choice([torch.float32, torch.bfloat16]))
            states.put(batch, new.to(place) * 1)
            expected[batch] = new
        else:
            kept.append((states.copy(batch), expected[batch]))
    assert len(states) == 7
    for got, then in kept:  # whatever was put since
        assert not got.is_cuda and got.dtype == then.dtype and torch.equal(got, then)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_memory_on_cuda_does_not_grow_with_the_windows(where):
    """Both with the model on the host, layer by layer on the device, and all on the device."""
    state = 2048 * 32 * 4  # of one batch, bytes
    peaks = []
    for windows in (8, 8, 100):  # in batches; the first run makes what stays: workspaces
        model = build("llama").to(where)
        tokens = torch.randint(3, 96, (32 * windows, 64))
        stream = Stream(model, *find_layers(model), prepare(tokens, None, model, seed=0), "cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stream.embed()
        for index in range(2):
            stage = stream.layer(index)
            stage.collect(stage.module.mlp.down_proj, stream.seen)
            stream.advance(index)
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] - peaks[1] <= 16 * state  # what the host is ahead by; all of them would be 92


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_reordered_second_moments_take_no_third_matrix(rows):
    k = random.choice([1, 5, 63, 130])
    hessian, columns = torch.randn(k, k), torch.randperm(k)
    with LiveBytes() as live:
        got = _reordered(hessian, columns, rows)
    assert got.dtype == torch.float64 and torch.equal(got, hessian[columns][:, columns].double())
    assert live.peak <= 8 * k * k + 2 * 4 * k * min(rows, k) + 8 * k  # and the order
