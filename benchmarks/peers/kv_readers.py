# SPDX-License-Identifier: Apache-2.0
"""KV caches as contenders: transformers' own, and ours, behind one way of reading.

A reader takes a prompt, compresses it by its own rule, and then takes tokens one or several at a time. Each has a model
of its own, so that one library's hooks and attention never meet another's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peers.base import Unavailable


class Reader:
    """One sequence over one cache.

    Args:
        model: used by nobody else.
        cache: of transformers' type.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache, self.count = model, cache, 0

    def prompt(self, ids: Tensor) -> Tensor:
        """Reads (1, T) and compresses; the last position's logits (1, V)."""
        self.count = ids.shape[1]
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def more(self, ids: Tensor) -> Tensor:
        """Reads (1, n) at the positions that follow; logits (1, n, V)."""
        places = torch.arange(self.count, self.count + ids.shape[1], device=ids.device)[None]
        self.count += ids.shape[1]
        return self.model(ids, past_key_values=self.cache, position_ids=places, use_cache=True).logits

    def fork(self) -> Reader:
        """The same state again, the model shared."""
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache)
        return twin


@dataclass(frozen=True)
class KvPeer:
    """A contender.

    Attributes:
        name: as in the table.
        open: takes a model of its own and the tokens that may stay of a prompt of so many. Raises
            :class:`Unavailable`.
        version: of what runs.
        note: what a reader must know beside its figures.
        keeps: per cent of the prompt's tokens that ``open`` is asked for; None: it holds all of them.
    """

    name: str
    open: Callable[[Any, int, int], Reader]
    version: Callable[[], str]
    note: str = ""
    keeps: bool = False


def _transformers() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def _dynamic(model: Any, stay: int, prompt: int) -> Reader:
    from transformers import DynamicCache

    return Reader(model, DynamicCache(config=model.config))


def _sliding(model: Any, stay: int, prompt: int) -> Reader:
    from transformers.cache_utils import Cache, StaticSlidingWindowLayer

    layers = [StaticSlidingWindowLayer(prompt + 512, stay) for _ in range(model.config.num_hidden_layers)]
    return Reader(model, Cache(layers=layers))


def _quantised(backend: str, bits: int) -> Callable[[Any, int, int], Reader]:
    def open_it(model: Any, stay: int, prompt: int) -> Reader:
        from transformers import QuantizedCache

        axis = 0 if backend == "quanto" else 1  # what each backend's documentation recommends
        try:
            return Reader(
                model, QuantizedCache(backend, model.config, nbits=bits, axis_key=axis, axis_value=axis)
            )
        except ImportError as error:
            raise Unavailable(f"{backend} is not installed ({str(error).splitlines()[0]})") from error

    return open_it


def _with_backend(package: str) -> Callable[[], str]:
    def version() -> str:
        import importlib.metadata

        return f"{_transformers()}, {package} {importlib.metadata.version(package)}"

    return version


PEERS = (
    KvPeer("hf_dynamic", _dynamic, _transformers),
    KvPeer("hf_sliding", _sliding, _transformers, "static, rolls the whole window each token", keeps=True),
    *(
        KvPeer(
            f"hf_{backend}_int{bits}",
            _quantised(backend, bits),
            _with_backend("hqq" if backend == "hqq" else "optimum-quanto"),
            "groups of 64, residual of 128 tokens; the whole prompt is quantised",
        )
        for backend in ("hqq", "quanto")
        for bits in (4, 2)
    ),
)


def ours(spec: str) -> KvPeer:
    """Kvopt's cache; ``{}`` in ``spec`` stands for the tokens that may stay."""

    def open_it(model: Any, stay: int, prompt: int) -> Reader:
        import kvopt

        return Reader(model, kvopt.Cache(model, spec.format(stay)))

    def version() -> str:
        import kvopt

        return f"kvopt {kvopt.__version__}"

    return KvPeer(f"kvopt {spec.replace('_b{}', '')}", open_it, version, keeps="{}" in spec)
