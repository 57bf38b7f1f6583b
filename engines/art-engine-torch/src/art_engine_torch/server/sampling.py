"""Chooses the next token of every row of a batch at once, and says how likely it was.

Logprobs are those of the model itself, log softmax of the logits at temperature 1, whatever temperature, top_p, top_k,
min_p and what else a request changes did to the choice. Knows numbers only. Randomness is a hash of (seed, position):
what else is in the batch changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

# How many of the likeliest tokens top_p looks at before it sorts the whole vocabulary.
NUCLEUS: Final = 1024


@dataclass(frozen=True)
class SamplingSettings:
    """How one sequence is sampled. temperature 0 takes the likeliest token; top_k 0, top_p 1 and min_p 0 leave all in.

    min_p leaves out what is less likely than the likeliest times it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    top_logprobs: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Sampled:
    """One token a row. `tokens` and `logprobs` [rows]; `top[i]`: (token, logprob) pairs, likeliest first.

    A row whose logits were not finite has logprob NaN, and its token means nothing.
    """

    tokens: list[int]
    logprobs: list[float]
    top: dict[int, list[tuple[int, float]]]


def sample(
    logits: Tensor,
    settings: Sequence[SamplingSettings],
    positions: Sequence[int],
    changed: Mapping[int, Tensor] | None = None,
) -> Sampled:
    """Draws one token a row from `logits` float32 [rows, vocab], which it overwrites.

    `positions` is each row's count of tokens so far, the second half of its random number. A row in `changed` is drawn
    from those logits [vocab] in place of its own; its logprob is still that of its own.
    """
    changed = changed or {}
    device = logits.device
    uniform = torch.from_numpy(_uniform([s.seed for s in settings], positions)).to(device)
    # Relative to each row's highest from here on, where float32 is fine enough not to round the logprobs.
    logits.sub_(logits.amax(-1, keepdim=True))
    greedy = [i for i, s in enumerate(settings) if s.temperature == 0.0]
    filtered = [i for i, s in enumerate(settings) if s.temperature != 0.0 and _filters(s)]
    others = [i for i in changed if settings[i].temperature != 0.0 and not _filters(settings[i])]
    plain = all(s.temperature == 1.0 for s in settings)
    weights = logits.exp()
    normalizer = weights.sum(-1, keepdim=True).log_()
    if not plain:
        # Greedy rows are drawn too, at any temperature, and replaced below.
        divisor = torch.tensor([s.temperature or 1.0 for s in settings], device=device).unsqueeze(1)
        torch.div(logits, divisor, out=weights).exp_()
    chunks = weights.view(len(settings), -1, _chunk(logits.shape[1]))
    tokens = _draw_chunked(chunks, chunks.sum(-1), uniform)
    if greedy:
        tokens[torch.tensor(greedy, device=device)] = _rows(logits, greedy, changed).argmax(-1)
    if filtered:
        chosen = torch.tensor(filtered, device=device)
        scaled = _scaled(logits, filtered, changed, settings)
        tokens[chosen] = _draw_filtered(scaled, [settings[i] for i in filtered], uniform[chosen])
    if others:
        chosen = torch.tensor(others, device=device)
        weights = torch.softmax(_scaled(logits, others, changed, settings), -1)
        chunks = weights.view(len(others), -1, _chunk(logits.shape[1]))
        tokens[chosen] = _draw_chunked(chunks, chunks.sum(-1), uniform[chosen])
    logprobs = logits.gather(1, tokens.unsqueeze(1)) - normalizer
    return Sampled(tokens.tolist(), logprobs.squeeze(1).tolist(), _top_logprobs(logits, normalizer, settings))


def _filters(settings: SamplingSettings) -> bool:
    return settings.top_p < 1.0 or settings.top_k > 0 or settings.min_p > 0.0


def _rows(logits: Tensor, rows: Sequence[int], changed: Mapping[int, Tensor]) -> Tensor:
    """Those rows, with what is in `changed` in place of their own."""
    if not any(row in changed for row in rows):
        return logits[torch.tensor(rows, device=logits.device)]
    return torch.stack([changed.get(row, logits[row]) for row in rows])


