# SPDX-License-Identifier: Apache-2.0
"""What a case notes beside its rows: which contender ran in which version, and which did not take part and why."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from peers import Peer


@dataclass
class Journal:
    """Goes into the JSON."""

    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: bool = False

    def enter(self, peer: Peer, device: str) -> None:
        """A contender takes part."""
        self.versions[peer.name] = peer.version()
        if peer.notes.get(device):
            self.notes[peer.name] = peer.notes[device]

    def leave_out(self, name: str, reason: object, where: str = "") -> None:
        """A contender does not; said on stderr, once a reason."""
        key = f"{name} ({where})" if where else name
        if self.left_out.get(key) != str(reason):
            print(f"left out: {key}: {reason}", file=sys.stderr)
        self.left_out[key] = str(reason)

    def fail(self, name: str, error: Exception, where: str = "") -> None:
        """A contender's own fault, a wrong result above all: it is left out and the run ends with exit code 1."""
        self.failed = True
        self.leave_out(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", where)
