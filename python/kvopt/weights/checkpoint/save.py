# SPDX-License-Identifier: Apache-2.0
"""Writing a quantised model as a folder in Hugging Face format."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvopt.weights.checkpoint.codec import Codec, Config, Modules, matches_any
from kvopt.weights.checkpoint.folder import write_folder
from kvopt.weights.checkpoint.formats import codec_named
from kvopt.weights.linear import QuantLinear

SHARD_BYTES = 5 * 10**9


def save_quantized(
    model: Any,
    folder: str | Path,
    format: str = "kvopt",
    tokenizer: Any = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a quantised model: safetensors, ``config.json``, generation settings, and the tokenizer if given.

    The folder appears when everything in it is written. At most one shard is held in memory besides the model.

    Args:
        model: a Hugging Face model with at least one quantised linear.
        folder: absent or empty.
        format: ``"kvopt"``, which holds everything bit for bit; or what others read: ``"gptq"``, ``"awq"``,
            ``"compressed-tensors"``, ``"bnb"``. Codes and scales are the same in each.
        tokenizer: of the model.
        shard_bytes: size of a safetensors file at most.

    Raises:
        ValueError: nothing is quantised, no such format, or the format can't hold one of the weights (the message names
            it and says why). Nothing is written then.
        FileExistsError: the folder is not empty.
    """
    codec = codec_named(format)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a Hugging Face model, got {type(model).__name__}")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    if not modules:
        raise ValueError("model: nothing is quantised; kvopt.quantize(model, …) first")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: must be positive, got {shard_bytes}")
    config = codec.config(model, modules)

    def finish(target: Path) -> None:
        described: Any = copy.deepcopy(model.config)
        described.quantization_config = config
        described.architectures = [type(model).__name__]
        described.dtype = model.dtype
        described.save_pretrained(target)
        if model.can_generate():
            model.generation_config.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)

    write_folder(Path(folder), _tensors(model, modules, codec, config), shard_bytes, finish)


def _tensors(
    model: PreTrainedModel, modules: Modules, codec: Codec, config: Config
) -> Iterator[tuple[str, Tensor]]:
    yield from _rest(model, modules).items()
    for name, module in modules.items():
        for suffix, tensor in codec.tensors(module, config).items():
            yield f"{name}.{suffix}", tensor
        if module.bias is not None:
            yield f"{name}.bias", module.bias


def _rest(model: PreTrainedModel, modules: Modules) -> dict[str, Tensor]:
    """What is not quantised, each tensor once, by the names that transformers reads."""
    from transformers.core_model_loading import revert_weight_conversion

    seen: set[int] = set()
    rest: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if prefix in modules:
            continue
        for name, tensor in _own_tensors(module):
            key = f"{prefix}.{name}" if prefix else name
            if id(tensor) not in seen and not matches_any(key, model._keys_to_ignore_on_save):
                seen.add(id(tensor))
                rest[key] = tensor.detach()
    return dict(revert_weight_conversion(model, rest))  # type: ignore[no-untyped-call, unused-ignore]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer
