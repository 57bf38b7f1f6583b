"""What a tracker is told by its suite, model by model, and the form in which a test hands back what it kept.

Both sides read it: the process that reports, and the checks that compare. It knows no tracker and opens nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from openai.types.chat.chat_completion import Choice

from art_core import ModelKey, Trajectory, TrajectoryGroup

#: Stands where a key would: in the environment, and on the model.
SECRET: Final = "5ec4e7" * 6 + "5ec4"
#: A checkpoint's path where the backend keeps it elsewhere.
ELSEWHERE: Final = "team/shop/agent:step7"
#: The other tracker, which must hear of everything whatever happens to the one that is checked.
LISTENER: Final = "conformance-listener"


@dataclass(frozen=True, kw_only=True)
class KeptRow:
    """One row of metrics as a tracker gives it back. `split` is None where only the metrics' names tell it."""

    step: int
    metrics: Mapping[str, float]
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class KeptModel:
    """What a tracker kept of one model: rows in the order in which they were logged, and by step and split how many
    trajectories and failed rollouts there were, together.
    """

    rows: Sequence[KeptRow] = ()
    trajectories: Mapping[tuple[int, str], int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One thing that a tracker is told. Exactly one of `metrics`, `groups` and `checkpoint` is given."""

    step: int
    split: str = "train"
    metrics: Mapping[str, float] | None = None
    groups: Sequence[TrajectoryGroup] | None = None
    checkpoint: str | None = None

    @property
    def hook(self) -> str:
        """The hook that tells it."""
        if self.metrics is not None:
            return "art_log_metrics"
        return "art_log_trajectories" if self.groups is not None else "art_checkpoint_published"


def _training(steps: Sequence[int], offset: float = 0.0) -> list[Report]:
    reports = []
    for step in steps:
        loss = {"train/reward": step + 0.1 + offset, "loss/train": 1 / (step + 3) + offset}
        reports += [Report(step=step, metrics=loss), Report(step=step, groups=_groups(2, 3))]
        if step:
            reports.append(Report(step=step, split="val", metrics={"val/reward": step / 7 + offset}))
            reports.append(Report(step=step, split="val", groups=_groups(1, 2)))
    return reports


def _groups(groups: int, size: int, failed: int = 0) -> list[TrajectoryGroup]:
    errors = [RuntimeError(f"the tool said no, {n}") for n in range(failed)]
    return [TrajectoryGroup([_trajectory(n) for n in range(size)], exceptions=errors) for _ in range(groups)]


def _trajectory(reward: float, *messages: Any) -> Trajectory:
    asked: list[Any] = [{"role": "user", "content": "What is 2 + 2?"}]
    return Trajectory(
        messages_and_choices=asked + list(messages or ({"role": "assistant", "content": "4"},)), reward=reward
    )


def _any_content() -> list[TrajectoryGroup]:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer = {"role": "assistant", "content": "größer \U0001f600 <b>&amp;</b>\n\n\t\\"}
    choice = Choice.model_validate(
        {"index": 0, "finish_reason": "stop", "message": answer, "token_ids": [7, 2**40], "prompt_token_ids": [1]}
    )
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    trajectories = [
        _trajectory(1.0, calls, {"role": "tool", "tool_call_id": "c1", "content": ""}),
        _trajectory(0.0, {"role": "user", "content": [{"type": "text", "text": "look"}, image]}),
        _trajectory(-1e300, choice),
        _trajectory(0.5, {"role": "assistant", "content": "half of a pair: \ud83d"}),
        _trajectory(0.5, {"role": "assistant", "content": "long " * 20_000}),
    ]
    return [TrajectoryGroup(trajectories), TrajectoryGroup([])]


AGENT, TWICE, STRANGE, NAMED = (ModelKey("shop", name) for name in ("agent", "twice", "not-finite", "odd-names"))
MANY, ANYTHING, REMOTE = (ModelKey("shop", name) for name in ("many", "any-content", "remote"))
GOES_ON, PATIENT = (ModelKey("shop", name) for name in ("goes-on", "patient"))
#: Each is told the same steps at once, with values of its own.
TOGETHER: Final = (ModelKey("shop", "agent-2"), ModelKey("shop", "Agent.2"), ModelKey("mill", "agent-2"))
NAMES: Final = {
    "reward/größe": 1.0,
    "val/奖励 \U0001f600": 2.0,
    "time/step of the loop (s)": 3.0,
    "loss/a.b.c": 4.0,
    "metrics/\"quoted\", 'so' and \\": 5.0,
    "data/" + "long" * 50: 6.0,
    "train/step": 7.0,
}

TOLD: Final[Mapping[ModelKey, Sequence[Report]]] = {
    AGENT: _training(range(3)),
    TWICE: [
        Report(step=1, metrics={"loss/train": 1.0, "time/step_s": 2.0}),
        Report(step=1, metrics={"loss/train": 0.5, "val/reward": 3.0}),
    ],
    STRANGE: [
        Report(
            step=1,
            metrics={"loss/a": math.nan, "loss/b": math.inf, "loss/c": -math.inf, "loss/train": 0.25, "loss/d": 1e-320},
        )
    ],
    NAMED: [Report(step=1, metrics=NAMES)],
    MANY: [Report(step=1, groups=_groups(30, 10, failed=1)), Report(step=2, split="val", groups=_groups(1, 1))],
    ANYTHING: [Report(step=1, groups=_any_content())],
    REMOTE: [Report(step=7, metrics={"loss/train": 1.0}), Report(step=7, checkpoint=ELSEWHERE)],
    GOES_ON: _training(range(2)),
    **{key: _training(range(3), offset=100.0 * (n + 1)) for n, key in enumerate(TOGETHER)},
}
#: What a second process adds.
AFTERWARDS: Final[Mapping[ModelKey, Sequence[Report]]] = {GOES_ON: _training(range(2, 4))}
#: What is told where writing fails, or takes its time.
SHORT: Final[Mapping[ModelKey, Sequence[Report]]] = {PATIENT: _training(range(3))}
#: What isn't to be reported, a checkpoint of this machine among it.
NOT_ASKED: Final[Mapping[ModelKey, Sequence[Report]]] = {AGENT: [*_training(range(2)), Report(step=1, checkpoint="")]}
SCENARIOS: Final[Mapping[str, Mapping[ModelKey, Sequence[Report]]]] = {
    "told": TOLD,
    "afterwards": AFTERWARDS,
    "broken": SHORT,
    "slow": SHORT,
    "not asked": NOT_ASKED,
}
