# SPDX-License-Identifier: Apache-2.0
"""The KV cache: which tokens stay (policies), how many and where (budgets, allocators), in how many bits (codecs)."""

from kvopt.cache.allocators import Allocator
from kvopt.cache.budgets import MebibyteBudget, PercentBudget, TokenBudget
from kvopt.cache.cache import Cache
from kvopt.cache.codecs import Codec
from kvopt.cache.context import compress
from kvopt.cache.policies import (
    HALF,
    DecodeRule,
    Full,
    Observation,
    Policy,
    Sink,
    SnapKV,
    Tokens,
    Window,
    register_policy,
)
from kvopt.cache.spec import CacheSpec

__all__ = [
    "HALF",
    "Allocator",
    "Cache",
    "CacheSpec",
    "Codec",
    "DecodeRule",
    "Full",
    "MebibyteBudget",
    "Observation",
    "PercentBudget",
    "Policy",
    "Sink",
    "SnapKV",
    "TokenBudget",
    "Tokens",
    "Window",
    "compress",
    "register_policy",
]
