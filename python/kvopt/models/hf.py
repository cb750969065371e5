# SPDX-License-Identifier: Apache-2.0
"""transformers knows our checkpoints: after ``import kvopt``, ``AutoModelForCausalLM.from_pretrained`` loads them.

This module is imported while transformers itself is being imported (``registration.py``), so it imports no more of
it than the two base classes, and of kvopt nothing until a checkpoint is loaded.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "kvopt"


class KvoptConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The ``quantization_config`` of a checkpoint.

    Args:
        settings: its content. While a foreign checkpoint is loaded, ``checkpoint`` is its own ``quantization_config``;
            ``device`` is where the quantised linears go.
    """

    def __init__(self, **settings: Any) -> None:
        settings.pop("quant_method", None)
        self.quant_method = METHOD
        self.device = settings.pop("device", None)
        self.settings = settings

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What describes the files."""
        described: dict[str, Any] = self.settings.get("checkpoint", self.to_dict())
        return described

    def to_dict(self) -> dict[str, Any]:
        """As ``config.json`` has it."""
        return {"quant_method": METHOD, **self.settings}


class KvoptQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Puts packed linears where transformers would load dense ones."""

    quantization_config: Any

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises :class:`ValueError` for a model that is not quantised yet."""
        if not self.pre_quantized:
            raise ValueError("kvopt quantises a loaded model: kvopt.quantize(model, recipe)")

    def _process_model_before_weight_loading(
        self,
        model: Any,
        device_map: Any = None,
        checkpoint_files: Any = None,
        **kwargs: Any,
    ) -> None:
        from kvopt.weights.checkpoint.load import prepare

        self._files, self._dtype = checkpoint_files, model.dtype
        self._devices = device_map if isinstance(device_map, dict) else {}
        if self.quantization_config.device is not None:
            self._devices = {"": self.quantization_config.device}
        prepare(model, self.quantization_config.checkpoint, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from kvopt.weights.checkpoint.load import fill

        devices = getattr(model, "hf_device_map", None) or self._devices
        fill(model, self.quantization_config.checkpoint, self._files, self._dtype, devices)
        self._describe(model)  # a model of ours from here on, whatever it was read from
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called before ``model.save_pretrained`` writes: what is quantised may have changed since."""
        self._describe(model)
        return None, {}

    def _describe(self, model: Any) -> None:
        """Makes the configuration say what the model holds."""
        from kvopt.weights.checkpoint.own import Own
        from kvopt.weights.linear import QuantLinear

        modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
        if modules:
            self.quantization_config = KvoptConfig(**Own().config(model, modules))
            model.config.quantization_config = self.quantization_config
        elif hasattr(model.config, "quantization_config"):
            del model.config.quantization_config

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from kvopt.weights.model import dequantize

        return dequantize(model, dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``model.save_pretrained`` writes what :func:`kvopt.save_quantized` writes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top; the quantised weights themselves do not."""
        return True


def register() -> None:
    """Makes the two classes known, once."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(KvoptConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(KvoptQuantizer)


register()
