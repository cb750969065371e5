# SPDX-License-Identifier: Apache-2.0
"""A cache on disk: one safetensors file with what is kept, as it is kept, and the spec and model shape it belongs to.

Nothing is requantised, so a loaded cache continues bit for bit. Nothing in a file is believed: what the operators rely
on (segments that do not overlap, lengths within them, positions that occur once) is checked before a cache is made.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import PreTrainedModel

from kvopt.cache.budgets import TokenBudget
from kvopt.cache.policies import Full
from kvopt.cache.spec import CacheSpec
from kvopt.cache.step import Rows
from kvopt.cache.store import SHARED, Shape, Store, lay_out
from kvopt.files import write_whole

if TYPE_CHECKING:
    from kvopt.cache.architecture import Architecture
    from kvopt.cache.cache import Cache
    from kvopt.cache.layer import Layer

_VERSION = 1
_LARGEST = 2**30  # of a position, so that the next ones are int32 as well
_SHARED_ONCE = frozenset(SHARED)  # of two merged layers, written with the lower one


def save(cache: Cache, path: str | os.PathLike[str]) -> None:
    """As :meth:`kvopt.Cache.save` says."""
    if cache.step is not None:
        raise RuntimeError("kvopt.Cache.save: a forward did not reach its end; call cache.reset()")
    if not cache.columns:
        raise ValueError("kvopt.Cache.save: it is empty, no forward has used it yet")
    _tighten(cache)
    tensors = {"count": cache.rows.count}
    if cache.rows.budget is not None:
        tensors["budget"] = cache.rows.budget
    for index, layer in enumerate(cache.layers):
        known = _SHARED_ONCE if _lower(layer) is not None else ()
        tensors |= {
            f"{index}.{name}": tensor for name, tensor in layer.store.tensors().items() if name not in known
        }
        if layer.limit is not None:
            tensors[f"{index}.limit"] = layer.limit
    header = {
        "version": _VERSION,
        "spec": str(cache.spec),
        "model": _model(cache.architecture),
        "columns": cache.columns,
        "chunk": cache.chunk,
    }
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(Path(path), to_bytes(plain, {"kvopt.cache": json.dumps(header)}))


def load(kind: type[Cache], path: str | os.PathLike[str], model: PreTrainedModel) -> Cache:
    """As :meth:`kvopt.Cache.load` says."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"kvopt.Cache.load: there is no file {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            header = _header((opened.metadata() or {}).get("kvopt.cache"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return _rebuild(kind, model, header, tensors)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"kvopt.Cache.load: {file}: {error}") from error


def _model(architecture: Architecture) -> dict[str, Any]:
    return {
        "type": architecture.model_type,
        "layers": architecture.layers,
        "kv_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "dtype": str(architecture.dtype).removeprefix("torch."),
    }


def _header(text: str | None) -> dict[str, Any]:
    try:
        header = json.loads(text or "")
    except (json.JSONDecodeError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError("not written by kvopt.Cache.save")
    if header.get("version") != _VERSION:
        raise ValueError(f"version {header.get('version')!r}, this kvopt reads {_VERSION}")
    chunk = header.get("chunk")
    if not (
        isinstance(header.get("spec"), str)
        and isinstance(header.get("model"), dict)
        and _is_count(header.get("columns"), 1)
        and (chunk is None or _is_count(chunk, 1))
    ):
        raise ValueError("its header is damaged")
    return header


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _tighten(cache: Cache) -> None:
    """Makes the bounds that the host knows exact, so that a loaded cache has the same ones."""
    rows = cache.rows
    rows.fewest, rows.most = _range(rows.count)
    if rows.budget is not None:
        rows.least, rows.largest = _range(rows.budget)
    for layer in cache.layers:
        store = layer.store
        capacities = store.capacities()
        store.widest = int(capacities.max())
        if layer.limit is not None:
            layer.narrowest, layer.widest = _range(layer.limit)
        layer.room = int((capacities - store.lengths.sum(-1)).min()) if cache.spec.policy.grows else 0
    for pair in cache.pairs:
        pair.recount()


def _rebuild(
    kind: type[Cache], model: PreTrainedModel, header: dict[str, Any], tensors: dict[str, Tensor]
) -> Cache:
    cache = kind(model, CacheSpec.parse(header["spec"]), header["chunk"] or "full")
    arch = cache.architecture
    if header["model"] != _model(arch):
        raise ValueError(f"it is of the model {header['model']}, this one is {_model(arch)}")
    device = arch.base.device
    rows = _read_rows(cache.spec, header, tensors)
    cache.columns = header["columns"]
    for index, layer in enumerate(cache.layers):
        prefix = f"{index}."
        own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        _read_layer(
            cache,
            layer,
            rows,
            {name.removeprefix(prefix): tensor for name, tensor in own.items()},
            f"layer {index}",
        )
    if tensors:
        raise ValueError(f"unknown tensors {', '.join(sorted(tensors)[:5])}")
    _check(_shares_are_exact(cache, rows), "the layers' limits do not add up to the budget")
    rows.count = rows.count.to(device)
    rows.budget = None if rows.budget is None else rows.budget.to(device)
    cache.rows = rows
    _tighten(cache)
    return cache


def _read_rows(spec: CacheSpec, header: dict[str, Any], tensors: dict[str, Tensor]) -> Rows:
    count = _take(tensors, "count", None, torch.int32)
    _check(count.dim() == 1 and count.numel() > 0, "'count' is no list of rows")
    rows = Rows(count.shape[0], torch.device("cpu"))
    rows.count = count
    low, high = _range(count)
    _check(low > 0 and high <= header["columns"], "'count' is out of range")
    if spec.budget is not None:
        rows.budget = _take(tensors, "budget", (count.shape[0],), torch.int32)
        low, high = _range(rows.budget)
        _check(spec.minimum <= low and high <= _LARGEST, "'budget' is out of range")
        if isinstance(spec.budget, TokenBudget):
            _check(low == high == spec.budget.tokens, f"'budget' is not that of {spec}")
    return rows


def _read_layer(cache: Cache, layer: Layer, rows: Rows, tensors: dict[str, Tensor], where: str) -> None:
    arch, spec = cache.architecture, cache.spec
    batch, heads = rows.count.shape[0], arch.kv_heads
    merge = None if layer.merged is None else layer.merged.merge
    shape = Shape(batch, heads, arch.head_dim, arch.dtype, spec.codec, cache.scored, merge)
    below = _lower(layer)
    if below is not None:
        twice = sorted(_SHARED_ONCE & set(tensors))
        _check(not twice, f"{where}: {', '.join(twice)} belong to the layer below, which it is merged with")
        tensors |= {name: tensor.cpu() for name, tensor in below.shared().items()}
    slots = []
    for name in ("packed_keys", "plain_keys"):
        tensor = tensors.get(name)
        _check(tensor is not None and tensor.dim() == 3, f"{where}: no tensor {name!r} of three dimensions")
        assert tensor is not None
        slots.append(tensor.shape[1])
    _check(slots[0] % spec.codec.group == 0, f"{where}: 'packed_keys' of {slots[0]} slots is no whole groups")
    own = {
        name: _take(tensors, name, size, dtype, where)
        for name, (size, dtype) in shape.tensors(*slots).items()
    }
    limit = None if rows.budget is None else _take(tensors, "limit", (batch, heads), torch.int32, where)
    _check(not tensors, f"{where}: unknown tensors {', '.join(sorted(tensors)[:5])}")
    store = Store(**own, codec=spec.codec.number, group=spec.codec.group, shape=shape, widest=sum(slots))
    _check_segments(store, where)
    _check_counts(cache.spec, store, rows, limit, where)
    _check_content(store, rows, alike=layer.alike, where=where)
    if below is not None:
        _check_pair(below, store, cache.layers[layer.index - 1].limit, limit, where)
    device = arch.base.device
    with torch.inference_mode(False):
        for name, tensor in store.tensors().items():
            shared = below is not None and name in _SHARED_ONCE
            setattr(store, name, getattr(below, name) if shared else tensor.to(device, copy=True))
        layer.limit = None if limit is None else limit.to(device, copy=True)
    layer.store = store


def _lower(layer: Layer) -> Store | None:
    """The store that a merged layer's own shares tensors with; None for any other layer."""
    return None if layer.merged is None else layer.merged.below(layer)


def _check_pair(lower: Store, upper: Store, limit: Tensor | None, own: Tensor | None, where: str) -> None:
    """Two merged layers hold the same tokens in the same slots."""
    n = int(upper.lengths.sum(-1).max())
    same = torch.equal(lower.lengths.cpu(), upper.lengths) and torch.equal(
        lower.gather(lower.positions, n, -1).cpu(), upper.gather(upper.positions, n, -1)
    )
    _check(same, f"{where}: it holds other tokens than the layer below, which it is merged with")
    _check(own is None or torch.equal(own, torch.as_tensor(limit).cpu()), f"{where}: 'limit' is another one")


def _check_segments(store: Store, where: str) -> None:
    segments, lengths, group = store.segments.long(), store.lengths.long(), store.group
    capacity, filled = segments[..., 1::2], lengths
    _check(bool((segments >= 0).all()), f"{where}: 'segments' has negative numbers")
    begins = capacity.cumsum(1) - capacity
    ends = begins[:, -1] + capacity[:, -1]
    fits = (begins == segments[..., 0::2]).all()
    room = torch.tensor([store.packed_slots, store.plain_keys.shape[1]])
    _check(
        bool(fits & (ends <= room).all()), f"{where}: 'segments' do not follow one another within the slots"
    )
    packed, plain = capacity.unbind(-1)
    whole = (packed % group == 0) & ((packed == 0) | (plain >= group) | (group == 1))
    _check(bool(whole.all()), f"{where}: 'segments' has parts of groups")
    _check(bool(((filled >= 0) & (filled <= capacity)).all()), f"{where}: 'lengths' exceed the segments")
    _check(bool((filled[..., 0] % group == 0).all()), f"{where}: 'lengths' has parts of groups")
    if store.shape.merge is not None:
        same = torch.equal(lay_out(capacity.sum(-1), store.shape.codec, store.shape.merge)[0], store.segments)
        _check(same, f"{where}: 'segments' are not those of {store.shape.merge}")


def _check_counts(spec: CacheSpec, store: Store, rows: Rows, limit: Tensor | None, where: str) -> None:
    policy = spec.policy
    kept, seen = store.lengths.long().sum(-1), rows.count.long()[:, None]
    _check(limit is None or int(limit.min()) > 0, f"{where}: 'limit' is out of range")
    if isinstance(policy, Full):
        expected = kept == seen
    elif policy.grows:
        expected = kept <= seen
    else:
        assert limit is not None
        expected = kept == torch.minimum(seen, limit.long())
    _check(bool(expected.all()), f"{where}: 'lengths' are not those of {spec}")
    if limit is not None and not policy.grows:
        same = torch.equal(lay_out(limit, spec.codec, store.shape.merge)[0], store.segments)
        _check(same, f"{where}: 'segments' are not those of 'limit'")


def _check_content(store: Store, rows: Rows, *, alike: bool, where: str) -> None:
    n = int(store.lengths.sum(-1).max())
    keys, values, positions, _ = store.read(n)
    there = positions >= 0
    fresh = torch.ones_like(there)
    fresh[..., 1:] = (positions[..., 1:] != positions[..., :-1]) | ~there[..., 1:]
    known = there.sum(-1) == store.lengths.sum(-1)
    below = (positions < rows.count[:, None, None]).all()
    _check(bool(fresh.all() & known.all() & below), f"{where}: 'positions' repeat or are out of range")
    if alike:
        _check(bool((positions == positions[:, :1]).all()), f"{where}: heads keep different tokens")
    finite = torch.isfinite(keys).all() & torch.isfinite(values).all()
    _check(bool(finite), f"{where}: keys or values are not finite")
    if store.shape.scored:
        scores = store.gather(store.scores, n, 0.0)
        _check(not bool(scores.isnan().any()), f"{where}: 'scores' has NaN")


def _shares_are_exact(cache: Cache, rows: Rows) -> bool:
    if rows.budget is None:
        return True
    total = sum(layer.limit.cpu().long().sum(-1) for layer in cache.layers)
    expected = rows.budget.long() * len(cache.layers) * cache.architecture.kv_heads
    return torch.equal(torch.as_tensor(total), expected)


def _take(
    tensors: dict[str, Tensor], name: str, size: tuple[int, ...] | None, dtype: torch.dtype, where: str = ""
) -> Tensor:
    tensor = tensors.pop(name, None)
    place = f"{where}: " if where else ""
    if tensor is None:
        raise ValueError(f"{place}no tensor {name!r}")
    if tensor.dtype != dtype or (size is not None and tuple(tensor.shape) != size):
        raise ValueError(
            f"{place}{name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {size or '(rows,)'}"
        )
    return tensor


def _range(numbers: Tensor) -> tuple[int, int]:
    return int(numbers.min()), int(numbers.max())


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
