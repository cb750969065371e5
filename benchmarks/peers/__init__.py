# SPDX-License-Identifier: Apache-2.0
"""Other libraries' products over the same weight, and ours, behind one interface (:mod:`peers.base`).

Each quantises the weight by its own rule and is checked against the dense product before it is timed. One that can't
take part is left out, and the driver prints why.
"""

from __future__ import annotations

from peers import bitsandbytes_linear, ggml, marlin_linear, openvino_linear, torch_linear
from peers.base import Copies, Peer, Product, Unavailable
from peers.ours import contender

PEERS: dict[str, Peer] = {
    peer.name: peer
    for module in (torch_linear, bitsandbytes_linear, openvino_linear, ggml, marlin_linear)
    for peer in module.PEERS
}

__all__ = ["PEERS", "Copies", "Peer", "Product", "Unavailable", "contender", "select"]


def select(names: list[str], device: str) -> list[Peer]:
    """Peers by name or by the beginning of names (``ggml``, ``bnb``), or ``all``, of those that run on ``device``.

    Raises:
        ValueError: a name fits none.
    """
    here = [peer for peer in PEERS.values() if device in peer.devices]
    chosen: dict[str, Peer] = {}
    for name in names:
        fits = [peer for peer in here if name == "all" or peer.name.startswith(name)]
        if not fits and not any(peer.startswith(name) for peer in PEERS):
            raise ValueError(f"peer {name!r}: possible are all, none, {', '.join(p.name for p in here)}")
        chosen |= {peer.name: peer for peer in fits}
    return list(chosen.values())
