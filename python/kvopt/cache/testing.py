# SPDX-License-Identifier: Apache-2.0
"""A test-kit for policies: what must hold of any of them, tried on a small random model.

.. code-block:: python

    from kvopt.cache.testing import check_policy

    def test_my_policy():
        check_policy("mine")

It needs no files, no network and a few seconds on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvopt.cache.budgets import TokenBudget
from kvopt.cache.cache import Cache
from kvopt.cache.policies import POLICIES, Policy, Tokens
from kvopt.cache.spec import CacheSpec

_VOCABULARY = 64
_PROMPTS = (53, 21, 5)  # longer than the budget, about as long, shorter
_STEPS = 24


class PolicyError(AssertionError):
    """A policy breaks one of the rules; the message says which."""


def check_policy(policy: str | Policy | type[Policy], budget: int | None = None, seed: int = 0) -> None:
    """Checks a policy.

    - Its choice string can be parsed back.
    - ``priority`` returns one real number per token, no NaN, the same when asked again, and writes nothing.
    - No head ever keeps more tokens than the budget, nor fewer than there are; none appears twice; a decoded token
      always enters.
    - With a budget that is never reached nothing changes.
    - A row in a left-padded batch keeps the same tokens as alone.
    - After ``reset`` the same prompt gives the same.

    Args:
        policy: a registered name, with settings if you like (``"snapkv_w16"``), a policy, or a class without arguments.
        budget: tokens per KV head; default 20, or the policy's minimum where that is more.
        seed: of the model and the tokens.

    Raises:
        PolicyError: a rule is broken.
        ValueError: no such policy, or ``full``.
    """
    if policy == "full":
        raise ValueError("check_policy: 'full' keeps everything, there is nothing to check")
    with _named(_instance(policy)) as made:
        tokens = max(20, made.minimum) if budget is None else budget
        spec = CacheSpec(made, TokenBudget(tokens))
        text = str(spec)
        parsed = CacheSpec.parse(text)
        if str(parsed) != text or (type(parsed.policy), vars(parsed.policy)) != (type(made), vars(made)):
            raise PolicyError(
                f"{text}: parsed back it is {parsed} with {vars(parsed.policy)}, not {vars(made)}"
            )
        generator = torch.Generator().manual_seed(seed)
        model = _model(generator)
        prompts = [torch.randint(1, _VOCABULARY, (1, n), generator=generator) for n in _PROMPTS]
        more = torch.randint(1, _VOCABULARY, (len(prompts), _STEPS), generator=generator)
        with torch.no_grad():
            _check_priority(model, spec, prompts[0])
            together = _held(model, spec, prompts, more, tokens)
            _check_rows(model, spec, prompts, more, tokens, together)
            _check_ample(model, made, prompts, more)


def _instance(policy: str | Policy | type[Policy]) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, type):
        return policy()
    name, _, settings = policy.partition("_")
    return CacheSpec.parse(f"{name}_b{2**20}" + (f"_{settings}" if settings else "")).policy


@contextmanager
def _named(policy: Policy) -> Iterator[Policy]:
    """A class that was not registered gets a name for the time being."""
    kind = type(policy)
    if kind.name in POLICIES:
        yield policy
        return
    before, kind.name = kind.name, "undertest"
    POLICIES[kind.name] = kind
    try:
        yield policy
    finally:
        del POLICIES[kind.name]
        kind.name = before


def _model(generator: torch.Generator) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():  # large weights, so that attention is not uniform
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def _padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(prompt.shape[1] for prompt in prompts)
    ids, mask = torch.zeros((2, len(prompts), longest), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt[0]
        mask[row, longest - prompt.shape[1] :] = 1
    return ids, mask


def _check_priority(model: Any, spec: CacheSpec, prompt: Tensor) -> None:
    """Watches what ``priority`` is asked and what it answers while a prompt is read."""
    policy, seen = spec.policy, 0
    cache = Cache(model, spec)

    class Watched(type(policy)):  # type: ignore[misc]
        def priority(self, tokens: Tokens) -> Tensor:
            nonlocal seen
            seen += 1
            given = [
                t for t in (tokens.positions, tokens.keys, tokens.values, tokens.scores) if t is not None
            ]
            before = [t.clone() for t in given]
            first, second = super().priority(tokens), super().priority(tokens)
            if not isinstance(first, Tensor) or first.is_complex():
                raise PolicyError(f"{spec}: priority() must return a real tensor, got {type(first).__name__}")
            if first.shape not in (tokens.positions.shape, (first.shape[0], 2, tokens.positions.shape[2])):
                raise PolicyError(
                    f"{spec}: priority() returned shape {tuple(first.shape)} for {tuple(tokens.positions.shape)}"
                )
            there = (tokens.positions >= 0).expand(first.shape)
            if first.is_floating_point() and first[there].isnan().any():
                raise PolicyError(f"{spec}: priority() returned NaN for a token")
            if not torch.equal(first.masked_fill(~there, 0), second.masked_fill(~there, 0)):
                raise PolicyError(f"{spec}: priority() asked twice gave two answers")
            if not all(torch.equal(a, b) for a, b in zip(given, before, strict=True)):
                raise PolicyError(f"{spec}: priority() changed what it was shown")
            return first

    watched = copy.copy(policy)
    object.__setattr__(watched, "__class__", Watched)
    object.__setattr__(cache.spec, "policy", watched)
    try:
        model(prompt, past_key_values=cache)
    finally:
        object.__setattr__(cache.spec, "policy", policy)
    if not seen:
        raise PolicyError(f"{spec}: priority() was never asked")


Held = list[list[list[Tensor]]]  # [step][layer][row]: (H, n) positions, -1 where there is none


def _held(model: Any, spec: CacheSpec, prompts: list[Tensor], more: Tensor, budget: int) -> Held:
    """What is kept after the prompt and after each token; checks what must hold of every such set."""
    ids, mask = _padded(prompts)
    cache, steps = Cache(model, spec), []
    model(ids, attention_mask=mask, past_key_values=cache)
    for step in range(more.shape[1] + 1):
        if step:
            mask = torch.cat([mask, mask.new_ones((len(prompts), 1))], dim=1)
            model(more[:, step - 1 : step], attention_mask=mask, past_key_values=cache)
        layers = [list(cache.positions(layer)) for layer in range(2)]
        for layer, rows in enumerate(layers):
            for row, positions in enumerate(rows):
                newest = prompts[row].shape[1] + step - 1
                for head, kept in enumerate(positions):
                    where = f"{spec}: layer {layer}, row {row}, head {head}, after token {newest}"
                    _check_set(kept[kept >= 0], newest, None if spec.policy.grows else budget, where)
                    if step and newest not in kept:
                        raise PolicyError(f"{where}: that token is not kept itself")
        steps.append(layers)
    cache.reset()
    return steps


def _check_set(kept: Tensor, newest: int, budget: int | None, where: str) -> None:
    if budget is not None and len(kept) > budget:
        raise PolicyError(f"{where}: {len(kept)} tokens are kept, the budget is {budget}")
    if budget is not None and len(kept) < min(budget, newest + 1):
        raise PolicyError(f"{where}: {len(kept)} tokens are kept, {min(budget, newest + 1)} fit")
    if len(set(kept.tolist())) != len(kept):
        raise PolicyError(f"{where}: a token is kept twice")


def _check_rows(
    model: Any, spec: CacheSpec, prompts: list[Tensor], more: Tensor, budget: int, together: Held
) -> None:
    for row, prompt in enumerate(prompts):
        for again in range(2 if row == 0 else 1):
            alone = _held(model, spec, [prompt], more[row : row + 1], budget)
            for step, layers in enumerate(alone):
                for layer, (positions,) in enumerate(layers):
                    other = together[step][layer][row]
                    if [set(h.tolist()) - {-1} for h in positions] != [set(h.tolist()) - {-1} for h in other]:
                        why = "a second run" if again else f"row {row} alone"
                        raise PolicyError(
                            f"{spec}: layer {layer}, step {step}: {why} keeps other tokens than the row in a batch"
                        )


def _check_ample(model: Any, policy: Policy, prompts: list[Tensor], more: Tensor) -> None:
    """A budget that is never reached: the logits of ``full``."""
    ids, mask = _padded(prompts)
    ample = CacheSpec(policy, TokenBudget(max(policy.minimum, ids.shape[1] + more.shape[1])))
    caches = [Cache(model, ample), Cache(model, "full")]
    ours, full = (model(ids, attention_mask=mask, past_key_values=cache).logits for cache in caches)
    for token in more.T[:5]:
        mask = torch.cat([mask, mask.new_ones((len(prompts), 1))], dim=1)
        ours, full = (
            model(token[:, None], attention_mask=mask, past_key_values=cache).logits for cache in caches
        )
    if not torch.allclose(ours, full, rtol=1e-9, atol=1e-12):
        raise PolicyError(
            f"{ample}: with a budget that is never reached the logits differ from those of 'full'"
        )
