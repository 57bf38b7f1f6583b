"""The canary that a checkpoint carries: short prompts of its own training data, and what comes next under its weights.

An engine that loaded the checkpoint must answer as it says; the weights it was trained from must not. Knows a policy
and token rows; who asks the engine is not its business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from art_engine_kit.canary import Canary, CanaryPrompt

from .packing import PackedRow, pack_rows
from .policy import Policy
from .rows import Ints, TokenRow

# Few and short: the trainer computes them and the engine answers them while everybody waits for the new step. Enough
# that what is wrong can be told from how an engine rounds. Those of a stretch go on one from another, a token each, so
# that the trainer computes what they share once: 24 tokens in place of 65.
_PROMPTS = 10
_IN_A_STRETCH = 4
_SHORTEST_TOKENS = 5
_TOP = 10
_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# On SmolLM2 a step at a learning rate of 1e-3 goes by 0.01 nats, at 1e-2 by 0.5, at 0.1 by 9 and at 1e3 by 12 to 22.
_CLIFF = 6.0


class CanaryMaker:
    """Chooses prompts before a step is trained, remembers the old weights' answers, and asks the new ones after it."""

    def __init__(self, policy: Policy, rows: Sequence[TokenRow]) -> None:
        """Must be made while the policy still has the weights that training starts from."""
        self._policy = policy
        self._prompts = _choose(rows)
        self._row, self._places = _pack(self._prompts)
        self._largest_logit = 0.0
        self._before = self._ask()
        self._after = self._before
        with policy.reference(None):
            self._base = self._ask()

    @property
    def prompts(self) -> list[list[int]]:
        """Their token ids."""
        return [prompt.tolist() for prompt in self._prompts]

    def make(self) -> Canary:
        """The prompts, with the new adapter's most likely tokens and their logprobs under the new, the old and none."""
        after = self._after = self._ask()
        top = after.topk(min(_TOP, after.shape[1]))

        def under(logprobs: Tensor, index: int) -> dict[int, float]:
            ids = top.indices[index]
            return dict(zip(ids.tolist(), logprobs[index, ids].tolist(), strict=True))

        return Canary(
            prompts=[
                CanaryPrompt(
                    token_ids=token_ids,
                    expected=under(after, index),
                    previous=under(self._before, index),
                    base=under(self._base, index),
                )
                for index, token_ids in enumerate(self.prompts)
            ],
            exact_to=self._rounding(),
        )

    def went_wrong(self) -> str:
        """Why the policy that `make` asked is no policy any more; empty when it is one.

        Its logprobs are not finite, or what the old policy says next is a surprise to it that is larger than uniform
        guessing's, and by more than _CLIFF nats a token larger than it was to the old one itself.
        """
        if not bool(self._after.isfinite().all()):
            return "the logprobs of the policy that comes out of it are not finite"
        old = self._before.exp()
        surprise = -float((old * self._after).sum(-1).mean())
        usual = -float((old * self._before).sum(-1).mean())
        guessing = math.log(old.shape[1])
        if surprise < max(guessing, usual + _CLIFF):
            return ""
        return (
            "the policy that comes out of it knows less of what the one before says next than uniform guessing does"
            f" ({surprise:.1f} nats a token; {usual:.1f} before the step, {guessing:.1f} by guessing)"
        )

    def _ask(self) -> Tensor:
        """Logprobs [prompts, vocabulary] of the next token, on the CPU."""
        with torch.no_grad(), _half_of_the_threads():
            hidden = self._policy.hidden_states(self._row)[self._places.to(self._policy.device)]
            logits = (hidden @ self._policy.output_weight.T).float()
            self._largest_logit = max(self._largest_logit, float(logits.abs().max()))
            return torch.log_softmax(logits, -1).cpu()

    def _rounding(self) -> float:
        """A number between two neighbours of the policy's format, at the size of its logits, is off by a quarter of
        their distance in the mean.
        """
        return torch.finfo(self._policy.output_weight.dtype).eps * self._largest_logit / 4


@contextmanager
def _half_of_the_threads() -> Iterator[None]:
    """A server under load computes on the same cores, and threads that wait for one another at every product lose more
    by that than so short a row gains by them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _choose(rows: Sequence[TokenRow]) -> list[Ints]:
    """Prompts of stretches that are spread over the rows and within them, each prompt once: right before sampled tokens
    while there are such.
    """
    spread = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, _PROMPTS).astype(int))]
    # As far from each other as so few stretches can be.
    ordered = spread[::_IN_A_STRETCH] + [row for i, row in enumerate(spread) if i % _IN_A_STRETCH]
    sampled = ((row, int(row.trained[int(part * (len(row.trained) - 1))])) for part in _PARTS for row in ordered)
    others = ((row, 1 + int(part * (len(row) - 2))) for part in _PARTS for row in ordered)
    prompts: dict[bytes, Ints] = {}
    for row, place in (*sampled, *others):
        start = max(0, place - _SHORTEST_TOKENS)
        for end in range(place, min(place + _IN_A_STRETCH, len(row))):
            prompt = row.token_ids[start:end]
            prompts.setdefault(prompt.tobytes(), prompt)
            if len(prompts) == _PROMPTS:
                return list(prompts.values())
    return list(prompts.values())


def _pack(prompts: Sequence[Ints]) -> tuple[PackedRow, Tensor]:
    """One packed row of all prompts, and the position in it of each prompt's last token."""
    rows = [
        TokenRow(
            np.append(prompt, 0).astype(np.int32),
            np.array([len(prompt)], np.int32),
            np.zeros(1, np.float32),
            trajectory,
        )
        for trajectory, prompt in enumerate(prompts)
    ]
    (row,) = pack_rows(rows, sum(map(len, rows)))
    places = np.empty(len(prompts), dtype=np.int64)
    places[row.entry_trajectory] = row.parents[row.target_parent[row.entry_target]]
    return row, torch.from_numpy(places)
