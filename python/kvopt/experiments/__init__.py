# SPDX-License-Identifier: Apache-2.0
"""Experiments: configurations and their registry, the main job, benchmarks, result files and figures.

Names are imported when first used, so that the command line starts without waiting for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvopt.experiments.benchmark import Contender, Timing, time_interleaved
    from kvopt.experiments.config import (
        DEFAULT_CACHE,
        EXPERIMENTS,
        BenchmarkConfig,
        EvalConfig,
        ExperimentConfig,
        ModelConfig,
        QuantizationConfig,
        QuantMethod,
    )
    from kvopt.experiments.loading import InputError, load_quantized_model
    from kvopt.experiments.measures import (
        LLMBenchmark,
        get_model_memory_footprint,
        measure_inference_latency,
        measure_memory_usage,
        measure_throughput,
        run_benchmarks,
        run_quick_sanity_check,
    )
    from kvopt.experiments.results import Record, Results, read_results, write_results
    from kvopt.experiments.runner import Outcome, run

_HOME = {
    "benchmark": ("Contender", "Timing", "time_interleaved"),
    "config": (
        "DEFAULT_CACHE",
        "EXPERIMENTS",
        "BenchmarkConfig",
        "EvalConfig",
        "ExperimentConfig",
        "ModelConfig",
        "QuantMethod",
        "QuantizationConfig",
    ),
    "loading": ("InputError", "load_quantized_model"),
    "measures": (
        "LLMBenchmark",
        "get_model_memory_footprint",
        "measure_inference_latency",
        "measure_memory_usage",
        "measure_throughput",
        "run_benchmarks",
        "run_quick_sanity_check",
    ),
    "results": ("Record", "Results", "read_results", "write_results"),
    "runner": ("Outcome", "run"),
}

__all__ = [
    "DEFAULT_CACHE",
    "EXPERIMENTS",
    "BenchmarkConfig",
    "Contender",
    "EvalConfig",
    "ExperimentConfig",
    "InputError",
    "LLMBenchmark",
    "ModelConfig",
    "Outcome",
    "QuantMethod",
    "QuantizationConfig",
    "Record",
    "Results",
    "Timing",
    "get_model_memory_footprint",
    "load_quantized_model",
    "measure_inference_latency",
    "measure_memory_usage",
    "measure_throughput",
    "read_results",
    "run",
    "run_benchmarks",
    "run_quick_sanity_check",
    "time_interleaved",
    "write_results",
]


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _HOME.items():
        if name in names:
            value = getattr(importlib.import_module(f"kvopt.experiments.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'kvopt.experiments' has no attribute {name!r}")
