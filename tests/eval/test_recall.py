# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvopt.cache import Cache
from kvopt.eval import RecallDocument, recall


class Bytes:
    """A tokenizer of bytes; 0 begins a document."""

    bos_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


class Rigged(torch.nn.Module):
    """A "model" that continues the text ``script`` wherever it can be found, and says "~" elsewhere.

    It keeps what it has read in the cache object, so that chunks and single steps both work as with a real model.
    """

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=400)
        self.answers = answers
        self.prompts: list[str] = []

    def forward(
        self, input_ids: torch.Tensor, past_key_values: RiggedCache, use_cache: bool, logits_to_keep: int = 0
    ) -> SimpleNamespace:
        cache = past_key_values
        before = len(cache.rows[0])
        if not before:
            cache.rows = [[] for _ in input_ids]
        cache.rows = [[*old, *new] for old, new in zip(cache.rows, input_ids.tolist(), strict=True)]
        logits = torch.zeros(*input_ids.shape, 256)
        for b, row in enumerate(cache.rows):
            for i in range(input_ids.shape[1]):
                logits[b, i, self.choice(bytes(row[: before + i + 1]).decode())] = 5.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def choice(self, text: str) -> int:
        if text.endswith("A:"):
            self.prompts.append(text)
        question, _, said = text.rpartition("\n\nQ: ")[2].partition("\n\nA:")
        answer = f" {self.answers.get(question, '~')}"
        return ord(answer[len(said)]) if answer.startswith(said) and len(said) < len(answer) else ord("~")


class RiggedCache:
    def __init__(self) -> None:
        self.rows: list[list[int]] = [[]]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rows = [list(row) for row in self.rows for _ in range(repeats)]


@pytest.fixture
def rigged(monkeypatch: pytest.MonkeyPatch) -> Rigged:
    # `kvopt.eval.recall` names the function; its module is found here.
    monkeypatch.setattr(sys.modules["kvopt.eval.recall"], "new_cache", lambda model, spec: RiggedCache())
    return Rigged({"Who?": "Ann", "Where?": "in Rome", "When?": "7x", "What?": "an egg"})


DOCUMENTS = [
    RecallDocument("a", "short", "Ann was in Rome.", ("Who?", "Where?", "When?"), ("Ann", "in Rome", "77")),
    RecallDocument("b", "long", "An egg fell.", ("What?",), ("an egg",)),
]


@pytest.mark.parametrize("cache", [None, "anything"])
def test_counts_whole_answers_only(rigged: Rigged, cache: str | None) -> None:
    """Of "7x" for "77" the first token is right: that is not an answer."""
    result = recall(rigged, Bytes(), DOCUMENTS, cache=cache)
    assert result.recall == 3 / 4
    assert result.by_length == {"short": (2, 3), "long": (1, 1)}
    assert (result.n_documents, result.n_questions, result.skipped) == (2, 4, 0)
    # Clustered by document: sqrt(2 * ((2 - 3 * 3/4)² + (1 - 3/4)²)) / 4
    assert result.stderr == pytest.approx(math.sqrt(2 * (0.25**2 + 0.25**2)) / 4)


def test_prompt_is_story_blank_line_question(rigged: Rigged) -> None:
    recall(rigged, Bytes(), DOCUMENTS[1:])
    assert rigged.prompts == ["\0An egg fell.\n\nQ: What?\n\nA:"]


def test_history_is_one_dialogue(rigged: Rigged) -> None:
    result = recall(rigged, Bytes(), DOCUMENTS[:1], history=True)
    assert result.recall == 2 / 3
    assert (
        rigged.prompts[-1]
        == "\0Ann was in Rome.\n\nQ: Who?\n\nA: Ann\n\nQ: Where?\n\nA: in Rome\n\nQ: When?\n\nA:"
    )


def test_batches_of_questions_change_nothing(rigged: Rigged) -> None:
    assert recall(rigged, Bytes(), DOCUMENTS, batch_size=2).recall == 3 / 4


def test_documents_that_do_not_fit_are_left_out_and_counted(rigged: Rigged) -> None:
    long = RecallDocument("c", "long", "x" * 500, ("Who?",), ("Ann",))
    result = recall(rigged, Bytes(), [long, DOCUMENTS[1]])
    assert (result.recall, result.skipped, result.n_documents) == (1.0, 1, 1)
    assert "1 documents too long" in result.note
    with pytest.raises(ValueError, match="none of the 1 documents fits"):
        recall(rigged, Bytes(), [long])


@pytest.fixture
def model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.5,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def greedy(model: LlamaForCausalLM, text: str, steps: int) -> str:
    ids = [0, *text.encode("latin-1")]
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return bytes(ids[-steps:]).decode("latin-1")


class Latin(Bytes):
    """One byte per letter, so that any token can be an answer; the space before an answer is dropped."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.removeprefix(" ").encode("latin-1"))}


@pytest.mark.parametrize("cache", [None, "full", "window_b200", "sink_b200_s4"])
@pytest.mark.parametrize("how", ["alone", "history", "query_aware"])
def test_shared_story_and_padding_equal_decoding_each_question_from_scratch(
    model: LlamaForCausalLM, cache: str | None, how: str
) -> None:
    history = how == "history"
    story, questions = "Once upon a time", ("Who?", "Where was it, and when?", "Why?")
    answers: list[str] = []
    text = story
    for i, question in enumerate(questions):
        text = f"{text if history else story}\n\nQ: {question}\n\nA:"
        right = greedy(model, text, 2 + i)
        wrong = right[:-1] + chr((ord(right[-1]) + 1) % 256)
        answers.append(wrong if i == 1 else right)
        text += answers[-1]
    document = RecallDocument("a", "x", story, questions, tuple(answers))
    result = recall(model, Latin(), [document], cache=cache, **({} if how == "alone" else {how: True}))
    assert result.recall == 2 / 3
    assert ("story and question compressed" in result.note) == (how == "query_aware" and cache is not None)


def test_query_aware_keeps_what_the_question_follows(model: LlamaForCausalLM) -> None:
    """A window that ends with the prompt holds the question in one case and begins behind it in the other."""
    story, question = "x" * 60, "Who was it?"
    prompt = f"{story}\n\nQ: {question}\n\nA:"
    ids = torch.tensor([[0, *prompt.encode("latin-1")]])
    cache = Cache(model, "window_b20")
    with torch.no_grad():  # the prompt is attended in full, then 20 tokens stay
        first = int(model(ids, past_key_values=cache).logits[0, -1].argmax())
        second = int(model(torch.tensor([[first]]), past_key_values=cache).logits[0, -1].argmax())
    answer = bytes([first, second]).decode("latin-1")
    document = RecallDocument("a", "x", story, (question,), (answer,))
    assert recall(model, Latin(), [document], cache="window_b20", query_aware=True).recall == 1


def test_query_aware_dialogue_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="history"):
        recall(model, Bytes(), DOCUMENTS, query_aware=True, history=True)


@pytest.mark.parametrize("cache", [None, "full"])
@pytest.mark.parametrize("query_aware", [False, True])
def test_nan_logits_never_pass(model: LlamaForCausalLM, cache: str | None, query_aware: bool) -> None:
    with torch.no_grad():
        model.model.norm.weight[2] = float("nan")
    with pytest.raises(FloatingPointError, match="document 'a'"):
        recall(model, Bytes(), DOCUMENTS, cache=cache, query_aware=query_aware)
