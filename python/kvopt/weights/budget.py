# SPDX-License-Identifier: Apache-2.0
"""Bits per linear for a budget over the model: few where the loss does not feel them, more where it does.

Rounding the weight of a linear by ΔW moves its outputs by ΔW x. To second order the loss rises by

    ½ Σ_r f_r · e_r H e_rᵀ / T²      f_r = Σ_t (∂loss / ∂y_tr)²,  H = Σ_t x_t x_tᵀ,  e_r row r of ΔW, T tokens,

where the squared gradients by the outputs (the Fisher information, taken as diagonal and as independent of x) say how
much an output row matters. The way forward through the layers gives H, the way back f; each candidate format of each
linear then has a cost in nats a token and a size in bytes, and a knapsack over them is solved.
``docs/methods/budget.md`` compares other costs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvopt.files import write_whole
from kvopt.models.adapters import find_layers
from kvopt.weights.calibration import Calibration
from kvopt.weights.formats import quantize_to
from kvopt.weights.recipe import METHODS, RTN, Recipe
from kvopt.weights.solvers import Statistics, output_error
from kvopt.weights.streaming import Stage, Stream
from kvopt.weights.walk import weight_of

FORMATS = (*(f"int{bits}_g{group}" for bits in (2, 3, 4) for group in (128, 64, 32)), "int8")
GRADIENT_TOKENS = 16384  # of the calibration, that the backward pass reads
CELLS = 1 << 18  # of the knapsack's table


@dataclass(frozen=True)
class Option:
    """A linear in one format.

    Attributes:
        format: as a recipe names it.
        nbytes: of the packed weight.
        cost: the estimated rise of the loss, nats a token.
    """

    format: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Allocation:
    """What a search found.

    Attributes:
        formats: by the linears' names, as recipes name them.
        bits: the mean of bits per weight, all included.
        cost: the estimated rise of the loss, nats a token.
    """

    formats: dict[str, str]
    bits: float
    cost: float

    def recipes(self, method: str) -> dict[str, str]:
        """A recipe for each linear: its format by ``method``; 8 bits are rounded to nearest."""
        return {name: _by(method, format) for name, format in self.formats.items()}


def method_of(recipe: Any) -> str:
    """The method that stands where a recipe would: the search chooses the formats.

    Raises:
        ValueError: no method.
    """
    if recipe is None or recipe == RTN:
        return RTN
    if isinstance(recipe, str) and recipe in METHODS:
        return recipe
    possible = ", ".join((RTN, *METHODS))
    raise ValueError(
        f"recipe: with budget_bits it names a method, {possible}, and the search chooses the formats; got {recipe!r}"
    )


def check_bits(budget_bits: Any) -> float:
    """A usable budget.

    Raises:
        ValueError: no positive finite number.
    """
    if isinstance(budget_bits, bool) or not isinstance(budget_bits, int | float):
        raise ValueError(f"budget_bits: expected a number of bits per weight, got {budget_bits!r}")
    if not (math.isfinite(budget_bits) and budget_bits > 0):
        raise ValueError(f"budget_bits: expected a positive number of bits per weight, got {budget_bits}")
    return float(budget_bits)


def search(
    model: nn.Module,
    linears: dict[str, Any],
    calibration: Calibration,
    budget_bits: float,
    *,
    method: str = RTN,
    device: torch.device | str | None = None,
    tick: Callable[[str], None] = lambda name: None,
) -> Allocation:
    """Chooses a format for each linear; the model is as before afterwards.

    Args:
        model: in evaluation mode.
        linears: ``nn.Linear`` or ``Conv1D`` modules by their names.
        calibration: windows; the held-out ones are not read.
        budget_bits: the mean of bits per weight that the packed weights may have, all included.
        method: what will choose the codes; costs are always those of rounding to nearest. AWQ may need an input scale
            for each linear, which is counted.
        device: where layers run and weights will be.
        tick: called with each linear's name when its options are known.

    Raises:
        ValueError: a budget below the smallest formats', a model whose tensors or losses don't allow a backward pass,
            or NaN on the way.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "model: made in inference mode, where nothing can be differentiated; load it outside of it"
        )
    with torch.inference_mode(False), torch.no_grad():
        windows = Calibration(calibration.windows.clone(), calibration.held_out.clone())
        probe = _Probe(linears, device, tick)
        _measure(model, probe, windows, device)
    tables = probe.options(method)
    weights = {name: _numel(linear) for name, linear in linears.items()}
    total = sum(weights.values())
    least = sum(min(option.nbytes for option in options) for options in tables.values())
    if 8 * least > budget_bits * total:
        raise ValueError(
            f"budget_bits: {budget_bits:g} bits per weight are too few: "
            f"the smallest formats take {8 * least / total:.3f}"
        )
    picked = allocate(list(tables.values()), int(budget_bits * total / 8))
    chosen = [options[index] for options, index in zip(tables.values(), picked, strict=True)]
    return Allocation(
        {name: option.format for name, option in zip(tables, chosen, strict=True)},
        8 * sum(option.nbytes for option in chosen) / total,
        sum(option.cost for option in chosen),
    )


def remembered(
    folder: str | PathLike[str] | None, fingerprint: str, find: Callable[[], Allocation]
) -> Allocation:
    """What ``find`` gives, or gave before under that fingerprint in this folder.

    Raises:
        ValueError: the folder holds the search of another run, or a damaged one.
    """
    if folder is None:
        return find()
    file = Path(folder) / "budget.json"
    if file.exists():
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            known = facts.pop("fingerprint")
            found = Allocation(**facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"resume: {file} is damaged: {error}") from error
        if known != fingerprint:
            raise ValueError(
                f"resume: {file} is of another model, budget, calibration, seed or version of kvopt; give another "
                "folder, or delete it"
            )
        return found
    found = find()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({**asdict(found), "fingerprint": fingerprint}).encode())
    return found


def allocate(tables: Sequence[Sequence[Option]], capacity: int) -> list[int]:
    """One option of each table, so that the bytes fit and the costs' sum is least: a knapsack of many choices.

    Dynamic programming over bytes, in units of their greatest common divisor, which is exact. Where that gives more
    than ``CELLS`` units, sizes are rounded up to larger ones and what that leaves over is spent greedily.

    Args:
        tables: options, at least one each.
        capacity: bytes, at least the smallest options'.

    Returns:
        An index into each table.
    """
    least = [min(option.nbytes for option in options) for options in tables]
    room = capacity - sum(least)
    assert room >= 0
    extra = [[option.nbytes - low for option in options] for options, low in zip(tables, least, strict=True)]
    unit = max(1, math.gcd(*(size for sizes in extra for size in sizes)))
    unit *= max(1, -(-(room // unit) // CELLS))
    cells = room // unit + 1
    best = torch.zeros(
        cells, dtype=torch.float64
    )  # the least cost of the tables so far in at most so many units
    picks = []
    for options, sizes in zip(tables, extra, strict=True):
        costs = torch.full((len(options), cells), math.inf, dtype=torch.float64)
        for row, option, size in zip(costs, options, sizes, strict=True):
            shift = -(-size // unit)
            if shift < cells:
                row[shift:] = best[: cells - shift] + option.cost
        best, pick = costs.min(dim=0)
        picks.append(pick)
    chosen, at = [], cells - 1
    for pick, sizes in zip(reversed(picks), reversed(extra), strict=True):
        chosen.append(int(pick[at]))
        at -= -(-sizes[chosen[-1]] // unit)
    chosen.reverse()
    return _spend(tables, chosen, capacity)


def _spend(tables: Sequence[Sequence[Option]], chosen: list[int], capacity: int) -> list[int]:
    """Changes single choices while one is left that fits and costs less: the one that saves most first."""
    while True:
        left = capacity - sum(options[i].nbytes for options, i in zip(tables, chosen, strict=True))
        saved, where, which = 0.0, -1, -1
        for table, (options, now) in enumerate(zip(tables, chosen, strict=True)):
            for index, option in enumerate(options):
                gain = options[now].cost - option.cost
                if option.nbytes - options[now].nbytes <= left and gain > saved:
                    saved, where, which = gain, table, index
        if where < 0:
            return chosen
        chosen[where] = which


class _Probe:
    """Per linear: the errors of its outputs in each format, row by row, and the squared gradients by its outputs."""

    def __init__(
        self, linears: dict[str, Any], device: torch.device | str | None, tick: Callable[[str], None]
    ) -> None:
        self.linears, self._device, self._tick = linears, device, tick
        self._errors: dict[str, list[tuple[str, int, Tensor]]] = {}
        self._squares: dict[str, Tensor] = {}
        self._reached: set[str] = set()

    def under(self, prefix: str) -> dict[str, nn.Module]:
        """The linears of a module, by name."""
        return {name: module for name, module in self.linears.items() if name.startswith(prefix)}

    def errors(self, stage: Stage, batches: Sequence[int]) -> None:
        """Rounds each linear of the stage in every format and takes the mean square of each output row's error."""
        groups = stage.discover(self.under(stage.prefix), batches)
        first = [self.linears[shared.linears[0]] for shared in groups]
        # A layer's second moments have room beside each other, a whole model's have not.
        gathered = stage.collect_all(first, batches) if stage.prefix else None
        for index, shared in enumerate(groups):
            statistics = gathered[index] if gathered else stage.collect(first[index], batches, shared.calls)
            if not torch.isfinite(statistics.absmax).all():
                raise ValueError(
                    f"{shared.linears[0]}: the inputs on the calibration tokens hold NaN or infinity"
                )
            for name in shared.linears:
                weight = weight_of(self.linears[name])
                self._errors[name] = list(_rounded(name, weight, statistics))
                if statistics.tokens:
                    self._reached.add(name)
                self._tick(name)

    @contextmanager
    def watching(self, prefix: str, tokens: int) -> Iterator[None]:
        """Adds up the squared gradients by the outputs of the linears of a module, each divided by ``tokens``."""

        def listen(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def note(gradient: Tensor) -> None:
                square = gradient.detach().double().flatten(0, -2).square().sum(dim=0).cpu() / tokens
                self._squares[name] = self._squares.get(name, 0.0) + square

            def forward(module: nn.Module, args: Any, out: Tensor) -> None:
                if out.requires_grad:
                    out.register_hook(note)  # type: ignore[no-untyped-call]

            return forward

        handles = [m.register_forward_hook(listen(name)) for name, m in self.under(prefix).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def options(self, method: str) -> dict[str, list[Option]]:
        """The options of each linear.

        A linear that no token reached costs what the average weight costs in a format.
        """
        costs: dict[str, dict[str, float]] = {}
        for name in self._reached:
            square = self._squares.get(name)
            if square is not None and not torch.isfinite(square).all():
                raise ValueError(
                    f"{name}: the loss's gradient on the calibration tokens holds NaN or infinity"
                )
            costs[name] = {
                format: 0.0 if square is None else (square @ error).item() / 2
                for format, _, error in self._errors[name]
            }
        mean = {}
        for format in FORMATS:
            of = [name for name in costs if format in costs[name]]
            mean[format] = sum(costs[n][format] for n in of) / max(
                1, sum(_numel(self.linears[n]) for n in of)
            )
        result = {}
        for name, linear in self.linears.items():
            more = 4 * weight_of(linear).shape[1] if method == "awq" else 0
            result[name] = [
                Option(
                    format,
                    nbytes + more,
                    costs[name][format] if name in costs else mean[format] * _numel(linear),
                )
                for format, nbytes, _ in self._errors[name]
            ]
        return result


def _measure(
    model: nn.Module, probe: _Probe, windows: Calibration, device: torch.device | str | None
) -> None:
    """Errors on the way forward through the layers, gradients on the way back; a model of one piece as a whole."""
    name, layers = find_layers(model)
    stream = Stream(model, name, layers, windows, device)
    if len(probe.under(f"{name}.")) < len(probe.linears):
        stream.layers = []
    stream.embed()
    few = stream.first(GRADIENT_TOKENS)
    tokens = sum(stream.tokens(batch) for batch in few)
    if not stream.layers:
        with stream.visit(None) as stage:
            probe.errors(stage, stream.seen)
            with probe.watching("", tokens):
                for batch in few:
                    stream.whole_loss_backward(batch)
        return
    passes = []
    for index in range(len(stream.layers)):
        with stream.visit(index) as stage:
            probe.errors(stage, stream.seen)
            passes.append(stream.remember(index, few))
            stream.advance(index)
    with stream.visit(None):
        gradients = [stream.loss_gradient(batch) for batch in few]
    for index in reversed(range(len(stream.layers))):
        with stream.visit(index) as stage, probe.watching(stage.prefix, tokens):
            gradients = [run.backward(g) for run, g in zip(passes.pop(), gradients, strict=True)]


def _rounded(name: str, weight: Tensor, statistics: Statistics) -> Iterator[tuple[str, int, Tensor]]:
    """Format, bytes and each output row's mean square error, (N,) float64 on the CPU."""
    for text in FORMATS:
        format = Recipe.parse(text).format
        assert format is not None
        if format.group_size is not None and format.group_size > weight.shape[1]:
            continue
        try:
            packed = quantize_to(weight, format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        lost = output_error(packed.dequantize() - weight.float(), statistics)
        yield text, packed.nbytes, lost.clamp(min=0).double().cpu() / max(1, statistics.tokens)


def _by(method: str, format: str) -> str:
    if method == RTN or format == "int8":
        return format
    return f"{method}_{format[3]}bit_{format.partition('_')[2]}"


def _numel(linear: Any) -> int:
    count: int = linear.weight.numel()
    return count
