# SPDX-License-Identifier: Apache-2.0
"""Products of one weight shape by all contenders: built, checked, timed interleaved, one row each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import timing
from journal import Journal
from peers import Peer, Product, Unavailable

# (K, N) of a Llama-3.1-8B and a Llama-3.2-1B; gate and up are one weight.
SHAPES = {
    "8b_gate_up": (4096, 28672),
    "8b_down": (14336, 4096),
    "8b_o": (4096, 4096),
    "1b_gate_up": (2048, 16384),
    "1b_down": (8192, 2048),
    "1b_o": (2048, 2048),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = (
    *("shape", "m", "contender", "median_us", "p10_us", "p90_us", "gb_per_s", "of_read_rate", "gops"),
    *("speedup", "relative_error"),
)


def shape_rows(
    case: str, shape: str, peers: list[Peer], bases: list[str], args: Any, journal: Journal
) -> Iterator[dict[str, Any]]:
    """Rows of one shape, every M of ``args.m``. ``speedup`` is over the faster of ``bases`` (of those that ran)."""
    k, n = SHAPES[shape]
    dtype = DTYPES[args.dtype]
    weight = (torch.randn(n, k, device=args.device) / k**0.5).to(dtype)
    built: dict[str, list[Product]] = {}
    for peer in peers:
        try:
            built[peer.name] = _copies(peer, weight, args.copies_mb)
            journal.enter(peer, args.device)
        except Unavailable as reason:
            journal.leave_out(peer.name, reason)
        except Exception as error:
            journal.fail(peer.name, error, shape)
    for m in args.m:
        x = torch.randn(m, k, device=args.device).to(dtype)
        exact = x.float() @ weight.float().T
        calls: dict[str, list[timing.Call]] = {}
        threads = {name: products[0].thread for name, products in built.items()}
        errors: dict[str, float] = {}
        for peer in peers:
            if peer.name not in built:
                continue
            try:
                calls[peer.name], errors[peer.name] = _enter(peer, built[peer.name], x, exact, shape)
            except Unavailable as reason:
                journal.leave_out(peer.name, reason, f"{shape}, M = {m}")
            except Exception as error:
                journal.fail(peer.name, error, f"{shape}, M = {m}")
        times, failures = timing.interleaved(calls, args.device, args.rounds, args.calls, threads)
        for name, reason in failures.items():
            journal.leave_out(name, reason, f"{shape}, M = {m}")
        base = min((times[name].median_us for name in bases if name in times), default=None)
        for name, t in times.items():
            nbytes = built[name][0].nbytes
            yield {
                "case": case,
                "shape": shape,
                "m": m,
                "n": n,
                "k": k,
                "dtype": args.dtype,
                "contender": name,
                "relative_error": errors[name],
                "median_us": t.median_us,
                "p10_us": t.p10_us,
                "p90_us": t.p90_us,
                "gb_per_s": nbytes / t.median_us / 1e3,
                "of_read_rate": t.share_of_reading(nbytes),
                "read_gb_per_s": sorted(t.reads)[len(t.reads) // 2] if t.reads else None,
                "gops": 2 * m * n * k / t.median_us / 1e3,
                "speedup": None if base is None else base / t.median_us,
                "weight_bytes": nbytes,
                "copies": len(built[name]),
                "calls": t.calls,
            }


def _copies(peer: Peer, weight: Tensor, megabytes: int) -> list[Product]:
    copy = peer.prepare(weight)
    first = copy()
    count = max(3, min(128, -(-megabytes * 2**20 // first.nbytes)))
    return [first] + [copy() for _ in range(count - 1)]


def _enter(
    peer: Peer, products: list[Product], x: Tensor, exact: Tensor, shape: str
) -> tuple[list[timing.Call], float]:
    """A call for each copy, after the first one's result was near the dense product."""
    given = x if peer.takes is None else x.to(peer.takes)
    calls = [partial(product.run, product.enter(given)) for product in products]
    thread = products[0].thread
    result = calls[0]() if thread is None else thread.submit(calls[0]).result()
    y = products[0].leave(result).float().to(exact.device)
    if y.shape != exact.shape:
        raise RuntimeError(f"{peer.name} at {shape}: the result is {tuple(y.shape)}")
    error = ((y - exact).norm() / exact.norm()).item()
    if not error <= peer.error:  # NaN does not pass
        raise RuntimeError(f"{peer.name} at {shape}, M = {len(x)}: relative error {error:.3g} > {peer.error}")
    return calls, error
