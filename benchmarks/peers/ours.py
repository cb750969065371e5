# SPDX-License-Identifier: Apache-2.0
"""kvopt's own recipes as contenders: ``kvopt_<recipe>``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import kvopt
from kvopt.weights import QuantizedWeight
from peers.base import Copies, Peer, Product

# Relative error of a product of Gaussian data, by the leading word of the recipe: rounding's own, with some room.
_ERRORS = {"int8": 0.02, "llm_int8": 0.02, "int4": 0.2, "int3": 0.4, "int2": 0.9, "nf4": 0.2, "fp4": 0.3}


def copies_of(weight: QuantizedWeight) -> Callable[[], QuantizedWeight]:
    """A maker of copies. Each is packed anew, so that it lies in memory as a quantised model's weight does."""
    codes = weight.codes()
    absmax = weight.scales if weight.format.double_quantized else None
    return lambda: QuantizedWeight.from_codes(*codes, weight.format, absmax)


def contender(recipe: str) -> Peer:
    """The product of this recipe. ``+a8`` and ``int8_dyn`` quantise activations within the timed call."""

    def prepare(weight: Tensor) -> Copies:
        another = copies_of(kvopt.quantize_weight(weight, recipe))

        def copy() -> Product:
            w = another()
            return Product(lambda x: kvopt.qlinear(x, w), w.nbytes)

        return copy

    error = next(value for word, value in _ERRORS.items() if recipe.startswith(word))
    return Peer(
        f"kvopt_{recipe}", ("cpu", "cuda"), prepare, error, None, lambda: f"kvopt {kvopt.__version__}"
    )
