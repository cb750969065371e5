# SPDX-License-Identifier: Apache-2.0
"""What happens around the forward of a model's decoder when a kvopt cache is in use.

Before: the cache learns the batch, the number of new tokens and the padding; the layers get its mask and, where
needed, its positions. A prompt that is to be read in chunks is cut up here. After: the step is closed. All of it goes
through transformers' public arguments, so it holds for ``generate``, a plain forward and anything built on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache as TransformersCache

from kvopt.cache.second_reading import AGAIN, read_again

if TYPE_CHECKING:
    from kvopt.cache.cache import Cache

Arguments = dict[str, Any]

_ATTACHED = "_kvopt_attached"
_AMBIENT = "_kvopt_ambient"
_PARTIAL = "kvopt_partial"  # among the arguments of a forward: it reads a chunk that was cut off here
_WHOLE = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "cache_position")


class Ambient:
    """The cache that ``kvopt.compress`` puts under every forward of a model.

    Args:
        cache: it.

    Attributes:
        stands_for: the empty cache of somebody else's that it stood in for, so that the same one continues.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.stands_for: TransformersCache | None = None

    def take(self, kwargs: Arguments) -> Cache:
        """Decides whether a forward continues or begins, and returns the cache to use."""
        from kvopt.cache.cache import Cache

        past = kwargs.get("past_key_values")
        if isinstance(past, Cache):
            return past
        if past is None or past is not self.stands_for:
            if past is not None and past.get_seq_length():
                raise ValueError(
                    "kvopt.compress: the cache that was passed already holds tokens, it can't be compressed"
                )
            self.cache.reset()
            self.stands_for = past
        kwargs["use_cache"] = True
        return self.cache


def attach(base: torch.nn.Module) -> None:
    """Adds the hooks to ``base``, once."""
    if not getattr(base, _ATTACHED, False):
        base.register_forward_pre_hook(_before, with_kwargs=True)
        base.register_forward_hook(_after, with_kwargs=True)
        setattr(base, _ATTACHED, True)


def set_ambient(base: torch.nn.Module, cache: Cache | None) -> None:
    """Makes ``cache`` the one under every forward; None ends that.

    Raises:
        ValueError: there is one already.
    """
    if cache is not None and getattr(base, _AMBIENT, None) is not None:
        raise ValueError("kvopt.compress: the model is inside another kvopt.compress")
    setattr(base, _AMBIENT, None if cache is None else Ambient(cache))


def _before(module: Any, args: tuple[Any, ...], kwargs: Arguments) -> tuple[tuple[()], Arguments] | None:
    from kvopt.cache.cache import Cache

    ambient = getattr(module, _AMBIENT, None)
    past = kwargs.get("past_key_values")
    if ambient is None and not isinstance(past, Cache) and not any(isinstance(arg, Cache) for arg in args):
        return None
    if args:
        names = (past if isinstance(past, Cache) else _first_cache(args, ambient)).architecture.arguments
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("use_cache") is False:
        raise ValueError("kvopt.Cache: use_cache=False leaves no KV cache to compress")
    cache = kwargs["past_key_values"] = (
        ambient.take(kwargs) if ambient is not None else kwargs["past_key_values"]
    )
    if cache.architecture.base is not module:
        raise ValueError(
            "kvopt.Cache: the cache was made for another model; make one with kvopt.Cache(model, ...)"
        )
    return (), _prepare(cache, module, kwargs)


def _first_cache(args: tuple[Any, ...], ambient: Ambient | None) -> Cache:
    from kvopt.cache.cache import Cache

    return ambient.cache if ambient is not None else next(arg for arg in args if isinstance(arg, Cache))


def _prepare(cache: Cache, module: Any, kwargs: Arguments, *, partial: bool = False) -> Arguments:
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    batch, new = tokens.shape[:2]
    mask = kwargs.get("attention_mask")
    if kwargs.pop(AGAIN, False):
        return _pass(cache, kwargs, tokens)
    hidden: list[torch.Tensor] = []
    more = _PARTIAL in kwargs
    again = None
    if cache.spec.policy.second_reading and not cache.columns and not more:
        again = tokens, cache.valid(batch, new, mask, tokens.device)
    if cache.chunk is not None and new > cache.chunk:
        hidden, kwargs = _read_chunks(cache, module, kwargs, new, tokens.device)
        new, mask, partial = cache.chunk, kwargs["attention_mask"], True
    kwargs = dict(kwargs)
    partial = kwargs.pop(_PARTIAL, partial)
    step = cache.begin(batch, new, mask, tokens.device, partial=partial)
    step.hidden, step.again, step.more = hidden, again, more
    learned_inside = cache.spec.policy.sinks > 0 and cache.architecture.position_table is not None
    if learned_inside or kwargs.get("position_ids") is None:
        kwargs["position_ids"] = step.position_ids(inside=learned_inside)
    return kwargs if step.first else _pass(cache, kwargs, tokens)


def _pass(cache: Cache, kwargs: Arguments, tokens: torch.Tensor) -> Arguments:
    """A mask that says nothing, for a cache that knows which tokens see which.

    Never None: transformers would take that as leave to look for padding in the tokens, and wait for the device.
    """
    batch, new = tokens.shape[:2]
    always = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=tokens.device)
    return dict(kwargs, attention_mask=always.expand(batch, 1, new, new))


def _read_chunks(
    cache: Cache, module: Any, kwargs: Arguments, new: int, device: torch.device
) -> tuple[list[torch.Tensor], Arguments]:
    """Reads all chunks of a prompt but the last; returns their hidden states and the arguments of the last."""
    assert cache.chunk is not None
    if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
        raise ValueError(
            "kvopt.Cache: no output_hidden_states or output_attentions while the prompt is read in chunks"
        )
    batch = (kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]).shape[0]
    valid = cache.begin_prompt(batch, new, kwargs.get("attention_mask"), device)
    hidden: list[torch.Tensor] = []
    end = new % cache.chunk or cache.chunk
    start = 0
    while True:
        part = dict(kwargs, attention_mask=valid[:, start:end])
        for name in _WHOLE:
            if isinstance(part.get(name), torch.Tensor):
                whole = part[name]
                part[name] = whole[:, start:end] if name == "inputs_embeds" else whole[..., start:end]
        if end == new:
            return hidden, part
        output = module(**part, **{_PARTIAL: True})
        hidden.append(output[0])
        start, end = end, end + cache.chunk


def _after(module: Any, args: tuple[Any, ...], kwargs: Arguments, output: Any) -> Any:
    from kvopt.cache.cache import Cache

    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache) or cache.step is None or cache.step.reading:
        return None
    hidden, again = cache.step.hidden, cache.step.again
    cache.finish()
    if again is not None:
        read_again(cache, module, *again)
    if not hidden:
        return None
    whole = torch.cat([*hidden, output[0]], dim=1)
    if isinstance(output, tuple):
        return (whole, *output[1:])
    output.last_hidden_state = whole
    return output