def _scaled(
    logits: Tensor, rows: Sequence[int], changed: Mapping[int, Tensor], settings: Sequence[SamplingSettings]
) -> Tensor:
    temperature = torch.tensor([settings[row].temperature for row in rows], device=logits.device).unsqueeze(1)
    found = _rows(logits, rows, changed)
    return (found - found.amax(-1, keepdim=True)) / temperature


def _draw_chunked(chunks: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw in two steps, a chunk and then a token in it: two short cumulative sums instead of one over the
    vocabulary.
    """
    cumulative = sums.double().cumsum(-1)
    target = (uniform * cumulative[:, -1]).unsqueeze(1)
    chunk = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = cumulative.gather(1, chunk) - sums.double().gather(1, chunk)
    inside = chunks.gather(1, chunk.unsqueeze(2).expand(-1, -1, chunks.shape[2])).squeeze(1).double().cumsum(-1)
    token = torch.searchsorted(inside, (target - before).clamp_(min=0.0), right=True)
    # Rounding may carry the draw past the end of its chunk: take the last token there that has any weight.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous()).clamp_(max=inside.shape[1] - 1)
    return (chunk * chunks.shape[2] + torch.minimum(token, last)).squeeze(1)


def _draw_filtered(scaled: Tensor, settings: Sequence[SamplingSettings], uniform: Tensor) -> Tensor:
    """min_p first, then top_k, then top_p of what is left."""
    vocab = scaled.shape[1]
    lowest = torch.tensor([math.log(s.min_p) if s.min_p else -math.inf for s in settings], dtype=torch.float64)
    lowest = lowest.to(scaled.device).unsqueeze(1)
    top_k = torch.tensor([s.top_k or vocab for s in settings], device=scaled.device).unsqueeze(1)
    top_p = torch.tensor([s.top_p for s in settings], device=scaled.device, dtype=torch.float64).unsqueeze(1)
    size = min(vocab, max([NUCLEUS, *(s.top_k for s in settings)]))
    values, tokens = scaled.topk(size, dim=-1)
    all_mass = torch.logsumexp(scaled.double(), -1, keepdim=True)
    if size < vocab:
        covered = (torch.logsumexp(values.double(), -1, keepdim=True) - all_mass).exp()
        ends_inside = values[:, -1:] < values[:, :1] + lowest
        if bool(((top_k > size) & (covered < top_p) & ~ends_inside).any()):
            values, tokens = scaled.sort(dim=-1, descending=True)
            size = vocab
    values = values.double()
    values = values.masked_fill(values < values[:, :1] + lowest, -math.inf)
    values = values.masked_fill(torch.arange(size, device=scaled.device)[None] >= top_k, -math.inf)
    cut = (top_k < vocab) | (lowest > -math.inf)
    left = torch.where(cut, torch.logsumexp(values, -1, keepdim=True), all_mass)
    mass = (values - left).exp()
    mass = mass.masked_fill(mass.cumsum(-1) - mass >= top_p, 0.0)
    mass[:, 0] = mass[:, 0].clamp(min=torch.finfo(torch.float64).tiny)  # a top_p of almost 0 leaves the likeliest
    cumulative = mass.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()).clamp_(max=size - 1)
    return tokens.gather(1, torch.minimum(drawn, last)).squeeze(1)


def _top_logprobs(
    logits: Tensor, normalizer: Tensor, settings: Sequence[SamplingSettings]
) -> dict[int, list[tuple[int, float]]]:
    asked = [i for i, s in enumerate(settings) if s.top_logprobs]
    if not asked:
        return {}
    rows = torch.tensor(asked, device=logits.device)
    values, tokens = logits[rows].topk(max(settings[i].top_logprobs for i in asked), dim=-1)
    pairs = zip(tokens.tolist(), (values - normalizer[rows]).tolist(), strict=True)
    return {
        i: list(zip(ids, logprobs, strict=True))[: settings[i].top_logprobs]
        for i, (ids, logprobs) in zip(asked, pairs, strict=True)
    }


def _chunk(vocab: int) -> int:
    """A divisor of the vocabulary near its square root; the vocabulary itself if it has none."""
    return next((size for size in range(int(vocab**0.5) + 1, 15, -1) if vocab % size == 0), vocab)


def _uniform(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) a row: splitmix64 of seed and position (Steele, Lea, Flood 2014)."""
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    with np.errstate(over="ignore"):
        state += np.array(positions, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):  # one round would leave neighbouring seeds at neighbouring positions correlated
            state += np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
