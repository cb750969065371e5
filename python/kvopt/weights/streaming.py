# SPDX-License-Identifier: Apache-2.0
"""Calibration windows on their way through a model, one decoder layer at a time.

The model runs once with its layers replaced by nothing, which gives each layer's arguments (masks, positions) and the
embedded windows. From then on only one layer runs at a time, on what the layers before it gave, quantised as they are
by then. So the memory above the model is one layer, a batch's activations and the statistics of one input; the
windows' hidden states wait on the host (:mod:`kvopt.weights.hidden`).

    embed ─► hidden ─► layer 0 ─► hidden ─► layer 1 ─► … ─► what stands behind the layers (the head)

A model that passes its layers more than one hidden state, or changes it between them, is run as a whole instead:
slower, and right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kvopt.weights.calibration import Calibration
from kvopt.weights.hidden import HiddenStates
from kvopt.weights.linear import QuantLinear
from kvopt.weights.solvers.statistics import Statistics

BATCH_TOKENS = 2048  # tokens that run through a layer at once
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class _NotStreamable(Exception):
    """The layers are no chain of one hidden state."""


class Stage:
    """A part of the model that runs by itself: a decoder layer, or all that is no layer.

    Attributes:
        module: the layer, or the model.
        prefix: its name with a dot behind it; empty for the model.
        run: runs one batch, given its number.
    """

    def __init__(self, module: nn.Module, prefix: str, run: Callable[[int], Any]) -> None:
        self.module, self.prefix, self._run = module, prefix, run

    def run(self, batch: int) -> Any:
        """Runs one batch; ``None`` where a hook had enough of it."""
        try:
            with torch.no_grad():
                return self._run(batch)
        except _Stop:
            return None

    def collect(self, linear: nn.Module, batches: Sequence[int], calls: int = 1) -> Statistics:
        """Statistics of a linear's inputs over ``batches``.

        Args:
            linear: its module.
            batches: numbers.
            calls: how often a pass calls it; behind the first of one call the pass ends. 0: never, nothing is run.
        """
        module: Any = linear
        gathered = Statistics.empty(_columns(module), module.weight.device)

        def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
            gathered.add(args[0])
            if calls == 1:
                raise _Stop

        handle = module.register_forward_pre_hook(listen)
        try:
            for batch in batches if calls else ():
                self.run(batch)
        finally:
            handle.remove()
        return gathered

    def collect_all(self, linears: Sequence[nn.Module], batches: Sequence[int]) -> list[Statistics]:
        """The same of several linears from one run: faster than one by one where so many second moments have room."""
        modules: list[Any] = list(linears)
        gathered = [Statistics.empty(_columns(module), module.weight.device) for module in modules]

        def listen(statistics: Statistics) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda module, args: statistics.add(args[0])

        handles = [m.register_forward_pre_hook(listen(g)) for m, g in zip(modules, gathered, strict=True)]
        try:
            for batch in batches:
                self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return gathered

    def discover(self, linears: dict[str, nn.Module], batches: Sequence[int]) -> list[Shared]:
        """The general rule: which linears share an input, in the order in which they first run.

        Two linears share an input where they are called with the same tensor. Runs batches until every linear was seen
        (an expert may be chosen by no token of a batch); those never seen come last, each alone, with no calls.
        """
        found: list[Shared] = []
        missing = dict(linears)
        for batch in batches:
            if not missing:
                break
            calls: list[tuple[str, Tensor]] = []  # holds the inputs: a freed one's address may come again
            handles = [m.register_forward_pre_hook(_note(name, calls)) for name, m in missing.items()]
            try:
                self.run(batch)
            finally:
                for handle in handles:
                    handle.remove()
            found += _grouped(calls)
            for name, _ in calls:
                missing.pop(name, None)
        return found + [Shared((name,), 0) for name in missing]


class Shared:
    """Linears that share an input, by their names in the model, and how often the first is called in a pass."""

    def __init__(self, linears: tuple[str, ...], calls: int = 1) -> None:
        self.linears, self.calls = linears, calls


class Stream:
    """The windows and where they are.

    Args:
        model: in evaluation mode.
        name: of its list of decoder layers.
        layers: the decoder layers in order.
        calibration: the windows.
        device: where layers run; ``None``: where they are.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layers: Sequence[nn.Module],
        calibration: Calibration,
        device: torch.device | str | None,
    ) -> None:
        self._model, self._name = model, name
        self._device = None if device is None else _indexed(torch.device(device))
        self.layers = list(layers)
        size = max(1, BATCH_TOKENS // calibration.windows.shape[1])
        seen, held = (torch.split(part, size) for part in (calibration.windows, calibration.held_out))
        self._batches = [*seen, *held]
        self.seen = range(len(seen))
        self.held_out = range(len(seen), len(seen) + len(held))
        self._hidden = HiddenStates()
        self._calls: list[list[_Call]] = []
        self._as_tuple = False

    def outside(self) -> Stage:
        """What is no layer, moved to the device.

        Before :meth:`embed` it ends at the first layer; after the last layer it begins behind it.
        """
        if self._device is not None:
            inside = {id(module) for layer in self.layers for module in layer.modules()}
            for module in self._model.modules():
                if id(module) not in inside:
                    _move_own(module, self._device)
        return Stage(self._model, "", self._run_outside)

    def embed(self) -> None:
        """Runs everything in front of the first layer. After it :attr:`layers` is empty if they can't run singly."""
        if not self.layers:
            return
        for form in (False, True):
            self._as_tuple, self._hidden, self._calls = form, HiddenStates(), []
            try:
                for batch in self._batches:
                    self._record(batch)
                return
            except _NotStreamable:
                continue
        self.layers, self._hidden, self._calls = [], HiddenStates(), []

    def layer(self, index: int) -> Stage:
        """A decoder layer, moved to the device."""
        module = self.layers[index]
        module.to(self._target(index))
        return Stage(module, f"{self._name}.{index}.", lambda batch: self._run_layer(index, batch))

    @contextmanager
    def visit(self, index: int | None) -> Iterator[Stage]:
        """A decoder layer, or what is none, on the device; back where it was afterwards: for who changes nothing."""
        module = self._model if index is None else self.layers[index]
        before = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
        data = [(p, p.data) for _, parameters, _ in before for p in parameters.values() if p is not None]
        try:
            yield self.outside() if index is None else self.layer(index)
        finally:
            for parameter, values in data:
                parameter.data = values
            for part, parameters, buffers in before:
                part._parameters.update(parameters)
                part._buffers.update(buffers)

    def first(self, tokens: int) -> range:
        """So many of the batches seen, at least one."""
        return self.seen[: max(1, tokens // self._batches[0].numel())]

    def remember(self, index: int, batches: Sequence[int]) -> list[Pass]:
        """How the layer runs on these batches, to do it again when the stream has gone on; inputs on the CPU."""
        return [Pass(self.layers[index], self._calls[b][index], self._hidden.copy(b)) for b in batches]

    def advance(self, index: int) -> None:
        """Runs all batches through the layer: its outputs are the next one's inputs."""
        for batch in (*self.seen, *self.held_out):
            out = self._run_layer(index, batch)
            self._as_tuple = isinstance(out, tuple)
            self._hidden.put(batch, out[0] if isinstance(out, tuple) else out)
        for calls in self._calls:
            calls[index] = _Call((), {}, 0)  # frees what no later layer shares

    def loss_gradient(self, batch: int) -> Tensor:
        """The gradient of the summed cross-entropy of a batch's next tokens by what the last layer gave for it."""
        hidden = self._hidden.take(batch, self._target(-1)).detach().requires_grad_()
        with torch.enable_grad():
            loss = next_token_loss(self._run_outside(batch, hidden), self._batches[batch])
            return torch.autograd.grad(loss, hidden)[0]

    def whole_loss_backward(self, batch: int) -> None:
        """The same loss of the model run as a whole, backwards down to the embedded tokens, for hooks to see."""
        model: Any = self._model
        embedded: list[Tensor] = []

        def begin(module: nn.Module, args: Any, out: Tensor) -> None:
            if not embedded:
                embedded.append(out.requires_grad_())

        handle = model.get_input_embeddings().register_forward_hook(begin)
        try:
            with torch.enable_grad():
                loss = next_token_loss(self._forward(self._batches[batch]), self._batches[batch])
                torch.autograd.grad(loss, embedded)
        finally:
            handle.remove()

    def tokens(self, batch: int) -> int:
        """In a batch."""
        return self._batches[batch].numel()

    def _target(self, index: int) -> torch.device:
        if self._device is not None:
            return self._device
        layer = self.layers[index]
        return next((t.device for t in chain(layer.parameters(), layer.buffers())), torch.device("cpu"))

    def _run_layer(self, index: int, batch: int) -> Any:
        following = batch + 1 if batch + 1 < len(self._hidden) else None
        hidden = self._hidden.take(batch, self._target(index), following)
        with torch.no_grad():
            return self._calls[batch][index].make(self.layers[index], hidden)

    def _run_outside(self, batch: int, last: Tensor | None = None) -> Any:
        def skip(index: int, *args: Any, **kwargs: Any) -> Any:
            if not self._hidden:
                raise _Stop
            if index + 1 < len(self.layers):
                hidden = _hidden_of(args, kwargs)
            else:
                hidden = self._hidden.take(batch, self._target(index)) if last is None else last
            return (hidden,) if self._as_tuple else hidden

        with _replaced(self.layers, skip):
            return self._forward(self._batches[batch])

    def _forward(self, tokens: Tensor) -> Any:
        model: Any = self._model
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
        weight = next(embedding.parameters(), None)
        tokens = tokens if weight is None else tokens.to(weight.device)
        return model(tokens, use_cache=False) if hasattr(model, "config") else model(tokens)

    def _record(self, tokens: Tensor) -> None:
        """One pass with empty layers: appends the embedded tokens and each layer's arguments."""
        calls: list[_Call] = []
        hidden: list[Tensor] = []
        moved = _Moved(self._calls[0] if self._calls else [])

        def note(index: int, *args: Any, **kwargs: Any) -> Any:
            state = _hidden_of(args, kwargs)
            if index != len(calls) or (hidden and not _same(state, hidden[0])):
                raise _NotStreamable
            if not hidden:
                hidden.append(state)
            position = 0 if args else -1
            rest = {k: v for k, v in kwargs.items() if position == 0 or k != "hidden_states"}
            target = self._target(index)
            calls.append(_Call(moved(args[1:], target, index), moved(rest, target, index), position))
            if len(calls) == len(self.layers):
                raise _Stop
            return (state,) if self._as_tuple else state

        try:
            with torch.no_grad(), _replaced(self.layers, note):
                self._forward(tokens)
        except _Stop:
            pass
        except Exception as error:  # the model takes its layers' results apart
            raise _NotStreamable from error
        if len(calls) != len(self.layers):
            raise _NotStreamable
        self._hidden.add(hidden[0], self._target(0))
        self._calls.append(calls)


class _Call:
    """A layer's arguments besides the hidden state, which is the first one (0) or a keyword (-1)."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> None:
        self.args, self.kwargs, self.position = args, kwargs, position

    def make(self, layer: nn.Module, hidden: Tensor) -> Any:
        if self.position == 0:
            return layer(hidden, *self.args, **self.kwargs)
        return layer(*self.args, hidden_states=hidden, **self.kwargs)


class Pass:
    """A layer with what it ran on."""

    def __init__(self, layer: nn.Module, call: _Call, hidden: Tensor) -> None:
        self._layer, self._call, self._hidden = layer, call, hidden

    def backward(self, gradient: Tensor) -> Tensor:
        """From the gradient by the layer's output to that by its input; hooks on inner outputs see theirs."""
        device = next((p.device for p in self._layer.parameters()), self._hidden.device)
        hidden = self._hidden.to(device).detach().requires_grad_()
        with torch.enable_grad():
            out = self._call.make(self._layer, hidden)
            out = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(out, hidden, gradient.to(out.device))[0]


def next_token_loss(output: Any, tokens: Tensor) -> Tensor:
    """Summed cross-entropy of the tokens (B, S) behind the first, from a model's output."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    flat = logits[:, :-1].float().flatten(0, 1)
    return nn.functional.cross_entropy(flat, tokens[:, 1:].flatten().to(flat.device), reduction="sum")


class _Moved:
    """Arguments moved to a device, each tensor once; equal to the first batch's, they are the first batch's."""

    def __init__(self, first: list[_Call]) -> None:
        self._first = first
        self._known: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Any, device: torch.device, index: int) -> Any:
        like = None
        if self._first:
            call = self._first[index]
            like = call.args if isinstance(value, tuple) else call.kwargs
        return self._move(value, like, device)

    def _move(self, value: Any, like: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, like, device)
        if isinstance(value, list | tuple):
            others = like if type(like) is type(value) and len(like) == len(value) else [None] * len(value)
            return type(value)(self._move(v, o, device) for v, o in zip(value, others, strict=True))
        if isinstance(value, dict) and value:
            known = like if isinstance(like, dict) else {}
            return {key: self._move(v, known.get(key), device) for key, v in value.items()}
        if not value or isinstance(value, _PLAIN):
            if isinstance(value, dict | list | set):  # filled by one layer for another
                raise _NotStreamable
            return value
        raise _NotStreamable  # an object that may remember something

    def _tensor(self, value: Tensor, like: Any, device: torch.device) -> Tensor:
        key = id(value), device
        if key not in self._known:
            moved = value.to(device)
            same = isinstance(like, Tensor) and like.device == moved.device and _equal(like, moved)
            self._known[key] = (value, like if same else moved)  # the first keeps the id taken
        return self._known[key][1]


def _move_own(module: nn.Module, device: torch.device | str) -> None:
    """Moves what the module itself holds, not its children."""
    if isinstance(module, QuantLinear):
        module.to(device)
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)


def _indexed(device: torch.device) -> torch.device:
    """The device as tensors on it name it."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _note(name: str, calls: list[tuple[str, Tensor]]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: calls.append((name, args[0]))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    state = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(state, Tensor):
        raise _NotStreamable
    return state


def _columns(linear: Any) -> int:
    """K: of ``nn.Linear`` the weight's second dimension, of ``Conv1D`` its first."""
    size: int = linear.weight.shape[1 if isinstance(linear, nn.Linear) else 0]
    return size


def _grouped(calls: Sequence[tuple[str, Tensor]]) -> list[Shared]:
    """Calls in order to groups: linears first called with one and the same tensor."""
    count: dict[str, int] = {}
    groups: list[tuple[Tensor, list[str]]] = []
    for name, tensor in calls:
        count[name] = count.get(name, 0) + 1
        if count[name] > 1:
            continue
        for known, names in groups:
            if _same(known, tensor):
                names.append(name)
                break
        else:
            groups.append((tensor, [name]))
    return [Shared(tuple(names), max(count[name] for name in names)) for _, names in groups]


@contextmanager
def _replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """The layers' forward is ``forward(index, …)`` meanwhile."""
    old = [layer.__dict__.get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = lambda *args, _index=index, **kwargs: forward(_index, *args, **kwargs)
        yield
    finally:
        for layer, before in zip(layers, old, strict=True):
            if before is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = before
