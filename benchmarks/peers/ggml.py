# SPDX-License-Identifier: Apache-2.0
"""ggml, the library of llama.cpp, called through ctypes: its CPU products over Q4_0, Q4_K, Q8_0 and BF16.

The libraries come from ``KVOPT_GGML`` (a folder with libggml-base and libggml-cpu) or an installed llama-cpp-python.
A weight is quantised by ggml's own ``ggml_quantize_chunk`` without an importance matrix and lies in a buffer of one of
the CPU backend's buffer types: the plain one, or one that rearranges it for the processor (``CPU_REPACK``, ``AMX``);
each is a contender of its own. Activations are fp32, as ggml takes them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from peers.base import Copies, Peer, Product, Unavailable

# Numbers of ggml.h's enum ggml_type, fixed there for good.
TYPES = {"q4_0": 2, "q8_0": 8, "q4_K": 12, "bf16": 30}
F32 = 0
BUFFERS = {"": "CPU", "_repack": "CPU_REPACK", "_amx": "AMX"}


# ggml sets a thread's AMX tiles up once and for all; oneDNN and OpenVINO set the main thread's up anew.
_THREAD = ThreadPoolExecutor(1)


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


# name -> (result, arguments): the part of ggml.h, ggml-backend.h, ggml-alloc.h and ggml-cpu.h that is used
_BASE = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_version": (c_char_p, []),
    "ggml_commit": (c_char_p, []),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
}
_CPU = {
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_reg": (c_void_p, []),
}


class Ggml:
    """The two libraries, their CPU backend and its buffer types."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._base = _load(folder, "libggml-base", _BASE)
        self._cpu = _load(folder, "libggml-cpu", _CPU)
        self._quiet = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
        self.ggml_log_set(self._quiet, None)  # it logs every weight that it rearranges
        self.backend = self.ggml_backend_cpu_init()
        self.buffer_types = {"CPU": self.ggml_backend_get_default_buffer_type(self.backend)}
        address = self.ggml_backend_reg_get_proc_address(
            self.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
        )
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
            found = extra(self.ggml_backend_get_device(self.backend))
            for i in range(64):  # the list ends with a null pointer
                if not found or not found[i]:
                    break
                self.buffer_types[self.ggml_backend_buft_name(found[i]).decode()] = found[i]

    def __getattr__(self, name: str) -> Callable[..., object]:
        return getattr(self._cpu if name in _CPU else self._base, name)

    def version(self) -> str:
        """Version, commit and what the processor's code was compiled for."""
        flags = []
        for name in ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8"):
            has = getattr(self._cpu, f"ggml_cpu_has_{name}", None)
            if has is not None and has():
                flags.append(name)
        name = f"ggml {self.ggml_version().decode()} ({self.ggml_commit().decode()})"
        return f"{name}, {'+'.join(flags)}, buffer types {' '.join(self.buffer_types)}"

    def context(self) -> int:
        """A context for a few tensors without data."""
        made = self.ggml_init(_InitParams(1 << 20, None, True))
        if not made:
            raise Unavailable("ggml_init gave nothing")
        return made


def _load(folder: Path, name: str, functions: dict[str, tuple[object, list[object]]]) -> ctypes.CDLL:
    files = sorted(folder.glob(f"{name}.so*"))
    if not files:
        raise Unavailable(f"no {name}.so in {folder}")
    library = ctypes.CDLL(str(files[0]), mode=ctypes.RTLD_GLOBAL)
    for function, (result, arguments) in functions.items():
        if not hasattr(library, function):
            raise Unavailable(f"{files[0]} has no {function}: another ggml than this file knows")
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library


@functools.cache
def library() -> Ggml:
    """The one library of this process.

    Raises:
        Unavailable: none is found, or it is another one than this file knows.
    """
    if "KVOPT_GGML" in os.environ:
        return Ggml(Path(os.environ["KVOPT_GGML"]))
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise Unavailable("llama-cpp-python is not installed and KVOPT_GGML names no folder")
    return Ggml(Path(package.origin).parent / "lib")


def matmul(kind: str, buffer: str) -> Callable[[Tensor], Copies]:
    """``ggml_mul_mat`` over a weight of this type in this buffer type."""

    def prepare(weight: Tensor) -> Copies:
        if buffer not in library().buffer_types:
            raise Unavailable(f"this ggml has no buffer type {buffer} here")
        if buffer == "AMX":
            _try_apart(kind, buffer)
        return untried(kind, buffer)(weight)

    return prepare


def untried(kind: str, buffer: str) -> Callable[[Tensor], Copies]:
    """The same without the precaution."""

    def prepare(weight: Tensor) -> Copies:
        g = library()
        g.ggml_backend_cpu_set_n_threads(g.backend, torch.get_num_threads())
        n, k = weight.shape
        rows = weight.float().contiguous()
        codes = torch.empty(n * g.ggml_row_size(TYPES[kind], k), dtype=torch.uint8)
        if kind == "bf16":
            codes = rows.bfloat16().view(torch.uint8).flatten()
        else:
            step = -(-n // 16)  # rows at once, so that every thread has some

            def chunk(row: int) -> None:
                count = min(step, n - row)
                g.ggml_quantize_chunk(
                    *(TYPES[kind], rows.data_ptr(), codes.data_ptr(), row * k, count, k, None)
                )

            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(chunk, range(0, n, step)))
        return lambda: _Product(g, kind, buffer, codes, n, k).product()

    return prepare


@functools.cache
def _try_apart(kind: str, buffer: str) -> None:
    """One small product in a process of its own: ggml's AMX code, compiled by gcc 12, dies of a bad tile setup."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from peers import ggml;"
        "p = ggml.untried(sys.argv[2], sys.argv[3])(torch.randn(256, 256))();"
        "p.run(p.enter(torch.randn(16, 256)))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent.parent), kind, buffer]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise Unavailable(f"a small product ends its process with code {done.returncode}")


class _Product:
    """One copy of the weight in a ggml buffer, and a graph of one multiplication."""

    def __init__(self, g: Ggml, kind: str, buffer: str, codes: Tensor, n: int, k: int) -> None:
        self.g, self.n, self.k, self.nbytes = g, n, k, codes.nbytes
        self.held: list[tuple[int, int]] = []  # contexts and buffers: the weight's, the activations'
        self.y = self.graph = self.m = 0
        context = g.context()
        self.weight = g.ggml_new_tensor_2d(context, TYPES[kind], k, n)
        self._hold(context, buffer)
        g.ggml_free(self._graph(1)[0])  # a buffer type without a kernel for this weight must not be given it
        g.ggml_backend_tensor_set(self.weight, codes.data_ptr(), 0, codes.nbytes)

    def product(self) -> Product:
        return Product(self.run, self.nbytes, self.enter, self.leave, _THREAD)

    def enter(self, x: Tensor) -> None:
        self._free(from_=1)
        g, self.m = self.g, x.shape[0]
        context, inputs, self.y = self._graph(self.m)
        self._hold(context, "CPU")
        x = x.contiguous()
        g.ggml_backend_tensor_set(inputs, x.data_ptr(), 0, x.nbytes)
        self.graph = g.ggml_new_graph(context)
        g.ggml_build_forward_expand(self.graph, self.y)

    def _graph(self, m: int) -> tuple[int, int, int]:
        """A context, an input of ``m`` rows and the product as its tensors."""
        context = self.g.context()
        inputs = self.g.ggml_new_tensor_2d(context, F32, self.k, m)
        y = self.g.ggml_mul_mat(context, self.weight, inputs)
        if not self.g.ggml_backend_supports_op(self.g.backend, y):
            self.g.ggml_free(context)
            raise Unavailable("this buffer type has no kernel for the weight")
        return context, inputs, y

    def run(self, _: None) -> None:
        if self.g.ggml_backend_graph_compute(self.g.backend, self.graph):
            raise RuntimeError("ggml_backend_graph_compute failed")

    def leave(self, _: None) -> Tensor:
        values = (c_float * (self.m * self.n)).from_address(self.g.ggml_get_data(self.y))
        return torch.frombuffer(values, dtype=torch.float32).clone().view(self.m, self.n)

    def _hold(self, context: int, buffer: str) -> None:
        memory = self.g.ggml_backend_alloc_ctx_tensors_from_buft(context, self.g.buffer_types[buffer])
        if not memory:
            self.g.ggml_free(context)
            raise Unavailable(f"the buffer type {buffer} gave no memory")
        self.held.append((context, memory))

    def _free(self, from_: int) -> None:
        for context, memory in self.held[from_:]:
            self.g.ggml_backend_buffer_free(memory)
            self.g.ggml_free(context)
        del self.held[from_:]

    def __del__(self) -> None:
        self._free(from_=0)


def _version() -> str:
    return library().version()


PEERS = tuple(
    Peer(f"ggml_{kind}{suffix}", ("cpu",), matmul(kind, buffer), 0.2, torch.float32, _version)
    for kind in TYPES
    for suffix, buffer in BUFFERS.items()
    if kind != "bf16" or not suffix
)
