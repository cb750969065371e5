# SPDX-License-Identifier: Apache-2.0
"""``import kvopt`` registers our checkpoints with transformers, without importing transformers.

Where it is imported already, at once; otherwise when its module of quantisers is, through an import hook that is there
until then. A transformers that can't take the registration keeps working without it, with a warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_WATCHED = "transformers.quantizers.auto"


class _Watcher(MetaPathFinder):
    """Finds one module as everyone else does, and registers when it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec with a loader that registers afterwards."""
        if name != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Registers now, or as soon as transformers' quantisers are imported."""
    if _WATCHED in sys.modules:
        _register()
    elif not any(type(finder).__name__ == _Watcher.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    try:
        importlib.import_module("kvopt.models.hf").register()
    except Exception as error:  # an unknown transformers must not break its own import
        warnings.warn(
            f"kvopt could not register its checkpoints with transformers: {error!r}; "
            "kvopt.load_quantized and AutoModelForCausalLM can't read them",
            stacklevel=2,
        )
