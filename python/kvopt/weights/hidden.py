# SPDX-License-Identifier: Apache-2.0
"""The windows' hidden states between two decoder layers.

They wait on the host: 128 windows of 2048 tokens of a model 4096 wide are 2.1 GB in bf16, of which a layer reads one
batch at a time. For CUDA the memory is pinned and written again in place after each layer, and a stream of its own
copies: the next batch arrives while the layer runs on this one. Layers on the CPU get and give tensors as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def waits_on_host(device: torch.device) -> bool:
    """Whether hidden states leave this device between layers."""
    return device.type != "cpu"


@dataclass
class _Waiting:
    """A batch. ``own``: this module's memory, to be written again; ``ready``: behind the copy that fills it."""

    state: Tensor
    own: bool = False
    ready: torch.cuda.Event | None = None


class HiddenStates:
    """One hidden state (B, S, K) for each batch of windows, in the order in which they were added."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._copying: dict[torch.device, torch.cuda.Stream] = {}
        self._ahead: tuple[int, Tensor, torch.cuda.Event] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, state: Tensor, device: torch.device) -> None:
        """Appends a batch for layers on ``device``."""
        if waits_on_host(device):
            self._waiting.append(_Waiting(state))
            self._keep(self._waiting[-1], state, device)
        else:
            self._waiting.append(_Waiting(state.to(device)))

    def put(self, batch: int, state: Tensor) -> None:
        """Replaces a batch by what a layer made of it."""
        if self._ahead is not None and self._ahead[0] == batch:
            self._ahead = None
        if waits_on_host(state.device):
            self._keep(self._waiting[batch], state, state.device)
        else:
            self._waiting[batch] = _Waiting(state)

    def take(self, batch: int, device: torch.device, following: int | None = None) -> Tensor:
        """A batch on ``device``, not to be changed. ``following``: the batch that is likely taken next."""
        if device.type != "cuda":
            return self.on_host(batch).to(device)
        if self._ahead is not None and self._ahead[0] == batch and self._ahead[1].device == device:
            _, state, arrived = self._ahead
        else:
            state, arrived = self._fetch(batch, device)
        torch.cuda.current_stream(device).wait_event(arrived)
        self._ahead = None if following is None else (following, *self._fetch(following, device))
        return state

    def on_host(self, batch: int) -> Tensor:
        """A batch as it waits: the next :meth:`put` may change it."""
        waiting = self._waiting[batch]
        if waiting.ready is not None:
            waiting.ready.synchronize()
        return waiting.state

    def copy(self, batch: int) -> Tensor:
        """A batch on the CPU, for good."""
        state = self.on_host(batch)
        return state.clone() if self._waiting[batch].own else state.cpu()

    def _keep(self, waiting: _Waiting, state: Tensor, device: torch.device) -> None:
        """Copies a state to the host, into the memory where the batch was if it fits."""
        buffer = waiting.state
        if not waiting.own or buffer.shape != state.shape or buffer.dtype != state.dtype:
            buffer = _host_buffer(state, pinned=device.type == "cuda")
        waiting.state, waiting.own, waiting.ready = buffer, True, None
        if state.device.type != "cuda":
            buffer.copy_(state)
            return
        copies = self._copies(state.device)
        with torch.cuda.stream(copies):
            buffer.copy_(state, non_blocking=True)
            state.record_stream(copies)  # its memory is not given to others before
            waiting.ready = copies.record_event()

    def _fetch(self, batch: int, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
        """A batch on its way to the device, and the event behind its arrival."""
        waiting = self._waiting[batch]
        state = torch.empty_like(waiting.state, device=device)
        copies = self._copies(device)
        if waiting.ready is not None:
            copies.wait_event(waiting.ready)
        with torch.cuda.stream(copies):
            state.copy_(waiting.state, non_blocking=True)
            state.record_stream(copies)
            return state, copies.record_event()

    def _copies(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of the copies, behind all that was launched on the device so far."""
        if device not in self._copying:
            self._copying[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._copying[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream


def _host_buffer(like: Tensor, pinned: bool) -> Tensor:
    if pinned:
        try:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
        except RuntimeError:  # as much can't be pinned here: copies are slower then
            pass
    return torch.empty(like.shape, dtype=like.dtype, device="cpu")


def release_pinned_memory() -> None:
    """Hands pinned memory that was freed back to the system: torch would keep it for the next who asks."""
    release = getattr(torch.accelerator, "empty_host_cache", None)  # not in every torch that kvopt runs with
    if torch.cuda.is_available() and release is not None:
        release()
