# SPDX-License-Identifier: Apache-2.0
"""Finished layers on disk, so that a quantisation that was killed goes on where it was.

A part is one safetensors file per decoder layer: the quantised linears as their state dict has them, and the norms that
took up a factor. Its metadata holds the layer's rows of the report and a fingerprint of everything that the result
depends on: the model's weights (a sample of each), the recipe, the calibration tokens, the seed and kvopt's version.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kvopt._version import __version__
from kvopt.files import write_whole

_SAMPLE = 256  # elements of each parameter that its fingerprint reads


def fingerprint(model: nn.Module, *facts: Any) -> str:
    """A digest of the model's configuration and weights and of ``facts``."""
    digest = hashlib.sha256(repr((__version__, str(getattr(model, "config", "")), facts)).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].double().cpu()
        digest.update(repr((name, tuple(parameter.shape), parameter.dtype)).encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


class Parts:
    """The folder of the parts.

    Args:
        folder: made if it is not there.
        fingerprint: of this run.

    Raises:
        ValueError: the folder holds parts of another run; or it is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder, self.fingerprint = Path(folder), fingerprint
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"resume: {self.folder} is no folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.folder.glob("layer-*.safetensors")):
            if self._header(file)["fingerprint"] != fingerprint:
                raise ValueError(
                    f"resume: {file} is of another model, recipe, calibration, seed or version of kvopt; "
                    "give another folder, or delete it"
                )

    def save(self, index: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Writes the part of layer ``index``, whole or not at all."""
        header = json.dumps({**facts, "fingerprint": self.fingerprint}, allow_nan=False)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self._file(index), save(plain, {"kvopt": header}))

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of layer ``index``, or ``None`` where it is not finished."""
        file = self._file(index)
        if not file.is_file():
            return None
        facts = self._header(file)
        with self._open(file) as part:
            return {name: part.get_tensor(name) for name in part.keys()}, facts  # noqa: SIM118

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"

    def _header(self, file: Path) -> dict[str, Any]:
        try:
            with self._open(file) as part:
                facts = json.loads(part.metadata()["kvopt"])
            if isinstance(facts["fingerprint"], str) and isinstance(facts, dict):
                return facts
        except (KeyError, TypeError, json.JSONDecodeError):
            pass
        raise ValueError(f"resume: {file} is no part that kvopt wrote")

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"resume: {file} is damaged: {error}") from error
