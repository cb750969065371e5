# SPDX-License-Identifier: Apache-2.0
"""The operators on a KV cache, typed. Each calls its compiled kernel, or ``reference_kv`` where none exists.

B rows, H KV heads, Hq query heads (a multiple of H; head h belongs to KV head h // (Hq / H)), D numbers per vector.
What a store holds says :class:`kvopt.reference_kv_segment.Store`; which slot a token goes to,
``csrc/common/kv_store.h``. No call waits for the device, none allocates anything that grows with the square of a
length, none has a gradient. Tensors are made contiguous where they are not; a store's must be. What does not fit raises
RuntimeError with its name.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kvopt import _library, reference_kv, reference_kv_pair
from kvopt.reference_kv_segment import Store


def _arguments(store: Store) -> tuple[Any, ...]:
    return (
        *(store.segments, store.lengths, store.positions, store.scores, store.plain_keys, store.plain_values),
        *(store.packed_keys, store.packed_values, store.key_scale, store.value_scale, store.factors),
        *(store.codec, store.group),
    )


def _has_kernel(x: Tensor) -> bool:
    device = x.device.type
    if device in _library.compiled:
        return True
    _library.announce_fallback(device)
    return False


def _below_autograd() -> AbstractContextManager[Any]:
    """Nothing here has a gradient, and the autograd layer takes longer than a small operator."""
    return torch.no_grad() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()


def kv_select_scores(
    query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor, scale: float, maximum: bool
) -> Tensor:
    """How much attention each key gets: the column sums (or maxima) of the exact causal softmax, in float32.

    H2O's scores (arXiv:2306.14048, section 4) with all queries, SnapKV's (arXiv:2404.14469, section 4) with the last.

    Args:
        query: (B, Hq, q, D) float32, float16, bfloat16 or (CPU) float64.
        key: (B, H, n, D), likewise.
        query_positions: (B, q) int32, -1 for padding.
        key_positions: (B, 1 or H, n) int32, -1 for a key that is not there.
        scale: of the logits.
        maximum: the largest weight instead of the sum, over queries and the query heads of a KV head.

    Returns:
        (B, H, n) float32: a query sees the keys with 0 ≤ key position ≤ its own; a query that sees none contributes
        nothing, a key that none sees gets 0. Sums to queries x query heads per KV head. O(n) memory.
    """
    if _has_kernel(key):
        with _below_autograd():
            scores: Tensor = torch.ops.kvopt.kv_select_scores(
                query.contiguous(), key.contiguous(), query_positions, key_positions, scale, maximum
            )
        return scores
    with torch.no_grad():
        return reference_kv.kv_select_scores(query, key, query_positions, key_positions, scale, maximum)


def kv_quant_pack(
    store: Store,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    token_scores: Tensor | None,
    chosen: Tensor,
    counts: Tensor,
) -> None:
    """Fills a fresh store with chosen tokens; whatever it held is forgotten.

    Segment (b, h) takes candidates chosen[b, h, : counts[b, h]], the older ones packed, as many as its plain part has
    no room for (whole groups), the rest plain. With factors, vectors are packed as direction and norm.

    Args:
        store: written.
        keys: (B, H, n, D) in the store's type.
        values: likewise.
        key_positions: (B, 1 or H, n) int32.
        token_scores: (B, H, n) float32; None writes 0.
        chosen: (B, 1 or H, m) int32, in the order of positions; each in [0, n) as far as counts say.
        counts: (B, H) int32; more than m or the segment's capacity counts as that.
    """
    if _has_kernel(keys):
        with _below_autograd():
            torch.ops.kvopt.kv_quant_pack(
                *_arguments(store),
                *(keys.contiguous(), values.contiguous(), key_positions, token_scores, chosen, counts),
            )
        return
    with torch.no_grad():
        reference_kv.kv_quant_pack(store, keys, values, key_positions, token_scores, chosen, counts)


def kv_quant_unpack(store: Store, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the segments hold, by index in the segment: filled packed slots first, then plain ones.

    Args:
        store: read.
        slots: of the results.

    Returns:
        keys and values (B, H, slots, D) in the store's type, positions (B, H, slots) int32; zeros and -1 beyond the
        filled slots.
    """
    if _has_kernel(store.positions):
        with _below_autograd():
            keys, values, positions = torch.ops.kvopt.kv_quant_unpack(*_arguments(store), slots)
        return keys, values, positions
    with torch.no_grad():
        return reference_kv.kv_quant_unpack(store, slots)


def kv_evict_append(
    store: Store,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    token_score: Tensor | None = None,
    new_score: float = 0.0,
    victim: Tensor | None = None,
    order: int = reference_kv.OLDEST,
    first: int = 0,
    recent: int = 0,
    shared: bool = False,
    age: bool = False,
) -> None:
    """Puts one token into each segment; a full one packs its oldest plain tokens or evicts one.

    Plain slots fill first; then G of the oldest plain tokens are packed at once, as long as there is room; then a
    victim leaves, and if it was packed, the oldest plain token is packed into its slot. Tokens take their positions and
    scores along. A segment without any slot drops the token.

    Args:
        store: written.
        key: (B, H, D) in the store's type.
        value: likewise.
        position: (B, 1 or H) int32; -1: nothing happens in this row, or this head of it.
        token_score: (B, H) float32; None: ``new_score``.
        new_score: the new token's score.
        victim: (B, 1 or H) int32, used where a segment is full: the index in it (filled packed slots first) as the
            segment is at this call; -1 or None: the lowest priority goes. Packing moves plain tokens, so of several
            victims computed at once, replace the plain ones first.
        order: 0: the oldest goes. 1: the lowest score, ties: the oldest.
        first: positions below it are protected,
        recent: and so are those above position - recent. If that leaves none, ``first`` alone protects, then nothing.
            -1: the newer half of a segment's capacity c, c - c // 2.
        shared: priorities are summed over the row's heads, which all evict the same index; ``position`` and ``victim``
            are (B, 1) and the heads' segments alike.
        age: a score counts per step since its token's position.
    """
    if _has_kernel(key):
        with _below_autograd():
            torch.ops.kvopt.kv_evict_append(
                *_arguments(store),
                *(key.contiguous(), value.contiguous(), position, token_score, new_score, victim),
                *(order, first, recent, shared, age),
            )
        return
    with torch.no_grad():
        reference_kv.kv_evict_append(
            *(store, key, value, position, token_score, new_score, victim, order, first, recent, shared, age)
        )


