# SPDX-License-Identifier: Apache-2.0
"""Marlin, IST-DASLab's W4A16 kernel (package ``marlin``, built from its repository): symmetric groups of 128, fp16.

On Hopper its published code stops with an illegal instruction: its L2 eviction hints must be taken out of the one
function that has them (``cp_async4_stream``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from peers.base import Copies, Peer, Product, Unavailable

GROUP = 128


def int4(weight: Tensor) -> Copies:
    """``marlin.Layer``, its scales from the largest magnitude of each group."""
    try:
        import marlin
    except ImportError as error:
        raise Unavailable(f"marlin is not installed ({error})") from error
    n, k = weight.shape
    if k % GROUP or n % 256:
        raise Unavailable(f"takes N in multiples of 256 and K of {GROUP}")
    scale = (weight.float().view(n, k // GROUP, GROUP).abs().amax(2) * 2 / 15).clamp(min=1e-6).half()
    linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float16, device="meta")
    linear.weight = torch.nn.Parameter(weight.half(), requires_grad=False)
    layer = marlin.Layer(k, n, groupsize=GROUP).to(weight.device)
    layer.pack(linear, scale)

    def copy() -> Product:
        codes, scales = layer.B.clone(), layer.s.clone()
        workspace = torch.zeros_like(layer.workspace)

        def run(x: Tensor) -> Tensor:
            y = x.new_empty(x.shape[0], n)
            marlin.mul(x, codes, y, scales, workspace)
            return y

        return Product(run, codes.nbytes + scales.nbytes)

    return copy


PEERS = (
    Peer(
        *("marlin_int4_g128", ("cuda",), int4, 0.2, torch.float16, lambda: "marlin (IST-DASLab)"),
        {"cuda": "a build without its L2 eviction hints"},
    ),
)
