# SPDX-License-Identifier: Apache-2.0
"""From experiment configurations to models, with every fault of the input found before anything is measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import kvopt
from kvopt.experiments.benchmark import Contender, time_interleaved
from kvopt.experiments.config import ExperimentConfig


class InputError(ValueError):
    """Something the caller gave can't be used: a model, recipe, cache spec, device or file."""


@dataclass
class Loaded:
    """An experiment with its model, ready to be measured."""

    config: ExperimentConfig
    model: Any
    tokenizer: Any
    attention: str | None = None

    def __post_init__(self) -> None:
        """Remembers the attention implementation that the model came with."""
        self.attention = self.attention or self.model.config._attn_implementation


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns what bad input raises into an :class:`InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError, KeyError) as error:
        raise InputError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """An error's message on one line, with the file and the reason for errors of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def load_quantized_model(config: ExperimentConfig, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Loads the model of an experiment and quantises it as the experiment says.

    Args:
        config: the experiment.
        dtype: type of activations of a quantised model where the configuration leaves it to ``"auto"``.

    Returns:
        (model, tokenizer).

    Raises:
        InputError: the model, recipe, type or device can't be used.
    """
    wanted = config.model.dtype
    if wanted == "auto" and dtype is not None and not config.quantization.is_baseline:
        wanted = str(dtype).removeprefix("torch.")
    with input_errors():
        try:
            return kvopt.load(
                config.model.name,
                recipe=str(config.quantization),
                device=config.model.device,
                dtype=wanted,
                progress=False,
            )
        except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
            if config.model.device in ("auto", "cpu"):
                raise
            raise InputError(f"device {config.model.device!r}: {one_line(error)}") from error


def load_all(experiments: Sequence[ExperimentConfig]) -> list[Loaded]:
    """Loads every experiment; quantised ones get the activation type that :func:`activation_dtype` finds.

    Raises:
        InputError: the model, a recipe, a type or a device can't be used.
    """
    baselines = [e for e in experiments if e.quantization.is_baseline]
    found = {e.name: Loaded(e, *load_quantized_model(e)) for e in baselines}
    dtype = activation_dtype([item.model for item in found.values()])
    for experiment in experiments:
        if experiment.name not in found:
            found[experiment.name] = Loaded(experiment, *load_quantized_model(experiment, dtype))
    return [found[e.name] for e in experiments]


def quantized_copies(base: Any, experiments: Sequence[ExperimentConfig]) -> list[Loaded]:
    """The same model in memory once per experiment; ``base`` itself serves where its type is the one asked for.

    Raises:
        InputError: a recipe does not fit the model.
    """
    found: dict[str, Loaded] = {}
    for experiment in (e for e in experiments if e.quantization.is_baseline):
        dtype = kvopt.Recipe.parse(str(experiment.quantization)).dtype
        model = base if dtype == base.dtype else copy.deepcopy(base).to(dtype)
        found[experiment.name] = Loaded(experiment, model, None)
    activations = activation_dtype([item.model for item in found.values()])
    for experiment in experiments:
        if experiment.name in found:
            continue
        model = copy.deepcopy(base).to(activations or base.dtype)
        with input_errors():
            kvopt.quantize(model, str(experiment.quantization), progress=False)
        found[experiment.name] = Loaded(experiment, model, None)
    return [found[e.name] for e in experiments]


def activation_dtype(models: Sequence[Any]) -> torch.dtype | None:
    """The type for what quantised models leave unquantised: 16 bits, unless that is slow on this machine.

    The baselines run a short race. The narrowest type within a factor of 1.5 of the fastest wins: that is the 16-bit
    type wherever the processor knows it, and fp32 on one that has to emulate it.

    Returns:
        The type, or ``None`` without models.
    """
    if not models:
        return None
    if len(models) == 1:
        return models[0].dtype  # type: ignore[no-any-return]
    vocabulary = models[0].get_input_embeddings().num_embeddings
    prompt = torch.arange(16)[None] % vocabulary
    timings = time_interleaved([Contender("", model) for model in models], prompt, 8, rounds=3, warmup=1)
    rates = [timing.decode_tok_s for timing in timings]
    fit = [model.dtype for model, rate in zip(models, rates, strict=True) if 1.5 * rate >= max(rates)]
    return min(fit, key=lambda dtype: dtype.itemsize)  # type: ignore[no-any-return]
