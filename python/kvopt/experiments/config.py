# SPDX-License-Identifier: Apache-2.0
"""What an experiment is: plain dataclasses, and the registry of the ones that come with kvopt."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum

from kvopt.grammar import unknown


class QuantMethod(str, Enum):
    """How weights are stored. The value is the recipe's name in the choice grammar."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def quantises(self) -> bool:
        """False for the baselines, which only choose a type."""
        return self in (QuantMethod.INT8, QuantMethod.INT4)


@dataclass(frozen=True)
class QuantizationConfig:
    """A weight recipe: a method and its settings, or any recipe string as it is.

    Args:
        method: how weights are stored; ``None`` where ``recipe`` says it all.
        group_size: weights that share a scale, for grouped methods.
        symmetric: no zero points.
        recipe: a complete recipe string; it wins over the other fields.
        calibration: file of documents, for recipes that choose their codes by data.
        calibration_windows: at most so many windows of it; default: as :func:`kvopt.quantize` takes it.
    """

    method: QuantMethod | None = QuantMethod.BF16
    group_size: int | None = None
    symmetric: bool = False
    recipe: str | None = None
    calibration: str | None = None
    calibration_windows: int | None = None

    def __str__(self) -> str:
        """The recipe in the choice grammar, for instance ``"int4_g128"``."""
        if self.recipe is not None:
            return self.recipe
        if self.method is None:
            raise ValueError("QuantizationConfig: give a method or a recipe")
        group = "" if self.group_size is None else f"_g{self.group_size}"
        return f"{self.method.value}{group}{'_sym' if self.symmetric else ''}"

    @property
    def is_baseline(self) -> bool:
        """True for ``fp32``, ``fp16`` and ``bf16``."""
        return str(self) in {method.value for method in QuantMethod if not method.quantises}


@dataclass(frozen=True)
class ModelConfig:
    """Which model, where and in which type of activations: as :func:`kvopt.load` takes them."""

    name: str = "llama-6m"
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class EvalConfig:
    """What accuracy is measured on. ``None`` texts are the embedded ones; a limit of 0 leaves the measure out.

    Args:
        text: file of documents for perplexity.
        stories: file of recall documents.
        windows: at most so many windows of text.
        window: tokens per window.
        prefill: tokens of a window that are context and not scored, the same ones plain and through a cache.
        documents: at most so many recall stories.
        history: ask a story's questions as one dialogue.
    """

    text: str | None = None
    stories: str | None = None
    windows: int = 40
    window: int = 1024
    prefill: int = 512
    documents: int = 40
    history: bool = False


@dataclass(frozen=True)
class BenchmarkConfig:
    """What speed is measured with: one sequence, greedy decoding, rounds that alternate between all contenders."""

    prompt_tokens: int = 1024
    new_tokens: int = 32
    rounds: int = 7
    warmup: int = 2


@dataclass(frozen=True)
class ExperimentConfig:
    """One recipe with one cache on one model, and how it is measured."""

    name: str
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: str = "full"
    eval: EvalConfig = field(default_factory=EvalConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    seed: int = 0

    def replace(self, **changes: object) -> ExperimentConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


DEFAULT_CACHE = "sink_b256_s4"
"""The compressed cache that the main job measures beside ``full``."""

EXPERIMENTS: dict[str, ExperimentConfig] = {
    config.name: config
    for config in (
        ExperimentConfig("fp32", QuantizationConfig(QuantMethod.FP32)),
        ExperimentConfig("bf16", QuantizationConfig(QuantMethod.BF16)),
        ExperimentConfig("int8", QuantizationConfig(QuantMethod.INT8)),
        ExperimentConfig("int4_g128", QuantizationConfig(QuantMethod.INT4, group_size=128)),
    )
}
"""The experiments of the main job, by name."""


def find_experiment(name: str) -> ExperimentConfig:
    """The registered experiment of that name.

    Raises:
        ValueError: there is none; the message lists what is there and the nearest match.
    """
    if name not in EXPERIMENTS:
        raise unknown("experiments", name, "name", name, EXPERIMENTS)
    return EXPERIMENTS[name]


def experiment_for(recipe: str) -> ExperimentConfig:
    """An experiment for any recipe string: the registered one of that recipe, else a new one under the recipe's name.

    Raises:
        ValueError: not a recipe.
    """
    import kvopt

    canonical = str(kvopt.Recipe.parse(recipe))
    for config in EXPERIMENTS.values():
        if str(config.quantization) == canonical:
            return config
    return ExperimentConfig(canonical, QuantizationConfig(method=None, recipe=canonical))
