# SPDX-License-Identifier: Apache-2.0
"""The KV cache: which tokens stay (policies), how many and where (budgets, allocators), in how many bits (codecs),
and which layers share them (merge).
"""

from kvopt.cache.allocators import Allocator
from kvopt.cache.budgets import MebibyteBudget, PercentBudget, TokenBudget
from kvopt.cache.cache import Cache
from kvopt.cache.codecs import Codec
from kvopt.cache.context import compress
from kvopt.cache.merge import Merge
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
from kvopt.cache.prediction import CacheBytes, cache_bytes
from kvopt.cache.spec import CacheSpec

__all__ = [
    "HALF",
    "Allocator",
    "Cache",
    "CacheBytes",
    "CacheSpec",
    "Codec",
    "DecodeRule",
    "Full",
    "MebibyteBudget",
    "Merge",
    "Observation",
    "PercentBudget",
    "Policy",
    "Sink",
    "SnapKV",
    "TokenBudget",
    "Tokens",
    "Window",
    "cache_bytes",
    "compress",
    "register_policy",
]
