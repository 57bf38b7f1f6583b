"""Sampling: drawn frequencies follow the distribution asked for, and logprobs are the model's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_engine_torch.server.sampling import SamplingSettings, sample

DRAWS = 20_000
VOCAB = 96


def frequencies(logits: torch.Tensor, **settings: float) -> np.ndarray:
    rows = logits.expand(DRAWS, -1).contiguous()
    chosen = [SamplingSettings(seed=i, **settings) for i in range(DRAWS)]  # type: ignore[arg-type]
    drawn = sample(rows, chosen, [0] * DRAWS)
    return np.bincount(drawn.tokens, minlength=logits.shape[-1]) / DRAWS


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2


def assert_follows(found: np.ndarray, expected: torch.Tensor) -> None:
    # Five standard deviations of each frequency.
    spread = np.sqrt(expected.numpy() * (1 - expected.numpy()) / DRAWS)
    assert (np.abs(found - expected.numpy()) <= 5 * spread + 1e-9).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(logits: torch.Tensor, temperature: float) -> None:
    assert_follows(frequencies(logits, temperature=temperature), torch.softmax(logits.double() / temperature, -1))


def test_top_k_keeps_the_k_likeliest(logits: torch.Tensor) -> None:
    kept = logits.topk(5)
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    expected[kept.indices] = torch.softmax(kept.values.double(), -1)
    assert_follows(frequencies(logits, top_k=5), expected)


def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: torch.Tensor) -> None:
    p = torch.softmax(logits.double(), -1)
    order = p.argsort(descending=True)
    count = int((p[order].cumsum(0) < 0.7).sum()) + 1
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    expected[order[:count]] = p[order[:count]] / p[order[:count]].sum()
    assert_follows(frequencies(logits, top_p=0.7), expected)


@pytest.mark.slow
def test_top_p_looks_beyond_its_first_window() -> None:
    flat = torch.zeros(5000)  # 0.9 of a flat distribution is 4500 tokens, far more than the window
    rows = flat.expand(3000, -1).contiguous()
    drawn = sample(rows, [SamplingSettings(seed=i, top_p=0.9) for i in range(3000)], [0] * 3000)
    assert len(set(drawn.tokens)) > 1500


def test_a_tiny_top_p_is_greedy(logits: torch.Tensor) -> None:
    assert frequencies(logits, top_p=1e-12)[int(logits.argmax())] == 1.0


def test_logprobs_are_the_models_own_whatever_the_settings(logits: torch.Tensor) -> None:
    settings = [
        SamplingSettings(seed=1),
        SamplingSettings(seed=2, temperature=0.3),
        SamplingSettings(seed=3, top_p=0.5, temperature=1.7),
        SamplingSettings(seed=4, top_k=3),
        SamplingSettings(temperature=0.0, top_logprobs=4),
    ]
    result = sample(logits.expand(5, -1).contiguous(), settings, [0, 1, 2, 3, 4])
    expected = torch.log_softmax(logits.double(), -1)
    assert result.logprobs == pytest.approx([float(expected[token]) for token in result.tokens], abs=1e-5)
    assert result.tokens[4] == int(logits.argmax())
    assert list(result.top) == [4]
    assert [token for token, _ in result.top[4]] == logits.topk(4).indices.tolist()


@pytest.mark.parametrize("vocab", [49152, 50257, 151936, 37])
def test_every_size_of_vocabulary_is_drawn_from(vocab: int) -> None:
    logits = torch.full((4, vocab), -30.0)
    for row, token in enumerate((0, vocab - 1, vocab // 2, 1)):
        logits[row, token] = 30.0
    drawn = sample(logits, [SamplingSettings(seed=i) for i in range(4)], [7] * 4)
    assert drawn.tokens == [0, vocab - 1, vocab // 2, 1]


def test_rows_that_are_not_finite_are_told_by_their_logprob() -> None:
    logits = torch.randn(3, 64)
    logits[1, 5] = float("nan")
    drawn = sample(logits, [SamplingSettings(seed=i) for i in range(3)], [0] * 3)
    assert [logprob != logprob for logprob in drawn.logprobs] == [False, True, False]


def test_seed_and_position_decide_the_draw(logits: torch.Tensor) -> None:
    rows = logits.expand(2, -1).contiguous()
    once = sample(rows, [SamplingSettings(seed=9), SamplingSettings(seed=10)], [4, 4]).tokens
    again = sample(rows.flip(0), [SamplingSettings(seed=10), SamplingSettings(seed=9)], [4, 4]).tokens
    assert once == again[::-1]
    many = sample(logits.expand(50, -1).contiguous(), [SamplingSettings(seed=9)] * 50, list(range(50))).tokens
    assert len(set(many)) > 5
