# SPDX-License-Identifier: Apache-2.0
"""The compiled modules as they were built: what they link, what they need, how they fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvopt
from kvopt import _library

OPS = Path(_library._ops_module.__file__)


def elf(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["readelf", "-W", *arguments, str(OPS)], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("readelf (binutils) is not installed")


def test_ops_is_abi3():
    assert OPS.name == "_ops.abi3.so"


def test_needs_libtorch_and_the_shared_standard_library():
    """libtorch.so brings the stream function in; a static libstdc++ would turn a failed check into a crash."""
    needed = re.findall(r"NEEDED.*\[(.*)\]", elf("-d"))
    assert "libtorch.so" in needed
    assert "libstdc++.so.6" in needed
    assert not any(name.startswith(("libcudart", "libgomp", "libpython")) for name in needed)


def test_the_stream_function_is_weak():
    lines = [line for line in elf("--dyn-syms").splitlines() if "aoti_torch_get_current_cuda_stream" in line]
    if not _library._ops_module.cuda_archs:
        pytest.skip("built without CUDA")
    assert lines and all("WEAK" in line and "UND" in line for line in lines)


def test_a_failed_check_is_a_runtime_error_without_build_paths():
    code = (
        "import torch, kvopt.ops\n"
        "try:\n"
        "    torch.ops.kvopt.wquant_rtn(torch.zeros(3), 4, 32, True)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "wquant_rtn: weight must be 2-dimensional (N, K), got 1 dimensions" in run.stdout
    assert "csrc" not in run.stdout and "site-packages" not in run.stdout


def test_build_info_tells_what_is_missing():
    info = kvopt.build_info()
    assert info["torch"] == torch.__version__
    assert info["isa_selected"] in info["isa_compiled"]
    assert ("torch sees no GPU" in info["missing"]) == (not torch.cuda.is_available())


def test_unknown_instruction_set_is_refused():
    code = (
        "import torch, kvopt\n"
        "kvopt.qlinear(torch.zeros(1, 16), kvopt.quantize_weight(torch.ones(4, 16), 'int8'))"
    )
    environment = {**os.environ, "KVOPT_ISA": "sse9"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode != 0
    assert "sse9" in run.stderr and "avx2" in run.stderr


def test_fallback_is_announced_or_forbidden(monkeypatch):
    monkeypatch.setattr(_library, "compiled", frozenset())
    monkeypatch.setattr(_library, "_announced", set())
    monkeypatch.setattr(_library, "missing_kernel_reason", lambda device: "no kernel in this test")
    weight = torch.randn(4, 32)
    monkeypatch.setenv("KVOPT_FALLBACK", "error")
    with pytest.raises(RuntimeError, match="no kernel in this test"):
        kvopt.ops.wquant_rtn(weight, 4, 32, True)
    monkeypatch.setenv("KVOPT_FALLBACK", "warn")
    with pytest.warns(kvopt.FallbackWarning, match="no kernel in this test"):
        kvopt.ops.wquant_rtn(weight, 4, 32, True)
