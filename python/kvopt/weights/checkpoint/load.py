# SPDX-License-Identifier: Apache-2.0
"""Reading a quantised model: transformers builds it on the meta device, and each quantised linear is put in packed.

Full precision never exists: a quantised linear is an empty :class:`Slot` while transformers loads the rest, and is then
read, packed and moved to its device, one after the other. ``kvopt.models.hf`` calls :func:`prepare` and :func:`fill`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvopt.weights.checkpoint.codec import Config, matches_any
from kvopt.weights.checkpoint.files import FLOATS, TensorFiles, find_files, read_json
from kvopt.weights.checkpoint.formats import codec_of
from kvopt.weights.checkpoint.own import Own
from kvopt.weights.linear import QuantLinear, TiedEmbedding


def load_quantized(
    folder: str | Path, device: torch.device | str = "auto", dtype: torch.dtype | str = "auto"
) -> Any:
    """Loads a quantised model, ours or another's (GPTQ, AWQ GEMM, compressed-tensors, bitsandbytes 4-bit).

    Every format runs on our kernels. Codes are taken over exactly; scales finer than fp16 are rounded, with a warning.

    Args:
        folder: in Hugging Face format, with safetensors weights and a ``quantization_config`` in its ``config.json``.
        device: ``"auto"`` is the first GPU, else the CPU.
        dtype: of everything that is not quantised, as transformers takes it; ``"auto"`` is the checkpoint's.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: pickled or damaged files, an unknown format, or a tensor that is missing or does not fit the model;
            the message names file and tensor.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from kvopt.models.load import as_device, as_dtype, lower_bfloat16

    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    described = read_json(root / "config.json").get("quantization_config")
    if not isinstance(described, dict):
        raise ValueError(
            f"{root / 'config.json'}: has no quantization_config; kvopt.load reads unquantised models"
        )
    codec_of(described)
    target = as_device(device)
    wanted: Any = as_dtype(dtype)
    with TensorFiles(find_files(root)) as files:
        tensors = len(files)
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
    except Exception as error:  # its validators have exceptions of their own
        raise ValueError(f"{root / 'config.json'}: can't be loaded: {error}") from error
    _check_depth(config, tensors, root)
    try:
        config.quantization_config = {
            "quant_method": Own.method,
            "device": str(target),
            "checkpoint": described,
        }
        model, info = AutoModelForCausalLM.from_pretrained(
            root,
            config=config,
            dtype=wanted,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root}: can't be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{root}: the tensor {missing[0]!r} is missing ({len(missing)} in all)")
    lower_bfloat16(model, wanted, target)
    return model.to(target).eval()


class Slot(nn.Module):
    """Where a quantised linear will be, while the rest of the model is loaded.

    Args:
        shape: (N, K) of its weight.
        biased: whether the model's linear has a bias.
        source: ``"linear"`` or ``"conv1d"``.
    """

    def __init__(self, shape: tuple[int, int], biased: bool, source: str) -> None:
        super().__init__()
        self.shape, self.biased, self.source = shape, biased, source
        self.weight = torch.empty(0)  # for models that initialise a child's weight by name
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]


class _Patterns(set[str]):
    """A set that is also added to lists: transformers had a list of patterns before it had a set."""

    def __add__(self, other: list[str]) -> list[str]:
        return [*self, *other]


def prepare(model: Any, config: Config, checkpoint_files: Sequence[str] | None) -> None:
    """Puts slots in place of the quantised linears of a model on the meta device, before its weights are loaded.

    Raises:
        ValueError: files that are not the checkpoint's, or names and shapes that do not fit the model.
    """
    paths = _checked_paths(model, checkpoint_files)
    with TensorFiles(paths) as files:
        codec = codec_of(config)
        names = codec.modules(files, config)
        for name in names:
            _place(model, name, _slot_of(model, name))
        tied = config.get("tied_embedding") if codec.method == Own.method else None
        if tied is not None:
            _check_tied(model, tied, names)
            _place(model, tied, Slot((0, 0), False, "embedding"))
        gone = {*names, *([tied] if tied else [])}
        model.all_tied_weights_keys = {
            target: source
            for target, source in model.all_tied_weights_keys.items()
            if not {target.rpartition(".")[0], source.rpartition(".")[0]} & gone
        }
        known = _Patterns(model._keys_to_ignore_on_load_unexpected or ())
        if names:
            known.add(rf"^({'|'.join(re.escape(name) for name in names)})\.")
        model._keys_to_ignore_on_load_unexpected = known
        _check_rest(model, files)


