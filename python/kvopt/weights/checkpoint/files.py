# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint's safetensors: what the headers say is known first, and checked before a value is read.

The files may come from anywhere, so every error names the file and the tensor; pickled weights are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_JSON = 256 * 2**20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: not there, too large, no JSON, or not an object; names the file.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path}: larger than {LARGEST_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder in Hugging Face format.

    Raises:
        ValueError: none, only pickled ones, or an index that names anything but files in this folder.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        also = f"; {pickled[0]} is pickled, which is not read" if pickled else ""
        raise ValueError(f"{folder}: has neither {WEIGHTS} nor {INDEX}{also}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected an object 'weight_map' with at least one tensor")
    files = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {tensor!r} is said to be in {name!r}; expected a *.safetensors file of this folder"
            )
        files[name] = folder / name
    for name, path in files.items():
        if not path.is_file():
            raise ValueError(f"{index}: names {name}, which is not there")
    return [files[name] for name in sorted(files)]


class TensorFiles:
    """The tensors of some safetensors files; use as a context manager.

    Args:
        files: their paths; each tensor is in one of them.

    Raises:
        ValueError: a file is damaged or not safetensors, or a tensor is in two.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._handles: dict[Path, Any] = {}
        self._home: dict[str, Path] = {}
        for path in files:
            if path.suffix != ".safetensors":
                raise ValueError(f"{path}: only safetensors files are read")
            try:
                opened: Any = safe_open(path, framework="pt")
                handle = opened.__enter__()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: damaged safetensors file: {error}") from None
            self._handles[path] = handle
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if name in self._home:
                    raise ValueError(f"{path}: {name!r} is also in {self._home[name].name}")
                self._home[name] = path

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles.values():
            handle.__exit__(None, None, None)

    @property
    def names(self) -> list[str]:
        """The tensors, in the order of the files."""
        return list(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __len__(self) -> int:
        return len(self._home)

    def where(self, name: str) -> str:
        """A tensor and its file, as errors name it."""
        return f"{self._home[name].name}: {name}" if name in self._home else name

    def shape(self, name: str) -> tuple[int, ...]:
        """What the header says.

        Raises:
            ValueError: no such tensor.
        """
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """What the header says; ``None`` for a type that no format of ours uses.

        Raises:
            ValueError: no such tensor.
        """
        return _DTYPES.get(self._slice(name).get_dtype())

    def read(
        self, name: str, shape: tuple[int, ...], dtypes: torch.dtype | tuple[torch.dtype, ...]
    ) -> Tensor:
        """A tensor of the given shape and of one of the given types.

        Raises:
            ValueError: it is not there, or is another.
        """
        self.check(name, shape, dtypes)
        tensor: Tensor = self._handles[self._home[name]].get_tensor(name)
        return tensor

    def check(
        self, name: str, shape: tuple[int, ...], dtypes: torch.dtype | tuple[torch.dtype, ...] = ()
    ) -> None:
        """Raises :class:`ValueError` unless the tensor is there, of this shape and (if given) one of these types."""
        dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
        got = self.shape(name)
        if got != shape:
            raise ValueError(f"{self.where(name)}: expected shape {shape}, got {got}")
        if dtypes and self.dtype(name) not in dtypes:
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(f"{self.where(name)}: expected {expected}, got {self._slice(name).get_dtype()}")

    def _slice(self, name: str) -> Any:
        if name not in self._home:
            files = ", ".join(sorted(path.name for path in self._handles))
            raise ValueError(f"{files}: the tensor {name!r} is missing")
        return self._handles[self._home[name]].get_slice(name)
