# SPDX-License-Identifier: Apache-2.0
"""Quantising a model in place, linear by linear, and undoing it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from kvopt import _library
from kvopt.models.memory import model_nbytes
from kvopt.weights import budget
from kvopt.weights.calibration import Calibration, prepare
from kvopt.weights.candidates import NEEDS_DATA
from kvopt.weights.formats import QuantizedWeight, check_weight, quantize_to
from kvopt.weights.hidden import release_pinned_memory
from kvopt.weights.linear import QuantLinear, TiedEmbedding
from kvopt.weights.parts import Parts, fingerprint
from kvopt.weights.recipe import RTN, Recipe
from kvopt.weights.report import LayerReport, QuantizationReport
from kvopt.weights.solvers import SOLVERS, Statistics
from kvopt.weights.walk import Planned, Walk, head_of, is_linear, replace_module

RecipeLike = str | Recipe | Mapping[str, str | Recipe]


def quantize_weight(w: Tensor, recipe: str | Recipe, inputs: Tensor | None = None) -> QuantizedWeight:
    """Quantises one weight.

    Args:
        w: (N, K), floating.
        recipe: for instance ``"int4_g128"`` or ``"gptq_4bit_g128"``.
        inputs: (tokens, K), the linear's inputs: GPTQ, AWQ and clipping need them; rounding to nearest and HQQ do not.

    Raises:
        ValueError: an unusable weight, a recipe that quantises nothing, a group larger than K, or inputs that are
            needed and absent, or of another K.
    """
    parsed = Recipe.parse(recipe)
    if parsed.format is None:
        raise ValueError(f"recipe: {parsed} quantises nothing; expected for instance 'int8' or 'int4_g128'")
    if parsed.method == RTN:
        return quantize_to(w, parsed.format)
    check_weight(w, parsed.format)
    parsed.format.group_columns(w.shape[1])
    statistics = None if inputs is None else Statistics.of(inputs.to(w.device))
    return SOLVERS[parsed.method](w, parsed.format, statistics).pack(parsed.format)


def qlinear(
    x: Tensor,
    qw: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation_bits: int | None = None,
    input_scale: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``act((x * input_scale) @ w^T + bias + low_rank) + residual`` from the packed weight, in one fused kernel.

    Args:
        x: (..., K) float32, float16 or bfloat16.
        qw: the (N, K) weight.
        bias: (N,), like every further tensor in the dtype of ``x``.
        activation_bits: 16 or 8; default: what the weight's format says.
        input_scale: (K,).
        low_rank: a correction (..., rank) @ (N, rank)^T, as these two tensors.
        swiglu: the weight is of :meth:`QuantizedWeight.interleave_swiglu`; gives ``silu(gate) * up``, (..., N / 2).
        residual: of the shape of the result.

    Returns:
        (..., N), or (..., N / 2), in the dtype of ``x``. Differentiable in every tensor but the weight.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
    """
    return qw.linear(
        x,
        bias,
        activation_bits=activation_bits,
        input_scale=input_scale,
        low_rank=low_rank,
        swiglu=swiglu,
        residual=residual,
    )


