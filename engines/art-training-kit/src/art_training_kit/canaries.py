"""The canary that a checkpoint carries: short prompts of its own training data, and what comes next under its weights.

An engine that loaded the checkpoint must answer as it says; the weights it was trained from must not. Knows a policy
and token rows; who asks the engine is not its business.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from art_engine_kit.canary import Canary, CanaryPrompt

from .packing import PackedRow, pack_rows
from .policy import Policy
from .rows import Ints, TokenRow

# Few and short: the trainer computes them and the engine answers them while everybody waits for the new step.
_PROMPTS = 3
_CANDIDATES = 4
_PROMPT_TOKENS = 12
_TOP = 10


class CanaryMaker:
    """Chooses prompts before a step is trained, remembers the old weights' answers, and asks the new ones after it."""

    def __init__(self, policy: Policy, rows: Sequence[TokenRow]) -> None:
        """Must be made while the policy still has the weights that training starts from."""
        self._policy = policy
        self._prompts = _choose(rows)
        self._row, self._places = _pack(self._prompts)
        self._before = self._ask()

    def make(self) -> Canary:
        """The prompts whose next token training moved most, with both weights' logprobs of the new ones' most likely
        tokens.
        """
        after = self._ask()
        top = after.topk(min(_TOP, after.shape[1]))
        before = self._before.gather(1, top.indices)
        moved = (top.values - before).abs().mean(1)
        chosen = moved.argsort(descending=True, stable=True)[:_PROMPTS].tolist()
        return Canary(
            prompts=[
                CanaryPrompt(
                    token_ids=self._prompts[i].tolist(),
                    expected=dict(zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)),
                    previous=dict(zip(top.indices[i].tolist(), before[i].tolist(), strict=True)),
                )
                for i in chosen
            ]
        )

    def _ask(self) -> Tensor:
        """Logprobs [prompts, vocabulary] of the next token, on the CPU."""
        with torch.no_grad():
            hidden = self._policy.hidden_states(self._row)[self._places.to(self._policy.device)]
            return torch.log_softmax((hidden @ self._policy.output_weight.T).float(), -1).cpu()


def _choose(rows: Sequence[TokenRow]) -> list[Ints]:
    """Prompts that end right before a sampled token, spread over the rows and within them, each once."""
    prompts: dict[bytes, Ints] = {}
    spread = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, _CANDIDATES).astype(int))]
    for quarter in (0.0, 0.25, 0.5):
        for row in spread:
            end = int(row.trained[int(quarter * (len(row.trained) - 1))])
            prompt = row.token_ids[max(0, end - _PROMPT_TOKENS) : end]
            prompts.setdefault(prompt.tobytes(), prompt)
            if len(prompts) == _CANDIDATES:
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
