# SPDX-License-Identifier: Apache-2.0
"""The walk through a model: linear by linear without data, decoder layer by decoder layer with calibration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvopt.models.adapters import Source, find_layers, groups_of, within
from kvopt.weights import candidates, folding
from kvopt.weights.calibration import Calibration
from kvopt.weights.candidates import NEEDS_DATA, Candidate
from kvopt.weights.formats import QuantizedWeight, WeightFormat
from kvopt.weights.linear import QuantLinear, TiedEmbedding
from kvopt.weights.parts import Parts
from kvopt.weights.recipe import RTN
from kvopt.weights.report import LayerReport
from kvopt.weights.solvers import Statistics, awq
from kvopt.weights.streaming import Shared, Stage, Stream


@dataclass(frozen=True)
class Planned:
    """A linear, its format and the method that chooses its codes."""

    name: str
    module: Any
    format: WeightFormat
    method: str = RTN
    fold_only: bool = False

    @property
    def weight(self) -> Tensor:
        """(N, K), a view."""
        return weight_of(self.module)


class Walk:
    """Quantises the planned linears in place.

    Args:
        model: in evaluation mode.
        plan: emptied on the way, so that each full-precision weight is freed when it is done.
        seed: of methods that draw.
        device: where to quantise and leave the packed weights; ``None``: where each weight is.
        parts: where finished layers are kept and taken from.
        done: called with the row of each finished linear.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: list[Planned],
        *,
        seed: int,
        device: torch.device | str | None,
        parts: Parts | None,
        done: Callable[[LayerReport], None],
    ) -> None:
        self._model, self._seed, self._device, self._parts, self._done = model, seed, device, parts, done
        self._order = [linear.name for linear in plan]
        self._plan = {linear.name: linear for linear in plan}
        plan.clear()
        self._layers_name, self._layers = find_layers(model)
        self._rows: dict[str, LayerReport] = {}
        self._folded: set[str] = set()  # sources that took up a factor, by their names in the model

    def run(self, calibration: Calibration | None) -> list[LayerReport]:
        """One row per linear, in the order of the plan."""
        if calibration is None:
            if self._parts is not None:
                for index in range(len(self._layers)):
                    self._layer(index, self._without_data)
            self._without_data(list(self._plan))
        else:
            self._model.eval()
            with torch.no_grad():
                self._with_data(calibration)
        return [self._rows[name] for name in self._order]

    def _without_data(self, names: Sequence[str]) -> None:
        for name in names:
            start = time.perf_counter()
            linear = self._plan[name]
            found = self._alone(linear)
            self._install(linear, found, time.perf_counter() - start)

    def _with_data(self, calibration: Calibration) -> None:
        stream = Stream(self._model, self._layers_name, self._layers, calibration, self._device)
        if self._layers and len(self._names_in(self._layers_name)) < len(self._plan):
            self._in_front(stream)
        stream.embed()
        for index in range(len(stream.layers)):
            stage = stream.layer(index)
            self._layer(index, partial(self._stage, stage, stream))
            stream.advance(index)
        if self._plan:
            self._stage(stream.outside(), stream, list(self._plan))

    def _names_in(self, prefix: str) -> list[str]:
        return [name for name in self._plan if name.startswith(prefix + ".")]

    def _layer(self, index: int, quantize: Callable[[Sequence[str]], None]) -> None:
        """A layer's linears: from its part, or quantised and kept as a part."""
        names = self._names_in(f"{self._layers_name}.{index}")
        if not names:
            return
        if self._parts is None:
            return quantize(names)
        part = self._parts.load(index)
        if part is not None:
            return self._restore(names, *part)
        self._folded.clear()
        quantize(names)
        tensors: dict[str, Tensor] = {}
        for name in (*names, *self._folded):
            module = self._model.get_submodule(name)
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        rows = [asdict(self._rows[name]) for name in names]
        self._parts.save(index, tensors, {"rows": rows, "folded": sorted(self._folded)})

    def _restore(self, names: Sequence[str], tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """A finished layer, as it was."""
        try:
            rows = {row["name"]: LayerReport(**row) for row in facts["rows"]}
            if set(rows) != set(names):
                raise ValueError(f"it has {sorted(rows)}, the model {sorted(names)}")
            for name in names:
                linear = self._plan[name]
                module = _empty(linear, f"{name}.input_scale" in tensors, self._device)
                module.load_state_dict(_under(name, tensors))
                self._replace(linear, module, rows[name])
            for name in facts["folded"]:
                self._model.get_submodule(name).load_state_dict(_under(name, tensors))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"resume: a part does not fit: {error}") from error

    def _in_front(self, stream: Stream) -> None:
        """Linears between the embedding and the first layer."""
        inside = set(self._names_in(self._layers_name))
        outer = {name: linear.module for name, linear in self._plan.items() if name not in inside}
        stage = stream.outside()
        for shared in stage.discover(outer, stream.seen[:1]):
            if shared.calls:
                self._group(stage, shared, None, stream)

    def _stage(self, stage: Stage, stream: Stream, names: Sequence[str]) -> None:
        groups = groups_of(self._model) if stage.prefix else None
        if groups is not None:
            groups = within(groups, {name.removeprefix(stage.prefix) for name in names})
        if groups is None:  # no table, or none that fits
            for shared in stage.discover({name: self._plan[name].module for name in names}, stream.seen):
                self._group(stage, shared, None, stream)
            return
        for group in groups:
            shared = Shared(tuple(stage.prefix + name for name in group.linears))
            self._group(stage, shared, group.source, stream)

    def _group(self, stage: Stage, shared: Shared, source: Source | None, stream: Stream) -> None:
        """Linears that share an input: statistics, candidates, judgement on held-out tokens, replacement."""
        start = time.perf_counter()
        linears = [self._plan[name] for name in shared.linears]
        if self._device is not None:
            for linear in linears:
                linear.module.to(self._device)
        statistics = stage.collect(linears[0].module, stream.seen, shared.calls)
        if not statistics.tokens:
            for linear in linears:
                found = self._alone(linear)
                found.note = _join("no calibration token reached it", found.note)
                self._install(linear, found, time.perf_counter() - start)
            return
        if not torch.isfinite(statistics.absmax).all():
            names = ", ".join(shared.linears)
            raise ValueError(f"{names}: the inputs on the calibration tokens hold NaN or infinity")
        fold = self._fold(stage.module, linears, statistics, source)
        pairs = [self._candidates(linear, statistics, fold) for linear in linears]
        kept = statistics if fold is not None and any(linear.fold_only for linear in linears) else None
        del statistics
        held = stage.collect(linears[0].module, stream.held_out, shared.calls)
        choices = [self._better(linear, *pair, held) for linear, pair in zip(linears, pairs, strict=True)]
        if kept is not None and any(choice.factor is None for choice in choices):
            fold = None  # for all of them or for none
            pairs = [self._candidates(linear, kept, fold) for linear in linears]
            choices = [self._better(linear, *pair, held) for linear, pair in zip(linears, pairs, strict=True)]
        if not held.tokens:
            for choice in choices:
                choice.note = _join("no held-out token reached it: not judged", choice.note)
        if fold is not None and source is not None and any(choice.factor is not None for choice in choices):
            fold.commit()
            self._folded.add(stage.prefix + source.name)
            for choice in choices:
                if choice.factor is None:  # its input is divided now: multiplied again
                    choice.weight.input_scale = fold.factor.float().to(choice.weight.device)
        share = (time.perf_counter() - start) / len(linears)
        for linear, choice, (_, rounded) in zip(linears, choices, pairs, strict=True):
            self._install(linear, choice, share, rounded.held_out_error)

    def _fold(
        self, layer: nn.Module, linears: Sequence[Planned], statistics: Statistics, source: Source | None
    ) -> folding.Fold | None:
        """AWQ: one factor for all linears that read the source, where it can be moved there and does anything."""
        formats = {linear.format for linear in linears}
        if source is None or len(formats) > 1 or any(linear.method != "awq" for linear in linears):
            return None
        config: Any = getattr(self._model, "config", None)
        ones = torch.ones_like(statistics.absmean)
        if folding.prepare(layer, source, config, ones) is None:
            return None
        factor = awq.search([linear.weight for linear in linears], linears[0].format, statistics)
        return None if torch.equal(factor, ones) else folding.prepare(layer, source, config, factor)

    def _candidates(
        self, linear: Planned, statistics: Statistics, fold: folding.Fold | None
    ) -> tuple[Candidate, Candidate]:
        """The method's candidate and the one rounded to nearest."""
        with _naming(linear.name):
            rounded = candidates.nearest(linear.weight, linear.format, statistics)
            if linear.method == RTN:
                return rounded, rounded
            if fold is not None:
                args = linear.weight, linear.format, statistics, self._seed
                return candidates.solve_folded(*args, fold.factor), rounded
            if linear.fold_only:
                found = candidates.solve(linear.weight, "clip", linear.format, statistics, self._seed)
                found.note = _join("no factor that can be folded: clipped", found.note)
                return found, rounded
            found = candidates.solve(linear.weight, linear.method, linear.format, statistics, self._seed)
            return found, rounded

    @staticmethod
    def _better(linear: Planned, found: Candidate, rounded: Candidate, held: Statistics) -> Candidate:
        candidates.judge(rounded, linear.weight, held)
        if found is not rounded:
            candidates.judge(found, linear.weight, held)
        return candidates.better(found, rounded)

    def _alone(self, linear: Planned) -> Candidate:
        """Without statistics: a method that needs them gives way to rounding."""
        weight = linear.weight if self._device is None else linear.weight.to(self._device)
        with _naming(linear.name):
            if linear.method == RTN or linear.method in NEEDS_DATA:
                return candidates.nearest(weight, linear.format)
            return candidates.solve(weight, linear.method, linear.format, None, self._seed)

    def _install(
        self, linear: Planned, choice: Candidate, seconds: float, rtn_held_out_error: float | None = None
    ) -> None:
        bias = linear.module.bias
        if bias is not None:
            bias = bias.detach().to(choice.weight.device)
        row = LayerReport(
            name=linear.name,
            format=str(linear.format),
            bits=choice.weight.bits,
            nbytes=choice.weight.nbytes,
            weight_error=choice.weight_error,
            output_error=choice.output_error,
            note=choice.note,
            seconds=seconds,
            method=choice.method,
            held_out_error=choice.held_out_error,
            rtn_held_out_error=rtn_held_out_error,
            damping=choice.damping,
        )
        self._replace(linear, QuantLinear(choice.weight, bias, source_of(linear.module)), row)

    def _replace(self, linear: Planned, module: QuantLinear, row: LayerReport) -> None:
        model: Any = self._model
        module.training = linear.module.training
        embedding = model.get_input_embeddings() if linear.module is head_of(model) else None
        if isinstance(embedding, nn.Embedding) and embedding.weight is linear.module.weight:
            model.set_input_embeddings(TiedEmbedding(module, embedding.weight.dtype))
            row = replace(row, note=_join("tied with the input embedding, stored once", row.note))
        replace_module(model, linear.name, module)
        del self._plan[linear.name]
        self._rows[linear.name] = row
        self._done(row)


