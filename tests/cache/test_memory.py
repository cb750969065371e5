# SPDX-License-Identifier: Apache-2.0
"""Bytes: what a cache holds is what its formula and the allocator say; and decoding never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cache.tiny_models import TINY, left_padded, random_ids, run_forced, tiny_llama
from conftest import DEVICES
from kvopt.cache import Cache

MODELS = sorted(TINY)


@pytest.mark.parametrize(
    "spec", ["window_b32", "sink_b32_s4", "h2o_b32+ada", "tova_b32", "h2o_b32+int4_g8_r16", "snapkv_b32+fp8"]
)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_stay_constant_while_generating(name: str, spec: str) -> None:
    model = TINY[name]()
    ids, mask = left_padded([random_ids(1, 50), random_ids(1, 20)])
    cache, sizes = Cache(model, spec), set()
    for _ in range(40):
        run_forced(model, cache, ids, ids[:, :0], mask)
        sizes.add(cache.nbytes())
        ids, mask = random_ids(2, 1), torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    config = model.config
    heads = 2 * config.num_hidden_layers * getattr(config, "num_key_value_heads", config.num_attention_heads)
    plain, packed = 2 * 16 * 4, 0.0  # bytes of a token's key and value, head size 16, fp32
    slots = (32, 0)
    if "int4" in spec:  # codes, a scale and minimum per channel of 8 keys, and per 8 channels of a value
        slots, packed = (16, 16), 2 * 16 / 2 + 16 * 4 / 8 + 2 * 4
    elif "fp8" in spec:
        slots, packed = (0, 32), 2 * 16 + 2 * 2
    position, score = 4, 0 if spec.startswith(("window", "sink")) else 4
    segments = 4 * (4 + 2 + 1)  # where they lie, how much of them is filled, how much may be
    rows = 2 * 2 * 4
    expected = heads * (slots[0] * plain + slots[1] * packed + 32 * (position + score) + segments) + rows
    assert sizes == {expected}


@pytest.mark.parametrize(
    "spec",
    [
        "sink_mb1",
        "h2o_mb1+int4",
        "h2o_mb1+ada+int8_g16",
        "pyramidkv_mb1+fp8",
        "snapkv_mb1+ada",
        "window_mb1+int2",
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_budget_in_mebibytes_is_kept(name: str, spec: str) -> None:
    """Beside a group that does not fit, and what uneven heads might have needed, nothing is left over."""
    model = TINY[name]()
    cache = Cache(model, spec)
    run_forced(model, cache, random_ids(3, 1500), random_ids(3, 3))
    least = 0.6 if "ada" in spec and "int" in spec else 0.93
    assert least * 2**20 < cache.nbytes() <= 2**20


def requested_bytes() -> int:
    """Bytes in use as they were asked for: a block that is reused may be up to a MiB larger."""
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU's allocator keeps no count")
@pytest.mark.parametrize(
    "spec", ["full", "h2o_b512", "snapkv_b512+int4", "full+int2", "full+fp8", "h2o_b512+ada"]
)
def test_bytes_are_those_that_the_allocator_gave(spec: str) -> None:
    model, ids = tiny_llama().cuda(), random_ids(8, 2000).cuda()
    model(ids, past_key_values=Cache(model, spec))  # what libraries allocate once
    before = requested_bytes()
    cache = Cache(model, spec)
    model(ids, past_key_values=cache)
    for _ in range(3):
        model(ids[:, :1], past_key_values=cache)
    assert abs(requested_bytes() - before - cache.nbytes()) < 0.02 * cache.nbytes()


def test_full_cache_grows_in_blocks_not_per_token() -> None:
    model = tiny_llama()
    cache, addresses = Cache(model, "full"), set()
    run_forced(model, cache, random_ids(1, 10), random_ids(1, 0))
    for _ in range(300):
        run_forced(model, cache, random_ids(1, 1), random_ids(1, 0))
        addresses.add(cache.layers[0].store.plain_keys.data_ptr())
    assert len(addresses) <= 2
    assert torch.equal(cache.positions(1)[0, 0], torch.arange(310, dtype=torch.int32))


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """On CUDA the driver itself reports every wait."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoWaiting(TorchDispatchMode):
    """Raises where a CUDA tensor's value or shape would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "masked_select",
            "is_nonzero",
            "unique",
            "_to_copy",
        ):
            device = (kwargs or {}).get("device")
            assert name == "_to_copy" and device is None, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [
        *(
            "full",
            "window_b24",
            "sink_b24_s4",
            "sink_b24_s4_orig",
            "sink_p30",
            "h2o_b24",
            "h2o_p30+ada",
            "tova_b24",
        ),
        *(
            "snapkv_b40_grow",
            "random_b24",
            "pyramidkv_b40+ada",
            "full+int4_g8_r16",
            "h2o_b40+int2_g8_r16",
            "tova_b40+fp8",
        ),
        *(
            "full+minicache",
            "snapkv_b100_grow+ada+minicache+int4_g8_r16",
            "tova_b24+minicache",
            "h2o_b24+minicache+fp8",
        ),
    ],
)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_decoding_never_waits_for_the_device(name: str, spec: str, device: str) -> None:
    model = TINY[name]().to(device)
    ids, mask = left_padded([random_ids(1, 40), random_ids(1, 3)])
    cache = Cache(model, spec)
    model(ids.to(device), attention_mask=mask.to(device), past_key_values=cache)
    positions, token = (mask.sum(1) - 1)[:, None].to(device), random_ids(2, 1).to(device)
    for _ in range(40):
        positions = positions + 1
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        on_device = mask.to(device)
        with NoWaiting(), no_synchronisation(device):
            model(token, attention_mask=on_device, position_ids=positions, past_key_values=cache)
