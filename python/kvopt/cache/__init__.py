# SPDX-License-Identifier: Apache-2.0
"""The KV cache: which tokens stay (policies), how many (budgets), in how many bits (codecs)."""

from kvopt.cache.budgets import MebibyteBudget, PercentBudget, TokenBudget
from kvopt.cache.cache import Cache
from kvopt.cache.compress import compress
from kvopt.cache.policies import Full, Policy, Sink, Tokens, Window, register_policy
from kvopt.cache.spec import CacheSpec

__all__ = [
    "Cache",
    "CacheSpec",
    "Full",
    "MebibyteBudget",
    "PercentBudget",
    "Policy",
    "Sink",
    "TokenBudget",
    "Tokens",
    "Window",
    "compress",
    "register_policy",
]