def fill(
    model: Any,
    config: Config,
    checkpoint_files: Sequence[str],
    dtype: torch.dtype,
    devices: Mapping[str, Any],
) -> None:
    """Reads the quantised linears, packs them and puts them where :func:`prepare` left slots.

    Args:
        model: otherwise loaded.
        config: the ``quantization_config``.
        checkpoint_files: those given to :func:`prepare`.
        dtype: of biases and of the vectors of a tied embedding.
        devices: of modules, by prefix; transformers' ``device_map``.

    Raises:
        ValueError: a tensor is missing or does not fit; names file and tensor.
    """
    codec = codec_of(config)
    with TensorFiles([Path(file) for file in checkpoint_files]) as files:
        slots = [
            (name, m) for name, m in model.named_modules() if isinstance(m, Slot) and m.source != "embedding"
        ]
        for name, slot in slots:
            weight = codec.read(files, config, name, slot.shape)
            bias = _read_bias(files, name, slot, dtype)
            module = weight.linear(bias, slot.source, _device_of(name, devices))
            _place(model, name, module.eval())
        tied = config.get("tied_embedding") if codec.method == Own.method else None
        if tied is not None:
            head = model.get_output_embeddings()
            assert isinstance(head, QuantLinear)
            _place(model, tied, TiedEmbedding(head, dtype))


def _checked_paths(model: Any, checkpoint_files: Sequence[str] | None) -> list[Path]:
    """The files, all in the folder that is being loaded: an index may name others."""
    if not checkpoint_files:
        raise ValueError("a quantised model is loaded from safetensors files, not from a state dict")
    paths = [Path(file) for file in checkpoint_files]
    root = Path(str(model.config.name_or_path))
    for path in paths:
        outside = root.is_dir() and root.absolute() not in path.absolute().parents
        if outside or ".." in path.parts or path.parent != paths[0].parent:
            raise ValueError(f"{path}: is not in the checkpoint's folder")
    return paths


def _slot_of(model: nn.Module, name: str) -> Slot:
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{name}: is quantised in the checkpoint, and the model has no such module"
        ) from None
    if isinstance(module, Conv1D):
        k, n = module.weight.shape
        return Slot((n, k), True, "conv1d")
    if isinstance(module, nn.Linear):
        n, k = module.weight.shape
        return Slot((n, k), module.bias is not None, "linear")
    raise ValueError(f"{name}: is quantised in the checkpoint, and a {type(module).__name__} in the model")


def _check_tied(model: Any, tied: object, names: list[str]) -> None:
    """Raises :class:`ValueError` unless ``tied`` is the embedding of a model whose head is quantised."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    known = {name: module for name, module in model.named_modules()}
    if (
        not isinstance(tied, str)
        or known.get(tied) is not embedding
        or not isinstance(embedding, nn.Embedding)
    ):
        raise ValueError(f"quantization_config: tied_embedding {tied!r} is not the model's embedding")
    if not isinstance(head, Slot) or head.shape != tuple(embedding.weight.shape):
        raise ValueError(f"quantization_config: {tied} has no quantised output head of its shape to share")


def _check_rest(model: Any, files: TensorFiles) -> None:
    """Raises :class:`ValueError` where a tensor that is not quantised has another shape, or is missing."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    ignored = model._keys_to_ignore_on_load_missing
    tied = model.all_tied_weights_keys
    converted = bool(get_model_conversion_mapping(model, add_legacy=False))
    for name, tensor in model.state_dict().items():
        elsewhere = converted or name in tied or name in tied.values() or matches_any(name, ignored)
        if name in files or not elsewhere:
            files.check(name, tuple(tensor.shape))
    for target, source in tied.items():
        if target not in files and source not in files and not converted:
            files.check(source, ())


def _read_bias(files: TensorFiles, name: str, slot: Slot, dtype: torch.dtype) -> Tensor | None:
    key = f"{name}.bias"
    if key not in files and not slot.biased:
        return None
    bias = files.read(key, (slot.shape[0],), FLOATS)
    if not slot.biased and not bool(bias.any()):  # AutoGPTQ writes zeros where the model has no bias
        return None
    return bias.to(dtype)


def _device_of(name: str, devices: Mapping[str, Any]) -> torch.device:
    while name not in devices and name:
        name = name.rpartition(".")[0]
    device = devices.get(name, "cpu")
    if device == "disk":
        raise ValueError("device_map: quantised linears can't be offloaded to disk")
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _check_depth(config: Any, tensors: int, root: Path) -> None:
    """A model with more layers than the files have tensors isn't built."""
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(f"{root / 'config.json'}: {layers} layers, and the files hold {tensors} tensors")


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