def quantize(
    model: nn.Module,
    recipe: RecipeLike | None = None,
    calibration: Iterable[Any] | Tensor | None = None,
    tokenizer: Any = None,
    progress: bool | Callable[[LayerReport], None] = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    resume: str | PathLike[str] | None = None,
    budget_bits: float | None = None,
) -> QuantizationReport:
    """Quantises the linears of a causal language model in place (``nn.Linear`` and GPT-2's ``Conv1D``).

    The full-precision weight of each linear is dropped before the next one is touched. Embeddings stay as they are.
    The output head stays too unless the recipe names it (``"int4_g128+head_int8"``, or a pattern other than ``"*"``);
    a tied head that is quantised takes the embedding with it, and both are stored once.

    With ``calibration`` one decoder layer runs at a time, and each linear is quantised for the inputs that the
    quantised ones before it give (``docs/methods/calibration.md``). Where a method's output error on held-out tokens
    is larger than that of rounding to nearest, the linear is rounded to nearest, and its note says so.

    With ``budget_bits`` the format of each linear is searched for instead (``docs/methods/budget.md``): the mean of
    their true bits is at most that, and the estimated rise of the loss is least. Needs calibration.

    Args:
        model: any Hugging Face causal language model, changed in place.
        recipe: a recipe, or a mapping from module name pattern (glob or regular expression) to recipe, of which the
            first match wins; a linear that nothing matches stays as it is. With ``budget_bits`` nothing, or a method:
            ``"rtn"`` (the default), ``"gptq"``, ``"awq"``, ``"clip"``, ``"hqq"``.
        calibration: texts, or token ids: a tensor (windows, tokens) or (tokens,), or an iterable of id sequences.
            GPTQ, AWQ and clipping need it; with it every method's output errors are measured and held against those of
            rounding to nearest.
        tokenizer: of the model, for texts.
        progress: show a progress bar; or a function, called with the row of each finished linear instead.
        seed: draws the held-out windows, and is passed to methods that draw.
        device: where to quantise and leave the packed weights; default: where each weight is. The model may be
            elsewhere: one decoder layer at a time is moved.
        resume: a folder that keeps finished layers. The same call again, on the model as it was at first, takes what
            is there and goes on behind it, to the same result. Delete the folder afterwards.
        budget_bits: bits per weight over all linears but the head, scales, zero points and padding included.

    Returns:
        One row per linear, with its size and errors; what a search chose is its ``chosen``, a mapping as ``recipe``
        takes it.

    Raises:
        ValueError: an unknown recipe or none, a budget that no choice of formats meets, a pattern that matches nothing,
            an already quantised linear, calibration that is needed and absent or unusable, parts of another run in
            ``resume``, or a linear that the recipe does not fit (the message names it). A linear that fails leaves
            those before it quantised.
        TypeError: calibration is neither texts nor token ids.
    """
    if budget_bits is not None:
        method, budget_bits = budget.method_of(recipe), budget.check_bits(budget_bits)
        if calibration is None:
            raise ValueError("budget_bits: needs calibration texts or tokens: quantize(…, calibration=texts)")
        recipe = {"*": "int8"}  # which linears; the search says how
    elif recipe is None:
        raise ValueError("recipe: expected a recipe, for instance 'int4_g128', or budget_bits")
    elif not isinstance(recipe, Mapping):
        parsed = Recipe.parse(recipe)
        if parsed.dtype is not None:
            before = model_nbytes(model)
            model.to(parsed.dtype)
            return QuantizationReport(str(parsed), [], before, model_nbytes(model))
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("model: already quantised; kvopt.dequantize(model) first")
    plan = _plan(model, recipe)
    if not plan:
        raise ValueError("model: has no nn.Linear or Conv1D to quantise")
    windows = None if calibration is None else prepare(calibration, tokenizer, model, seed)
    description, found = _describe(recipe), None
    if budget_bits is not None:
        assert windows is not None
        found = _search(model, plan, windows, budget_bits, method, progress, seed, device, resume)
        recipe, description = found.recipes(method), f"{budget_bits:g} bits, {method}"
        plan = _plan(model, recipe)
    for linear in plan:  # before anything is changed
        try:
            linear.format.group_columns(linear.weight.shape[1])
        except ValueError as error:
            raise ValueError(f"{linear.name}: {error}") from None
        if calibration is None and linear.method in NEEDS_DATA:
            raise ValueError(
                f"{linear.method}: needs calibration texts or tokens: quantize(…, calibration=texts)"
            )
    report = QuantizationReport(description, [], model_nbytes(model), seed=seed)
    if found is not None:
        report.budget_bits, report.estimated_loss = budget_bits, found.cost
        report.chosen = found.recipes(method)
    if windows is not None:
        report.calibration_tokens, report.held_out_tokens = windows.windows.numel(), windows.held_out.numel()
    parts = None
    if resume is not None:
        facts = [(linear.name, linear.method, linear.fold_only, str(linear.format)) for linear in plan]
        parts = Parts(resume, fingerprint(model, facts, seed, windows and windows.fingerprint))

    with _progress(progress, len(plan), report.recipe) as done, _training_kept(model):
        walk = Walk(model, plan, seed=seed, device=device, parts=parts, done=done)
        report.layers = walk.run(windows)
    del walk
    release_pinned_memory()
    _library.release_free_memory()
    report.nbytes_after = model_nbytes(model)
    report.kept = _kept(model)
    return report


def _search(
    model: nn.Module,
    plan: list[Planned],
    windows: Calibration,
    budget_bits: float,
    method: str,
    progress: bool | Callable[[LayerReport], None],
    seed: int,
    device: torch.device | str | None,
    resume: str | PathLike[str] | None,
) -> budget.Allocation:
    """The formats for a budget, from the folder of a run that goes on or searched for."""
    linears = {linear.name: linear.module for linear in plan}
    facts = ("budget", budget_bits, method, budget.FORMATS, tuple(linears))
    run = fingerprint(model, facts, seed, windows.fingerprint)

    def find() -> budget.Allocation:
        with (
            tqdm(
                total=len(linears), desc="measuring formats", unit="linear", disable=progress is not True
            ) as bar,
            _training_kept(model),
        ):
            model.eval()
            return budget.search(
                *(model, linears, windows, budget_bits),
                method=method,
                device=device,
                tick=lambda name: bar.update() and None,
            )

    return budget.remembered(resume, run, find)


