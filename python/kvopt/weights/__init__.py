# SPDX-License-Identifier: Apache-2.0
"""Quantised weights: formats, recipes, the linear that runs them, and quantising a model."""

from kvopt.reference import Scheme
from kvopt.weights.formats import QuantizedWeight, WeightFormat
from kvopt.weights.linear import QuantLinear
from kvopt.weights.model import dequantize, qlinear, quantize, quantize_weight
from kvopt.weights.recipe import Recipe
from kvopt.weights.report import LayerReport, QuantizationReport

__all__ = [
    "LayerReport",
    "QuantLinear",
    "QuantizationReport",
    "QuantizedWeight",
    "Recipe",
    "Scheme",
    "WeightFormat",
    "dequantize",
    "qlinear",
    "quantize",
    "quantize_weight",
]
