# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: a fresh seed that is printed, one accuracy metric, devices, and no silent fallbacks."""

from __future__ import annotations

import importlib
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("KVOPT_FALLBACK", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# In the environment, so that parallel workers share it.
SESSION_SEED = int(os.environ.setdefault("KVOPT_TEST_SEED", str(random.SystemRandom().randrange(2**31))))
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_report_header() -> str:
    return f"kvopt: KVOPT_TEST_SEED={SESSION_SEED} KVOPT_ISA={os.environ.get('KVOPT_ISA', 'auto')}"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Random inputs every run; the seed of a test is printed when it fails. Set KVOPT_TEST_SEED to repeat one."""
    value = (SESSION_SEED + hash_name(request.node.nodeid)) % 2**31
    random.seed(value)
    torch.manual_seed(value)
    print(f"seed {value} (KVOPT_TEST_SEED={SESSION_SEED})")
    return value


def hash_name(name: str) -> int:
    """A stable hash: Python's own is salted per process."""
    result = 0
    for character in name:
        result = (result * 131 + ord(character)) % 2**31
    return result


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in fp64. NaN or infinity anywhere gives infinity, so it never passes a bound."""
    if got.shape != expected.shape:
        raise AssertionError(f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    a, b = got.detach().double().cpu(), expected.detach().double().cpu()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    norm = b.norm().item()
    return (a - b).norm().item() / norm if norm else (0.0 if a.norm().item() == 0 else float("inf"))


@pytest.fixture(scope="session")
def models_folder() -> Path:
    """The folder of extra models; a test that needs one is skipped where it is not set."""
    folder = os.environ.get("KVOPT_MODELS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("KVOPT_MODELS names no folder of extra models")
    return Path(folder)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks by its name there."""
    if not BENCHMARKS.exists():
        pytest.skip("the benchmarks are not part of this checkout")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
