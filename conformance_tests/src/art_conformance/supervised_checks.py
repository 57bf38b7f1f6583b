"""What supervised steps must do: train on replies, and take their place among the other steps.

Part of `BackendConformance`; applies to backends that declare `sft`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from art_core import ArtError, BackendCapability, Trajectory

from .agents import SMALL_RATE, Agent, version_of
from .backend_fixtures import BackendSuite
from .oracle import Oracle
from .requirements import MUST, check

LESSONS = [
    ("Say something about the city.", "It is so."),
    ("Is it so? 12", "The city of the word 12."),
    ("Answer with a word.", "A city."),
]


def lessons() -> list[Trajectory]:
    """A conversation for each lesson; their rewards are nobody's business."""
    return [
        Trajectory(
            messages_and_choices=[{"role": "user", "content": asked}, {"role": "assistant", "content": reply}],
            reward=-1.0,
        )
        for asked, reply in LESSONS
    ]


def likelihood(oracle: Oracle, adapter: Path | None) -> float:
    """The mean logprob, in nats, of the lessons' reply tokens."""
    values = []
    for asked, reply in LESSONS:
        ids = oracle.tokenizer(reply, add_special_tokens=False)["input_ids"]
        values.append(oracle.logprobs(oracle.chat_ids([{"role": "user", "content": asked}]), ids, adapter))
    return float(np.concatenate(values).mean())


class SupervisedChecks(BackendSuite):
    """The checks of `train_sft`."""

    @check(
        *(
            "BCK-034",
            MUST,
            "train_sft makes one step that says its replies likelier; training by rewards goes on from it.",
        ),
        needs=BackendCapability.SFT,
        live=True,
    )
    async def test_supervised_step(self, agent: Agent, oracle: Oracle) -> None:
        result = await agent.backend.train_sft(agent.model, lessons(), learning_rate=1e-2, batch_size=2)
        assert result.step == 1 == await agent.backend.get_step(agent.model)
        assert math.isfinite(result.metrics["loss/train"])
        folder = await agent.folder(1)
        before, after = likelihood(oracle, None), likelihood(oracle, folder)
        assert after > before, f"the replies are no likelier: {before:.4f} before, {after:.4f} after, in nats a token"
        found = await agent.ask(n=2)
        assert {version_of(sample) for sample in found} == {1}
        self.assert_answers_as(oracle, found, folder, [None])
        assert (await agent.train(learning_rate=SMALL_RATE)).step == 2

    @check(
        *("BCK-035", MUST, "An option of train_sft that can't be is refused by name before anything happens."),
        needs=BackendCapability.SFT,
        live=True,
    )
    async def test_supervised_options(self, agent: Agent) -> None:
        for wrong in ({"batch_size": 0}, {"learning_rate": -1.0}, {"batch_sise": 2}):
            with pytest.raises((ArtError, ValueError), match=next(iter(wrong))):
                await agent.backend.train_sft(agent.model, lessons(), **wrong)
        assert await agent.backend.get_step(agent.model) == 0
