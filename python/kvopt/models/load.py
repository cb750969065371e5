# SPDX-License-Identifier: Apache-2.0
"""Loading a causal language model: embedded, from a folder, or from the hub; quantised on the way if asked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvopt import assets
from kvopt.weights.checkpoint import load_quantized
from kvopt.weights.checkpoint.files import read_json
from kvopt.weights.model import RecipeLike, quantize
from kvopt.weights.recipe import DTYPES, Recipe


class DtypeWarning(UserWarning):
    """A checkpoint's type is not native to the device, so another one is used."""


def load(
    name: str | Path,
    recipe: RecipeLike | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    progress: bool = True,
) -> tuple[Any, Any]:
    """Loads a model and its tokenizer, in evaluation mode.

    Args:
        name: an embedded model (``"llama-6m"``), a folder in Hugging Face format, or a hub id. Weights are read from
            safetensors only. A quantised folder is loaded as :func:`kvopt.load_quantized` does it.
        recipe: as :func:`kvopt.quantize` takes it; ``None`` loads the model as it is. Quantising goes linear by linear,
            so that the device never holds the full-precision model.
        device: ``"auto"`` is the first GPU, else the CPU.
        dtype: as transformers takes it: ``"auto"`` (the checkpoint's), a ``torch.dtype`` or its name. On a GPU without
            native bfloat16 a bfloat16 checkpoint becomes float16 under ``"auto"``, which is said once.
        progress: show a progress bar while quantising.

    Returns:
        (model, tokenizer).

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: a damaged file, a folder without safetensors weights, an unknown recipe or dtype.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if recipe is not None and isinstance(recipe, str | Recipe):
        recipe = Recipe.parse(recipe)
    source = find_model(name)
    target = as_device(device)
    if isinstance(recipe, Recipe) and recipe.dtype is not None:
        if dtype != "auto" and as_dtype(dtype) != recipe.dtype:
            raise ValueError(f"dtype: {dtype} contradicts the recipe {recipe}")
        dtype, recipe = recipe.dtype, None
    wanted: Any = as_dtype(dtype)
    if isinstance(source, Path) and is_quantized(source):
        if recipe is not None:
            raise ValueError(f"model {str(name)!r}: is quantised already; leave out the recipe {recipe}")
        return load_quantized(source, target, wanted), AutoTokenizer.from_pretrained(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, use_safetensors=True)
    except SafetensorError as error:
        raise ValueError(f"model {str(name)!r}: damaged safetensors file: {error}") from error
    except OSError as error:
        if isinstance(source, Path):
            raise ValueError(f"model {str(name)!r}: cannot be loaded from {source}: {error}") from error
        raise FileNotFoundError(
            f"model {str(name)!r}: not an embedded model ({', '.join(assets.MODELS)}), no such folder, and not to be "
            f"had from the hub: {str(error).splitlines()[0]}"
        ) from error

    lower_bfloat16(model, wanted, target)
    if recipe is not None:
        quantize(model, recipe, progress=progress, device=target)
    return model.to(target).eval(), tokenizer


def find_model(name: str | Path) -> Path | str:
    """The folder of an embedded or local model, its safetensors files checked; a hub id comes back as it is.

    Raises:
        FileNotFoundError: it looks like a path, and nothing is there.
        ValueError: the folder has no configuration or no readable safetensors weights.
    """
    if str(name) in assets.MODELS:
        folder = assets.path(str(name))
    else:
        text = str(name)
        folder = Path(text).expanduser()
        if not text.strip() or not folder.exists():
            if (
                isinstance(name, Path)
                or text.startswith((".", "/", "~"))
                or text.count("/") > 1
                or not text.strip()
            ):
                raise FileNotFoundError(f"model {text!r}: no such folder")
            return text
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {str(name)!r}: {folder} has no config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"model {str(name)!r}: {folder} has no *.safetensors weights (pickled weights are not read)"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model {str(name)!r}: damaged safetensors file {file.name}: {error}") from error
    return folder


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is native to the device: the CPU and GPUs from compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8


def lower_bfloat16(model: Any, wanted: torch.dtype | str, target: torch.device) -> None:
    """Under ``"auto"``, makes a bfloat16 model float16 for a device without native bfloat16, and says so."""
    if wanted == "auto" and model.dtype == torch.bfloat16 and not native_bfloat16(target):
        warnings.warn(
            f"{torch.cuda.get_device_name(target)} has no native bfloat16: the checkpoint is loaded as float16",
            DtypeWarning,
            stacklevel=3,
        )
        model.to(torch.float16)


def is_quantized(folder: Path) -> bool:
    """Whether the folder's ``config.json`` says that its weights are quantised."""
    return read_json(folder / "config.json").get("quantization_config") is not None


def as_device(device: torch.device | str) -> torch.device:
    """The device that ``"auto"`` or a name stands for; raises :class:`ValueError` for no device."""
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is not a device; expected auto, cpu, cuda, cuda:0 …") from error


def as_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """``"auto"`` or the type that a name stands for; raises :class:`ValueError` for no floating type."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = DTYPES.get(dtype, getattr(torch, dtype.removeprefix("torch."), None))
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype: {dtype!r} is not a floating type; expected auto, {', '.join(DTYPES)}, float16 …"
        )
    return found
