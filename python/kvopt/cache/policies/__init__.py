# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay: one small file per policy."""

from kvopt.cache.policies.base import (
    HALF,
    POLICIES,
    DecodeRule,
    Observation,
    Policy,
    Tokens,
    register_policy,
)
from kvopt.cache.policies.full import Full
from kvopt.cache.policies.h2o import H2O
from kvopt.cache.policies.keydiff import KeyDiff
from kvopt.cache.policies.kvzip import KVzip
from kvopt.cache.policies.random import Random
from kvopt.cache.policies.sink import Sink
from kvopt.cache.policies.snapkv import SnapKV
from kvopt.cache.policies.tova import TOVA
from kvopt.cache.policies.window import Window

__all__ = [
    "H2O",
    "HALF",
    "POLICIES",
    "TOVA",
    "DecodeRule",
    "Full",
    "KVzip",
    "KeyDiff",
    "Observation",
    "Policy",
    "Random",
    "Sink",
    "SnapKV",
    "Tokens",
    "Window",
    "register_policy",
]