def is_linear(module: nn.Module) -> bool:
    """Exactly ``nn.Linear`` or GPT-2's ``Conv1D``: a class derived from them may compute something else."""
    return type(module) is nn.Linear or type(module) is Conv1D


def weight_of(module: Any) -> Tensor:
    """The (N, K) weight, a view."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def source_of(module: nn.Module) -> str:
    """What :class:`QuantLinear` says that it replaced."""
    return "conv1d" if isinstance(module, Conv1D) else "linear"


def head_of(model: Any) -> nn.Module | None:
    """The output head, if the model has one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module where another one was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _empty(linear: Planned, has_input_scale: bool, device: torch.device | str | None) -> QuantLinear:
    """A module of the linear's shape and format, to be loaded into."""
    n, k = linear.weight.shape
    groups = -(-k // linear.format.group_columns(k))
    device = torch.device(device or linear.weight.device)
    scale = torch.zeros(n, groups, dtype=torch.float16, device=device)
    codes = torch.zeros(n, k, dtype=torch.uint8, device=device)
    inputs = torch.ones(k, device=device) if has_input_scale else None
    weight = QuantizedWeight.from_codes(codes, scale, scale.clone(), linear.format, input_scale=inputs)
    bias = linear.module.bias
    return QuantLinear(
        weight, None if bias is None else bias.detach().clone().to(device), source_of(linear.module)
    )


def _under(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
    }


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors inside name the linear."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