def kv_attention_decode(
    query: Tensor,
    store: Store,
    scale: float,
    update: int = reference_kv.KEEP_SCORES,
    first: int = 0,
    gap: Tensor | None = None,
    frequencies: Tensor | None = None,
) -> Tensor:
    """Attention of one query per head over all filled slots of its KV head, straight from the packed codes.

    Args:
        query: (B, Hq, D) in the store's type.
        store: read; scores are written unless ``update`` is 0.
        scale: of the logits.
        update: what the weights, summed over the query heads of a KV head, do to the slots' scores: 0 nothing, 1 they
            are added, 2 they replace them; 3 the score becomes the larger of itself and the largest weight.
        first: slots with a smaller position see the query turned back by gap * frequencies (needs both): StreamingLLM's
            positions inside the cache (arXiv:2309.17453, section 3.2) without touching a key.
        gap: (B,) int32.
        frequencies: (R / 2,) float32 of the rotary pairs (i, i + R / 2), R ≤ D.

    Returns:
        (B, Hq, D) in the query's type; zeros where nothing is filled. The same bits in every run.
    """
    if _has_kernel(query):
        with _below_autograd():
            out: Tensor = torch.ops.kvopt.kv_attention_decode(
                query.contiguous(), *_arguments(store), scale, update, first, gap, frequencies
            )
        return out
    with torch.no_grad():
        return reference_kv.kv_attention_decode(query, store, scale, update, first, gap, frequencies)


def kv_merge_pair(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MiniCache's merge of two layers' vectors (arXiv:2405.14366, section 3): one direction, two magnitudes.

    Args:
        a: (B, H, n, D) float32, float16, bfloat16 or (CPU) float64.
        b: likewise.
        t: where on the arc from a to b, 0 to 1; the paper's 0.6.

    Returns:
        direction (B, H, n, D) of unit length in the type of ``a``; norm of a, norm of b, and the angle between them by
        pi, (B, H, n) float32. Where the sine of the angle is below 1e-4 the chord is normalised instead; a zero
        vector leaves the other's direction, with angle 0.
    """
    if _has_kernel(a):
        with _below_autograd():
            direction, norm_a, norm_b, distance = torch.ops.kvopt.kv_merge_pair(
                a.contiguous(), b.contiguous(), t
            )
        return direction, norm_a, norm_b, distance
    with torch.no_grad():
        return reference_kv.kv_merge_pair(a, b, t)


_SHARED = ("segments", "packed_keys", "packed_values", "key_scale", "value_scale")


def kv_merge_evict(
    lower: Store,
    upper: Store,
    position: Tensor,
    victim: Tensor | None = None,
    order: int = reference_kv.OLDEST,
    first: int = 0,
    recent: int = 0,
    shared: bool = False,
    age: bool = False,
    residual: int = 1,
    t: float = 0.6,
) -> None:
    """Makes room for one token in two layers that share what they pack: MiniCache (arXiv:2405.14366, section 3).

    Both hold the same tokens in the same slots. A segment whose plain part has room stays as it is. A full plain part
    has G tokens merged (one direction, two norms) and packed, those whose keys differ least, as long as there is room;
    then a victim leaves both layers. So the plain part keeps the newest tokens and the least alike ones.

    Args:
        lower: the first layer, written; with factors, and in a segment with packed slots at least max(1, G) plain ones.
        upper: the second, likewise; its segments and packed tensors (all but factors) are the first one's.
        position: (B, 1 or H) int32 of the token that room is made for; -1: nothing happens in this row, or this head.
        victim: as in :func:`kv_evict_append`.
        order: likewise; a token's score is the sum of both layers'.
        first: likewise,
        recent: and this,
        shared: and this. Heads that merged different tokens hold them in different slots: they need victims instead.
        age: as in :func:`kv_evict_append`.
        residual: tokens that stay plain because they are the newest, the one to come and those it is merged with
            included: all but the newest residual - G may be merged.
        t: where on the arc between the layers' vectors the common direction lies, 0 to 1; the paper's 0.6.
    """
    for name in _SHARED:
        if getattr(upper, name) is not getattr(lower, name):
            raise RuntimeError(f"kv_merge_evict: upper: {name} must be the lower store's own")
    if (upper.codec, upper.group) != (lower.codec, lower.group):
        raise RuntimeError("kv_merge_evict: upper: codec and group must be the lower store's")
    if _has_kernel(lower.positions):
        with _below_autograd():
            torch.ops.kvopt.kv_merge_evict(
                *_arguments(lower),
                *(upper.lengths, upper.positions, upper.scores, upper.plain_keys, upper.plain_values),
                *(upper.factors, position, victim, order, first, recent, shared, age, residual, t),
            )
        return
    with torch.no_grad():
        reference_kv_pair.kv_merge_evict(
            *(lower, upper, position, victim, order, first, recent, shared, age, residual, t)
        )
