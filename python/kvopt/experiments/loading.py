# SPDX-License-Identifier: Apache-2.0
"""From experiment configurations to models, with every fault of the input found before anything is measured."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import kvopt
from kvopt.eval import read_documents, windows_of
from kvopt.experiments.config import ExperimentConfig, QuantizationConfig
from kvopt.weights.calibration import MAX_WINDOW
from kvopt.weights.recipe import RTN


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


def load_quantized_model(config: ExperimentConfig) -> tuple[Any, Any]:
    """Loads the model of an experiment and quantises it as the experiment says.

    Args:
        config: the experiment.

    Returns:
        (model, tokenizer).

    Raises:
        InputError: the model, recipe, type or device can't be used.
    """
    with input_errors():
        recipe = kvopt.Recipe.parse(str(config.quantization))
        chosen_by_data = recipe.method != RTN and config.quantization.calibration is not None
        try:
            model, tokenizer = kvopt.load(
                config.model.name,
                recipe=None if chosen_by_data else recipe,
                device=config.model.device,
                dtype=config.model.dtype,
                progress=False,
            )
            if chosen_by_data:
                data = _calibration(config.quantization, tokenizer, model)
                kvopt.quantize(model, recipe, data, tokenizer, progress=False, seed=config.seed)
            return model, tokenizer
        except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
            if config.model.device in ("auto", "cpu"):
                raise
            raise InputError(f"device {config.model.device!r}: {one_line(error)}") from error


def _calibration(config: QuantizationConfig, tokenizer: Any, model: Any) -> Any:
    """Documents, or so many windows of them as the configuration asks for."""
    assert config.calibration is not None
    documents = read_documents(config.calibration)
    if config.calibration_windows is None:
        return documents
    longest = getattr(model.config, "max_position_embeddings", None) or MAX_WINDOW
    return windows_of(documents, tokenizer, min(MAX_WINDOW, longest), config.calibration_windows)


def load_all(experiments: Sequence[ExperimentConfig]) -> list[Loaded]:
    """Loads every experiment; what a recipe leaves unquantised has the checkpoint's type.

    Raises:
        InputError: the model, a recipe, a type or a device can't be used.
    """
    return [Loaded(experiment, *load_quantized_model(experiment)) for experiment in experiments]


def quantized_copies(base: Any, experiments: Sequence[ExperimentConfig]) -> list[Loaded]:
    """The same model in memory once per experiment; ``base`` itself serves where its type is the one asked for.

    It is for speed only: formats are rounded to, whatever method a recipe names.

    Raises:
        InputError: a recipe does not fit the model.
    """
    found = []
    for experiment in experiments:
        recipe = kvopt.Recipe.parse(str(experiment.quantization))
        recipe = dataclasses.replace(recipe, method=RTN, fold_only=False)
        dtype = recipe.dtype
        model = base if dtype == base.dtype else copy.deepcopy(base)
        if model is not base:
            with input_errors():
                kvopt.quantize(model, recipe, progress=False)
        found.append(Loaded(experiment, model, None))
    return found
