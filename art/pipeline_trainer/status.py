"""What a pipeline says about itself: a line now and then, a live line on a terminal, and a stall by its name.

Counts what it is told and reads the flow; changes nothing of it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .flow import Flow
from .settings import PipelineSettings

LIVE_EVERY_S = 0.25
TICK_S = 1.0


@dataclass
class Counts:
    """Groups since the model's first run: trained, discarded and why, and scenarios given up after failing.

    `retried` are rollouts that failed and were tried again.
    """

    trained: int = 0
    zero_variance: int = 0
    stale: int = 0
    errored: int = 0
    retried: int = 0

    @classmethod
    def of(cls, kept: Mapping[str, int]) -> Counts:
        """Those that an earlier run left."""
        return cls(**{name: int(value) for name, value in kept.items() if name in cls.__dataclass_fields__})

    def as_dict(self) -> dict[str, int]:
        """By their names."""
        return asdict(self)


@dataclass
class StatusReporter:
    """Prints the status lines of one run to stderr; `write` takes each instead when given."""

    settings: PipelineSettings
    flow: Flow
    counts: Counts
    total_scenarios: int | None = None
    write: Any = None
    reward: float | None = None
    val_reward: float | None = None
    step_s: float | None = None
    evals: int = 0
    last_error: str = ""
    _parts: dict[str, tuple[str, float]] = field(default_factory=dict)
    _progress_at: float = field(default_factory=time.monotonic)
    _named_at: float = 0.0

    def does(self, part: str, what: str) -> None:
        """The last thing that a part of the pipeline did."""
        self._parts[part] = (what, time.monotonic())

    def progress(self) -> None:
        """A rollout finished, or a step, or a part of one."""
        self._progress_at = time.monotonic()
        self._named_at = 0.0

    def stepped(self, reward: float | None, seconds: float) -> None:
        """A step was trained on groups of this mean reward."""
        alpha = self.settings.status_ewa_alpha
        if reward is not None:
            self.reward = reward if self.reward is None else alpha * reward + (1 - alpha) * self.reward
        self.step_s = seconds if self.step_s is None else alpha * seconds + (1 - alpha) * self.step_s

    def line(self) -> str:
        """The status in one line."""
        c, flow = self.counts, self.flow
        done = c.trained + c.zero_variance + c.stale + c.errored
        left = "" if self.total_scenarios is None else f" remaining={max(0, self.total_scenarios - done)}"
        ages = [flow.age(each.version) for each in flow.ready]
        age = f" oldest_age={max(ages)}" if ages else ""
        discarded = c.zero_variance + c.stale + c.errored
        return (
            f"[status] scenarios[trained={c.trained}{left} queued={len(flow.ready)}{age} training={len(flow.training)}"
            f" discarded[{discarded} 0_var={c.zero_variance} stale={c.stale} errored={c.errored} retried={c.retried}]"
            f" rollouts={len(flow.running)}/{self.settings.num_rollout_workers}]"
            f" train[step={flow.version} reward={_shown(self.reward)} step_seconds={_shown(self.step_s)}]"
            f" val[reward={_shown(self.val_reward)} active={self.evals}] waiting[{self._waiting()}]"
        )

    def stall(self, now: float | None = None) -> str | None:
        """A stall in words, once for each `stall_limit_seconds` without progress; None otherwise."""
        now = time.monotonic() if now is None else now
        limit = self.settings.stall_limit_seconds
        if now - max(self._progress_at, self._named_at) < limit:
            return None
        self._named_at = now
        parts = "; ".join(f"{part}: {what}, {now - at:.0f} s ago" for part, (what, at) in self._parts.items())
        error = f" The last error of a rollout was {self.last_error}." if self.last_error else ""
        ages = sorted((version, scenario) for scenario, version in self.flow.running.items())[:3]
        running = ", ".join(f"scenario {scenario} since step {version}" for version, scenario in ages)
        return (
            f"[stall] for {now - self._progress_at:.0f} s no rollout has finished and the optimizer took no step."
            f" The last thing each part did: {parts or 'nothing yet'}. {len(self.flow.running)} rollouts run"
            f"{f', the oldest: {running}' if running else ''}.{error} If an engine hangs, its log says so"
            " (`art ps` lists them); a rollout that may hang takes rollout_timeout_seconds."
        )

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self.write is not None:
            self.write(text)
        else:
            print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    async def run(self) -> None:
        """Print until cancelled."""
        live = self.write is None and sys.stderr.isatty()
        every = self.settings.log_interval_seconds
        tick = min(LIVE_EVERY_S if live else TICK_S, every, self.settings.stall_limit_seconds)
        said_at = time.monotonic()
        while True:
            await asyncio.sleep(tick)
            if (named := self.stall()) is not None:
                self.say(named)
            if time.monotonic() - said_at >= every:
                said_at = time.monotonic()
                self.say(self.line())
            elif live:
                print(f"\r\x1b[K{self._live()}", end="", file=sys.stderr, flush=True)

    def _live(self) -> str:
        c, flow = self.counts, self.flow
        return (
            f"scenarios[tr={c.trained} r={len(flow.running)} q={len(flow.ready)} b={len(flow.training)}"
            f" d={c.zero_variance + c.stale + c.errored}] train[s={flow.version} r={_shown(self.reward)}"
            f" dt={_shown(self.step_s)}] val[r={_shown(self.val_reward)} act={self.evals}]"
        )

    def _waiting(self) -> str:
        now = time.monotonic()
        return "; ".join(f"{part}: {what} {now - at:.0f} s" for part, (what, at) in self._parts.items())


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
