# SPDX-License-Identifier: Apache-2.0
"""Quantising a model in place, linear by linear, and undoing it."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from kvopt import _library
from kvopt.models.memory import model_nbytes
from kvopt.weights.formats import QuantizedWeight, WeightFormat, quantize_to
from kvopt.weights.linear import QuantLinear, TiedEmbedding
from kvopt.weights.recipe import Recipe
from kvopt.weights.report import LayerReport, QuantizationReport

RecipeLike = str | Recipe | Mapping[str, str | Recipe]


def quantize_weight(w: Tensor, recipe: str | Recipe, inputs: Tensor | None = None) -> QuantizedWeight:
    """Quantises one weight.

    Args:
        w: (N, K), floating.
        recipe: for instance ``"int4_g128"``.
        inputs: (tokens, K), for methods that need data; rounding to nearest needs none.

    Raises:
        ValueError: an unusable weight, a recipe that quantises nothing, or a group larger than K.
    """
    parsed = Recipe.parse(recipe)
    if parsed.format is None:
        raise ValueError(f"recipe: {parsed} quantises nothing; expected for instance 'int8' or 'int4_g128'")
    return quantize_to(w, parsed.format)


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
    recipe: RecipeLike,
    calibration: Iterable[str] | Tensor | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> QuantizationReport:
    """Quantises the linears of a causal language model in place (``nn.Linear`` and GPT-2's ``Conv1D``).

    The full-precision weight of each linear is dropped before the next one is touched. Embeddings stay as they are.
    The output head stays too unless the recipe names it (``"int4_g128+head_int8"``, or a pattern other than ``"*"``);
    a tied head that is quantised takes the embedding with it, and both are stored once.

    Args:
        model: any Hugging Face causal language model, changed in place.
        recipe: a recipe, or a mapping from module name pattern (glob or regular expression) to recipe, of which the
            first match wins; a linear that nothing matches stays as it is.
        calibration: texts or tokens, for methods that need data; rounding to nearest needs none.
        tokenizer: of the model, for texts.
        progress: show a progress bar.
        seed: of methods that draw; rounding to nearest draws nothing.
        device: where to quantise and leave the packed weights; default: where each weight is.

    Returns:
        One row per linear, with its size and error.

    Raises:
        ValueError: an unknown recipe, a pattern that matches nothing, an already quantised linear, or a linear that the
            recipe does not fit (the message names it). A linear that fails leaves those before it quantised.
    """
    if not isinstance(recipe, Mapping):
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
    for name, module, format in plan:  # before anything is changed
        try:
            format.group_columns(_weight_of(module).shape[1])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    report = QuantizationReport(_describe(recipe), [], model_nbytes(model), 0)
    bar = tqdm(plan, desc=f"quantising {report.recipe}", unit="linear", disable=not progress)
    del plan
    for name, module, format in bar:
        report.layers.append(_quantize_one(model, name, module, format, device))
        bar.set_postfix_str(f"error {report.layers[-1].weight_error:.4f}", refresh=False)
    _library.release_free_memory()
    report.nbytes_after = model_nbytes(model)
    return report


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
        _replace(model, name, plain)
    return model


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module) is Conv1D


def _weight_of(module: nn.Module) -> Tensor:
    """The (N, K) weight, a view."""
    parameter: Any = module.weight
    weight: Tensor = parameter.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _head_of(model: Any) -> nn.Module | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def _matches(pattern: str, name: str) -> bool:
    if fnmatch.fnmatchcase(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False  # a glob such as "*.down_proj" is no regular expression


def _plan(model: nn.Module, recipe: RecipeLike) -> list[tuple[str, nn.Module, WeightFormat]]:
    """Which linear gets which format, in the model's order."""
    linears = [(name, module) for name, module in model.named_modules() if _is_linear(module)]
    head = _head_of(model)
    if not isinstance(recipe, Mapping):
        parsed = Recipe.parse(recipe)
        formats = [(n, m, parsed.head if m is head else parsed.format) for n, m in linears]
        if parsed.head is not None and not any(m is head for _, m in linears):
            raise ValueError(f"recipe {str(parsed)!r}: the model has no linear output head")
        return [(n, m, f) for n, m, f in formats if f is not None]

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
            plan.append((name, module, chosen.format))
    return plan


def _describe(recipe: RecipeLike) -> str:
    if isinstance(recipe, Mapping):
        return ", ".join(f"{pattern}: {Recipe.parse(choice)}" for pattern, choice in recipe.items())
    return str(Recipe.parse(recipe))


def _quantize_one(
    model: Any, name: str, module: Any, format: WeightFormat, device: torch.device | str | None
) -> LayerReport:
    start = time.perf_counter()
    weight = _weight_of(module).to(device or module.weight.device)
    try:
        quantized = quantize_to(weight, format)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    bias = None if module.bias is None else module.bias.detach().to(weight.device)
    source = "conv1d" if isinstance(module, Conv1D) else "linear"
    replacement = QuantLinear(quantized, bias, source)
    replacement.train(module.training)
    distance = (quantized.dequantize() - weight.float()).norm() / weight.float().norm().clamp(min=1e-30)

    note = ""
    embedding = model.get_input_embeddings() if module is _head_of(model) else None
    if isinstance(embedding, nn.Embedding) and embedding.weight is module.weight:
        model.set_input_embeddings(TiedEmbedding(replacement, weight.dtype))
        note = "tied with the input embedding, stored once"
    _replace(model, name, replacement)
    return LayerReport(
        name=name,
        format=str(format),
        bits=quantized.bits,
        nbytes=quantized.nbytes,
        weight_error=distance.item(),
        output_error=None,
        note=note,
        seconds=time.perf_counter() - start,
    )


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
