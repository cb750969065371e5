# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint folder: everything into a temporary one beside it, which is renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kvopt.weights.checkpoint.files import INDEX, WEIGHTS


def write_folder(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int, finish: Callable[[Path], None]
) -> None:
    """Writes ``tensors`` and what ``finish`` adds; at most one shard is held at a time.

    Args:
        folder: absent or empty.
        tensors: names and tensors, on any device.
        shard_bytes: a file holds no more than that, and one tensor at least.
        finish: writes the other files into the folder that it is given.

    Raises:
        FileExistsError: the folder is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        _write_tensors(partial, tensors, shard_bytes)
        finish(partial)
        _open_permissions(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open_permissions(folder: Path) -> None:
    """What the umask says: temporary folders and safetensors' files are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        save_file(shard, folder / _shard_name(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        shard[name] = _own(tensor)
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / _shard_name(i)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shard_name(number: int) -> str:
    return f"part-{number:05}.safetensors"


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, or the tensor itself where it is one that shares its storage with nothing."""
    tensor = tensor.detach().to("cpu").contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()
