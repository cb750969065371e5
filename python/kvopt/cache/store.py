# SPDX-License-Identifier: Apache-2.0
"""The memory of one layer: flat tensors, in which every (row, KV head) owns a segment of exactly its capacity.

``csrc/common/kv_store.h`` says what lies where. Nothing here is padded and nothing is masked: the lengths live on the
device, and the operators of :mod:`kvopt.ops_kv` read only what is filled::

    row b   | packed: head 0 ....|head 1 ..| plain: head 0 ..|head 1 .....|
              codes and scales              the model's type
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kvopt import ops_kv
from kvopt.cache.codecs import Codec
from kvopt.cache.merge import Merge
from kvopt.reference_kv_codes import FP8, MODEL, packed_bytes

SHARED = ("segments", "packed_keys", "packed_values", "key_scale", "value_scale")
"""The tensors that the stores of two merged layers have in common."""


@dataclass(frozen=True)
class Shape:
    """What a store's tensors are made for.

    Attributes:
        rows, heads, dim: B, H, D.
        dtype: of the model's keys and values.
        codec: what the packed part holds.
        scored: whether a score is kept per token.
        merge: how the layer is merged with another one; a packed vector then has a magnitude of its own.
    """

    rows: int
    heads: int
    dim: int
    dtype: torch.dtype
    codec: Codec
    scored: bool
    merge: Merge | None = None

    @property
    def packs(self) -> bool:
        """Whether what is packed stays as it is, so that tokens must be added one by one."""
        return self.codec.packs or self.merge is not None

    def tensors(self, packed: int, plain: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor for ``packed`` and ``plain`` slots per row, Q and P."""
        b, h, d, q, p = self.rows, self.heads, self.dim, packed, plain
        group, number = self.codec.group, self.codec.number
        width = packed_bytes(number, self.dtype, d)
        key_scale: tuple[int, ...] = (0,)
        value_scale: tuple[int, ...] = (0,)
        if number == FP8:
            key_scale = value_scale = (b, q)
        elif number != MODEL:
            key_scale, value_scale = (b, q // group, 2, d), (b, q, -(-d // group), 2)
        return {
            "segments": ((b, h, 4), torch.int32),
            "lengths": ((b, h, 2), torch.int32),
            "positions": ((b, q + p), torch.int32),
            "scores": ((b, q + p) if self.scored else (0,), torch.float32),
            "plain_keys": ((b, p, d), self.dtype),
            "plain_values": ((b, p, d), self.dtype),
            "packed_keys": ((b, q, width), torch.uint8),
            "packed_values": ((b, q, width), torch.uint8),
            "key_scale": (key_scale, torch.float16),
            "value_scale": (value_scale, torch.float16),
            "factors": ((b, q, 2) if self.merge is not None else (0,), torch.float32),
        }

    def nbytes(self, packed: int, plain: int, *, own: bool = False) -> int:
        """Bytes of all tensors for ``packed`` and ``plain`` slots per row; ``own``: but for those of a merged layer."""
        total = 0
        for name, (shape, dtype) in self.tensors(packed, plain).items():
            if not (own and name in SHARED):
                total += dtype.itemsize * torch.Size(shape).numel()
        return total


@dataclass
class Store:
    """One layer's tokens; the tensors are those of :class:`kvopt.reference_kv.Store`.

    Attributes:
        codec, group: as the operators know them.
        shape: what the tensors were made for.
        widest: at least as many tokens as any segment can hold.
    """

    segments: Tensor
    lengths: Tensor
    positions: Tensor
    scores: Tensor
    plain_keys: Tensor
    plain_values: Tensor
    packed_keys: Tensor
    packed_values: Tensor
    key_scale: Tensor
    value_scale: Tensor
    factors: Tensor
    codec: int
    group: int
    shape: Shape
    widest: int

    @classmethod
    def allocate(
        cls, shape: Shape, capacities: Tensor, device: torch.device, lower: Store | None = None
    ) -> Store:
        """An empty store.

        Args:
            shape: of the tensors.
            capacities: (B, H) integers on the CPU, tokens that each segment may hold.
            device: of the tensors.
            lower: of the same capacities, whose ``SHARED`` tensors are used.
        """
        segments, packed, plain = lay_out(capacities, shape.codec, shape.merge)
        # Written in place later, perhaps outside the caller's inference mode. Zeros: what is saved shall be defined.
        with torch.inference_mode(False):
            tensors = {
                name: torch.zeros(size, dtype=dtype, device=device)
                for name, (size, dtype) in shape.tensors(packed, plain).items()
                if lower is None or name not in SHARED
            }
            tensors |= {"segments": segments.to(device)} if lower is None else lower.shared()
        return cls(
            **tensors,
            codec=shape.codec.number,
            group=shape.codec.group,
            shape=shape,
            widest=int(capacities.max()) if capacities.numel() else 0,
        )

    @property
    def packed_slots(self) -> int:
        """Q."""
        return self.packed_keys.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:11]}

    def shared(self) -> dict[str, Tensor]:
        """The tensors that a merged layer has in common with this one, by name."""
        return {name: getattr(self, name) for name in SHARED}

    def capacities(self) -> Tensor:
        """(B, H) int32, tokens that each segment may hold."""
        return self.segments[..., 1] + self.segments[..., 3]

    def index(self, n: int) -> tuple[Tensor, Tensor]:
        """Where the tokens with index 0 … n - 1 of each segment lie, packed ones first.

        Returns:
            (B, H, n) int64 indices into ``positions`` and ``scores``, 0 where there is no token, and (B, H, n) bool.
        """
        place = torch.arange(n, dtype=torch.int32, device=self.positions.device)
        packed, plain = self.lengths[..., :1], self.lengths[..., 1:]
        slot = torch.where(
            place < packed,
            place + self.segments[..., :1],
            place - packed + self.segments[..., 2:3] + self.packed_slots,
        )
        filled = place < packed + plain
        return torch.where(filled, slot, 0).long(), filled

    def gather(self, per_slot: Tensor, n: int, empty: float) -> Tensor:
        """(B, Q + P) to (B, H, n) by index in the segment, ``empty`` where there is no token."""
        slot, filled = self.index(n)
        rows, heads, _ = slot.shape
        return per_slot.gather(1, slot.flatten(1)).view(rows, heads, n).masked_fill(~filled, empty)

    def scatter(self, per_token: Tensor) -> Tensor:
        """The inverse of :meth:`gather`: (B, H, n) float32 to (B, Q + P), 0 elsewhere."""
        slot, filled = self.index(per_token.shape[2])
        end = self.positions.shape[1]
        flat = per_token.new_zeros(per_token.shape[0], end + 1)
        flat.scatter_(1, torch.where(filled, slot, end).flatten(1), per_token.flatten(1))
        return flat[:, :end].contiguous()

    def read(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is kept, in the order of positions, empty ones (-1, zeros) first.

        Args:
            n: tokens per segment, at least as many as any holds.

        Returns:
            Keys and values (B, H, n, D) in the model's type, positions (B, H, n) int32, and (B, H, n) int64, the index
            in its segment of each.
        """
        keys, values, positions = ops_kv.kv_quant_unpack(self, n)
        ordered, order = positions.sort(dim=-1, stable=True)
        at = order[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, at), values.gather(2, at), ordered, order

    def read_slots(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, n, D) by index in the segment."""
        keys, values, _ = ops_kv.kv_quant_unpack(self, n)
        return keys, values

    def select_rows(self, rows: Tensor, lower: Store | None = None) -> Store:
        """``rows`` (int64) of the batch, in that order; ``lower`` is the merged layer's store, selected already."""
        with torch.inference_mode(False):
            chosen = {
                name: tensor.index_select(0, rows) if tensor.dim() > 1 else tensor
                for name, tensor in self.tensors().items()
                if lower is None or name not in SHARED
            }
        chosen |= {} if lower is None else lower.shared()
        return self._replaced(chosen, replace(self.shape, rows=rows.shape[0]), self.widest)

    def grow(self, blocks: int) -> Store:
        """The same tokens with ``blocks`` more blocks of slots in each segment, behind the filled ones."""
        heads, block = self.shape.heads, self.shape.codec.block * blocks
        part = 0 if self.shape.codec.packs else 1
        slots = [self.packed_slots, self.plain_keys.shape[1]]
        with torch.inference_mode(False):
            segments = self.segments.clone()
            count = torch.arange(heads, dtype=torch.int32, device=segments.device)
            segments[..., 2 * part] += count * block
            segments[..., 2 * part + 1] += block
        slots[part] += heads * block
        return self._moved(segments, slots, (part,), self.widest + block, {})

    def grow_to(self, capacities: Tensor, lower: Store | None = None) -> Store:
        """The same tokens in segments for ``capacities`` (B, H) tokens, on the CPU: none smaller than it is.

        ``lower`` is the store, grown already, of the layer that this one is merged with. Both parts of a merged segment
        grow, so that k per cent of it stay unmerged.
        """
        segments, *slots = lay_out(capacities, self.shape.codec, self.shape.merge)
        shared = {} if lower is None else lower.shared()
        with torch.inference_mode(False):
            segments = shared.get("segments", segments.to(self.segments.device, copy=True))
        return self._moved(segments, slots, (0, 1), int(capacities.max()), shared)

    def _moved(
        self,
        segments: Tensor,
        slots: Sequence[int],
        parts: Sequence[int],
        widest: int,
        shared: dict[str, Tensor],
    ) -> Store:
        """The same tokens in other ``segments``.

        Args:
            segments: (B, H, 4); where they lie.
            slots: per row, of either part.
            parts: which of the two change.
            widest: bound of the capacities.
            shared: tensors that are there already.
        """
        with torch.inference_mode(False):
            sizes = self.shape.tensors(*slots)
            sources = [
                _source(self.segments, segments, 2 * part, slots[part]) if part in parts else None
                for part in (0, 1)
            ]
            tensors: dict[str, Tensor] = {"segments": segments, "lengths": self.lengths.clone()}
            for name in ("positions", "scores"):
                tensors[name] = self._grown_slots(getattr(self, name), sources)
            names = (
                ("packed_keys", "packed_values", "value_scale", "factors"),
                ("plain_keys", "plain_values"),
            )
            for part, source in enumerate(sources):
                if source is None:
                    continue
                for name in set(names[part]) - set(shared):
                    tensors[name] = _spread(getattr(self, name), source, sizes[name][0])
            if sources[0] is not None and not shared:
                by_group = sources[0][:, :: self.group] // self.group
                tensors["key_scale"] = _spread(self.key_scale, by_group, sizes["key_scale"][0])
        return self._replaced(tensors | shared, self.shape, widest)

    def _replaced(self, tensors: dict[str, Tensor], shape: Shape, widest: int) -> Store:
        every = {**self.tensors(), **tensors}
        return Store(**every, codec=self.codec, group=self.group, shape=shape, widest=widest)

    def reaches(self, counts: Tensor) -> bool:
        """Whether :meth:`cut` can take back all tokens at positions ≥ ``counts`` (B,): none of them is packed."""
        positions = self.gather(self.positions, self.widest, -1)
        place = torch.arange(self.widest, dtype=torch.int32, device=positions.device)
        packed = place < self.lengths[..., :1]
        return not bool((packed & (positions >= counts[:, None, None])).any())

    def cut(self, counts: Tensor) -> None:
        """Takes back all tokens at positions ≥ ``counts`` (B,) int32; those of the plain part then lie in order."""
        n = int(self.segments[..., 3].max())
        place = torch.arange(n, dtype=torch.int32, device=self.segments.device)
        slot = place + self.segments[..., 2:3]
        filled = place < self.lengths[..., 1:]
        at = torch.where(filled, slot, 0).long().flatten(1)
        positions = self.positions[:, self.packed_slots :].gather(1, at).view(slot.shape)
        stays = filled & (positions < counts[:, None, None])
        order = positions.masked_fill(~stays, torch.iinfo(torch.int32).max).argsort(dim=-1, stable=True)
        source = slot.gather(2, order).clamp(max=self.plain_keys.shape[1] - 1).long().flatten(1)
        kept = place < stays.sum(-1, keepdim=True)
        with torch.inference_mode(False):
            for name in ("positions", "scores", "plain_keys", "plain_values"):
                tensor = getattr(self, name)
                if not tensor.numel():
                    continue
                part = tensor[:, self.packed_slots :] if name in ("positions", "scores") else tensor
                wide = [1] * (part.dim() - 2)
                moved = part.gather(1, source.view(*source.shape, *wide).expand(-1, -1, *part.shape[2:]))
                end = torch.where(kept, slot, part.shape[1]).long().flatten(1)
                room = torch.cat([part, part[:, :1]], dim=1)
                room.scatter_(1, end.view(*end.shape, *wide).expand(-1, -1, *part.shape[2:]), moved)
                part.copy_(room[:, : part.shape[1]])
            self.lengths[..., 1] = stays.sum(-1, dtype=torch.int32)

    def _grown_slots(self, per_slot: Tensor, sources: Sequence[Tensor | None]) -> Tensor:
        """Positions or scores of both parts, each by its source; None leaves a part as it is."""
        if per_slot.dim() == 1:  # no scores are kept
            return per_slot
        parts = (per_slot[:, : self.packed_slots], per_slot[:, self.packed_slots :])
        return torch.cat(
            [
                part if source is None else _spread(part, source, tuple(source.shape))
                for part, source in zip(parts, sources, strict=True)
            ],
            dim=1,
        )


def lay_out(capacities: Tensor, codec: Codec, merge: Merge | None = None) -> tuple[Tensor, int, int]:
    """(B, H) integers on the CPU to segments (B, H, 4) int32 and the slots per row of either part."""
    capacities = capacities.to(torch.int64)
    packed = torch.zeros_like(capacities)
    if merge is not None:
        packed = merge.packed(capacities, codec)
    elif codec.packs:
        packed = (capacities - codec.residual).clamp(min=0) // codec.group * codec.group
    plain = capacities - packed
    segments = torch.stack([packed.cumsum(1) - packed, packed, plain.cumsum(1) - plain, plain], dim=-1)
    most = [int(part.sum(1).max()) if part.numel() else 0 for part in (packed, plain)]
    return segments.int(), most[0], most[1]


def largest_parts(
    budgets: Sequence[int], heads: int, codec: Codec, *, uneven: bool, merge: Merge | None = None
) -> tuple[int, int]:
    """Packed and plain slots per row, Q and P, of a layer whose rows keep ``budgets`` tokens per KV head.

    ``uneven``: the heads of a row may share ``heads * budget`` tokens in any way; what :func:`lay_out` then needs is no
    more than this.
    """
    if not uneven:
        _, packed, plain = lay_out(torch.tensor(budgets)[:, None].expand(-1, heads), codec, merge)
        return packed, plain
    tokens = heads * max(budgets)
    if merge is not None:
        plain = merge.most_plain(tokens, heads, codec)
    elif codec.packs:
        plain = min(tokens, heads * (codec.residual + codec.group - 1))
    else:
        return 0, tokens
    # One row's two parts add up to its tokens; of several rows, one may have the larger packed part, one the plain.
    return (tokens if len(budgets) > 1 else tokens - plain) // codec.group * codec.group, plain


def _source(old: Tensor, new: Tensor, part: int, slots: int) -> Tensor:
    """(B, slots) int64: which old slot of a row each new one continues; any old one where there is none."""
    ends = (new[..., part] + new[..., part + 1]).contiguous()
    slot = torch.arange(slots, dtype=torch.int32, device=new.device).expand(new.shape[0], slots)
    head = torch.searchsorted(ends, slot.contiguous(), right=True).clamp(max=new.shape[1] - 1)
    shift = (old[..., part] - new[..., part]).gather(1, head)
    last = (old[..., part] + old[..., part + 1]).amax(1, keepdim=True) - 1
    return torch.minimum(slot + shift, last).clamp(min=0).long()


def _spread(old: Tensor, source: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, slots, …) to ``size`` by ``source`` (B, new slots)."""
    if not old.numel():
        return old.new_zeros(size)
    return old.gather(1, source.view(*source.shape, *[1] * (old.dim() - 2)).expand(-1, -1, *old.shape[2:]))