@contextmanager
def _training_kept(model: nn.Module) -> Iterator[None]:
    """Modules in training mode are so again afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _progress(
    progress: bool | Callable[[LayerReport], None], total: int, recipe: str
) -> Iterator[Callable[[LayerReport], None]]:
    """What is called with each row: the user's function, or a bar with the running mean of the errors."""
    if callable(progress):
        yield progress
        return
    errors: list[tuple[float, float]] = []
    with tqdm(total=total, desc=f"quantising {recipe}", unit="linear", disable=not progress) as bar:

        def done(row: LayerReport) -> None:
            if row.held_out_error is None or row.rtn_held_out_error is None:
                text = f"weight error {row.weight_error:.4f}"
            else:
                errors.append((row.held_out_error, row.rtn_held_out_error))
                ours, nearest = (sum(column) / len(errors) for column in zip(*errors, strict=True))
                text = f"output error {ours:.4f}, rtn {nearest:.4f}"
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield done


def _kept(model: nn.Module) -> dict[str, int]:
    """Bytes of each floating parameter of two or more dimensions."""
    return {name: p.nbytes for name, p in model.named_parameters() if p.dim() >= 2 and p.is_floating_point()}


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Makes plain ``nn.Linear`` and ``Conv1D`` modules again, in place, with the dequantised values.

    Args:
        model: a quantised model.
        dtype: of the weights; default: of the model's other parameters.
    """
    dtype = dtype or _dtype_of(model)
    embedding = next((m for m in model.modules() if isinstance(m, TiedEmbedding)), None)
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantLinear):
            continue
        plain = _plain(module, dtype)
        if embedding is not None and embedding._head[0] is module:
            rows, features = plain.weight.shape
            table = nn.Embedding(rows, features, device="meta")
            table.weight = plain.weight
            model.set_input_embeddings(table)  # type: ignore[operator]
        replace_module(model, name, plain)
    return model


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _matches(pattern: str, name: str) -> bool:
    if fnmatch.fnmatchcase(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False  # a glob such as "*.down_proj" is no regular expression


def _plan(model: nn.Module, recipe: RecipeLike) -> list[Planned]:
    """Which linear gets which format by which method, in the model's order."""
    linears = [(name, module) for name, module in model.named_modules() if is_linear(module)]
    head = head_of(model)
    if not isinstance(recipe, Mapping):
        parsed = Recipe.parse(recipe)
        if parsed.head is not None and not any(m is head for _, m in linears):
            raise ValueError(f"recipe {str(parsed)!r}: the model has no linear output head")
        return [
            Planned(name, module, format, RTN if module is head else parsed.method, parsed.fold_only)
            for name, module in linears
            if (format := parsed.head if module is head else parsed.format) is not None
        ]

    rules = [(pattern, Recipe.parse(choice)) for pattern, choice in recipe.items()]
    for pattern, choice in rules:
        if choice.dtype is not None:
            raise ValueError(
                f"recipe {pattern!r}: {choice} is not a format; leave a linear out to keep it as it is"
            )
        if not any(_matches(pattern, name) for name, _ in linears):
            raise ValueError(f"recipe: the pattern {pattern!r} matches no linear of the model")
    plan = []
    for name, module in linears:
        fitting = (
            c for pattern, c in rules if _matches(pattern, name) and not (module is head and pattern == "*")
        )
        chosen = next(fitting, None)
        if chosen is not None and chosen.format is not None:
            plan.append(Planned(name, module, chosen.format, chosen.method, chosen.fold_only))
    return plan


def _describe(recipe: RecipeLike) -> str:
    if isinstance(recipe, Mapping):
        return ", ".join(f"{pattern}: {Recipe.parse(choice)}" for pattern, choice in recipe.items())
    return str(Recipe.parse(recipe))


def _plain(module: QuantLinear, dtype: torch.dtype) -> nn.Linear | Conv1D:
    weight = module.quantized_weight.dequantize(dtype)
    n, k = weight.shape
    plain: nn.Linear | Conv1D
    bias: Tensor | None
    if module.source == "conv1d":
        with torch.device("meta"):
            plain = Conv1D(n, k)
        weight = weight.T.contiguous()
        bias = (
            torch.zeros(n, dtype=dtype, device=weight.device) if module.bias is None else module.bias.detach()
        )
    else:
        plain = nn.Linear(k, n, bias=module.bias is not None, device="meta")
        bias = None if module.bias is None else module.bias.detach()
    plain.weight = nn.Parameter(weight)
    plain.bias = None if bias is None else nn.Parameter(bias.to(dtype))
    plain.train(module.training)
    return plain
