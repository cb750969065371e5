# SPDX-License-Identifier: Apache-2.0
"""kvopt.compress: a compressed cache under everything a model does inside a ``with`` block."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from kvopt.cache import hooks
from kvopt.cache.cache import Cache
from kvopt.cache.spec import CacheSpec


@contextmanager
def compress(model: PreTrainedModel, spec: str | CacheSpec, prefill: str | int = "full") -> Iterator[Cache]:
    """Compresses the KV cache of every ``generate`` and forward inside.

    .. code-block:: python

        with kvopt.compress(model, "sink_b256_s4") as cache:
            model.generate(**inputs, max_new_tokens=64)
            print(cache.nbytes())

    Each ``generate`` starts with an empty cache, and so does each forward without ``past_key_values``; a forward
    with the ``past_key_values`` that an earlier one returned continues. An empty cache passed to ``generate`` or
    forward is replaced by ours. Leaving the block restores the model's attention implementation and ``generate``; the
    cache keeps the last sequence and can still be read.

    Args:
        model: as for :class:`Cache`.
        spec: as for :class:`Cache`.
        prefill: as for :class:`Cache`.

    Yields:
        The cache, shared by everything inside the block.

    Raises:
        TypeError, ValueError: as :class:`Cache`; inside, ``use_cache=False`` and caches that already hold tokens.
    """
    implementation = model.config._attn_implementation
    cache = Cache(model, spec, prefill)
    hooks.set_ambient(cache.architecture.base, cache)
    own_generate = model.__dict__.get("generate")
    if hasattr(model, "generate"):
        model.generate = _fresh_for_each_call(model.generate, cache)
    try:
        yield cache
    finally:
        if own_generate is not None:
            model.generate = own_generate
        else:
            model.__dict__.pop("generate", None)
        hooks.set_ambient(cache.architecture.base, None)
        if implementation != model.config._attn_implementation:
            model.set_attn_implementation(implementation)


def _fresh_for_each_call(generate: Any, cache: Cache) -> Any:
    @functools.wraps(generate)
    def fresh(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None:
            cache.reset()
            kwargs["past_key_values"] = cache
        return generate(*args, **kwargs)

    return fresh
