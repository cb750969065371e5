# SPDX-License-Identifier: Apache-2.0
"""From the words of the command line to the experiments of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kvopt.experiments.config import (
    DEFAULT_CACHE,
    EXPERIMENTS,
    BenchmarkConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    experiment_for,
    find_experiment,
)


@dataclass(frozen=True)
class Plan:
    """What :func:`kvopt.experiments.run` is to do."""

    experiments: tuple[ExperimentConfig, ...]
    caches: tuple[str, ...]
    speed: BenchmarkConfig | None


def make_plan(
    model: str = "llama-6m",
    experiments: Sequence[str] = (),
    recipes: Sequence[str] = (),
    caches: Sequence[str] | None = None,
    limit: int | None = None,
    quick: bool = False,
    speed: bool = True,
    device: str = "auto",
    seed: int = 0,
    calibration: str | None = None,
    calibration_windows: int | None = None,
) -> Plan:
    """The plan of a run.

    Without names or recipes: all registered experiments. With some that hold no unquantised baseline: the baselines are
    added, because a ratio without one means nothing.

    Args:
        model: embedded name, folder or hub id.
        experiments: names of registered experiments.
        recipes: further recipe strings.
        caches: cache specs beside ``full``; ``None`` for the default one.
        limit: at most so many text windows and recall stories; 0 leaves accuracy out.
        quick: fewer texts and rounds.
        speed: also time the random-weight speed model.
        device: as :func:`kvopt.load` takes it.
        seed: noted in the records; of the random model's weights and of the calibration's split.
        calibration: file of documents, for recipes that choose their codes by data.
        calibration_windows: at most so many windows of it.

    Raises:
        ValueError: an unknown name, recipe or cache spec.
    """
    chosen = [find_experiment(name) for name in experiments] + [experiment_for(recipe) for recipe in recipes]
    if not chosen:
        chosen = list(EXPERIMENTS.values())
    elif not any(config.quantization.is_baseline for config in chosen):
        chosen = [config for config in EXPERIMENTS.values() if config.quantization.is_baseline] + chosen
    unique = {config.name: config for config in chosen}

    evaluation = EvalConfig(windows=12, documents=12) if quick else EvalConfig()
    if limit is not None:
        evaluation = dataclasses.replace(evaluation, windows=limit, documents=limit)
    benchmark = BenchmarkConfig(rounds=5, warmup=1) if quick else BenchmarkConfig()
    large = BenchmarkConfig(prompt_tokens=128, new_tokens=16, rounds=3 if quick else 7, warmup=1)
    return Plan(
        experiments=tuple(
            config.replace(
                quantization=dataclasses.replace(
                    config.quantization, calibration=calibration, calibration_windows=calibration_windows
                ),
                model=ModelConfig(model, device),
                eval=evaluation,
                benchmark=benchmark,
                seed=seed,
            )
            for config in unique.values()
        ),
        caches=tuple(dict.fromkeys(["full", *((DEFAULT_CACHE,) if caches is None else caches)])),
        speed=large if speed else None,
    )
