"""The bar of a gathering: how many rollouts are done, the mean reward and metrics so far, and how many raised.

Work per finished rollout is fixed, whatever their number: sums are kept, and the bar's text is made only when it is
about to be drawn. Where nobody sees a bar move, a plain line comes now and then instead, and one in the end. When none
ends for a while, it names the one that has run longest. Knows trajectories and tqdm; decides nothing.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from art_core import RolloutError, Trajectory, TrajectoryGroup

REDRAW_S = 0.1
PLAIN_EVERY_S = 10.0
_PLAIN = "{desc}: {percentage:.0f}%, {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class RolloutProgress:
    """Counts finished rollouts and shows them on stderr as tqdm does; shows nothing without a description.

    `total` is how many are known to come. `max_metrics` limits how many metrics are shown beside the reward, None for
    all. `completion_tokens` counts the sampled tokens too.
    """

    def __init__(
        self, description: str | None, *, total: int, max_metrics: int | None = None, completion_tokens: bool = False
    ) -> None:
        self._description = description
        self.total = total
        self._max_metrics = max_metrics
        self._count_tokens = completion_tokens
        self._sums: dict[str, tuple[float, int]] = {}
        self._tokens = 0
        self._done = 0
        self._begun = self._drawn_at = time.monotonic()
        self._every_s = REDRAW_S if _moves() else PLAIN_EVERY_S
        self._bar: Any = None
        self._advanced_at = self._begun
        # In the order in which they began, so that the first has run longest.
        self._running: dict[int, tuple[str, float]] = {}
        self._started = 0
        self._tick: asyncio.TimerHandle | None = None
        self.exceptions = 0

    def __enter__(self) -> Self:
        if self._description is not None and _moves():
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(desc=self._description, total=self.total, mininterval=REDRAW_S, dynamic_ncols=True)
        if self._description is not None:
            self._tick = asyncio.get_running_loop().call_later(PLAIN_EVERY_S, self._tell_of_waiting)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._tick is not None:
            self._tick.cancel()
        if self._description is not None:
            self._draw()
        if self._bar is not None:
            self._bar.close()

    def expect(self, more: int) -> None:
        """That many more rollouts turned out to belong to it."""
        self.total += more
        if self._bar is not None:
            self._bar.total = self.total

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """While it lasts, `what` is one of those that are waited for."""
        self._started += 1
        number = self._started
        self._running[number] = (what, time.monotonic())
        try:
            yield
        finally:
            del self._running[number]

    def rollout(self, result: Trajectory | BaseException | RolloutError) -> None:
        """One rollout ended."""
        self._count(result)
        self._advance()

    def batch(self, groups: Sequence[TrajectoryGroup]) -> None:
        """A batch of groups ended, which counts as one."""
        for group in groups:
            for trajectory in group.trajectories:
                self._count(trajectory)
            for error in group.exceptions:
                self._count(error)
        self._advance()

    def _count(self, result: Trajectory | BaseException | RolloutError) -> None:
        if isinstance(result, Trajectory):
            self._add("reward", result.reward)
            for name, value in result.metrics.items():
                self._add(name, float(value))
            if self._count_tokens and self._description is not None:
                self._tokens += completion_tokens(result)
        else:
            self.exceptions += 1

    def _advance(self) -> None:
        self._done += 1
        if self._description is None:
            return
        self._advanced_at = time.monotonic()
        if self._advanced_at - self._drawn_at >= self._every_s:
            self._draw()

    def _tell_of_waiting(self) -> None:
        if self._running and time.monotonic() - self._advanced_at >= PLAIN_EVERY_S:
            what, began = next(iter(self._running.values()))
            more = f" and {len(self._running) - 1} more" if len(self._running) > 1 else ""
            self._draw(f"waiting for {what}, running for {time.monotonic() - began:.0f} s{more}")
        self._tick = asyncio.get_running_loop().call_later(PLAIN_EVERY_S, self._tell_of_waiting)

    def _add(self, name: str, value: float) -> None:
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, count + 1)

    def _draw(self, waiting: str = "") -> None:
        self._drawn_at = time.monotonic()
        shown = {name: total / count for name, (total, count) in list(self._sums.items())[: self._shown_metrics()]}
        text: dict[str, Any] = {name: f"{mean:.4g}" for name, mean in shown.items()}
        if self._count_tokens:
            text["completion_tokens"] = self._tokens
        if self.exceptions:
            text["exceptions"] = self.exceptions
        postfix = ", ".join([*(f"{name}={value}" for name, value in text.items()), *([waiting] if waiting else [])])
        if self._bar is None:
            self._print(postfix)
            return
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update(self._done - self._bar.n)
        if waiting:
            self._bar.refresh()

    def _print(self, postfix: str) -> None:
        from tqdm import tqdm

        elapsed = time.monotonic() - self._begun
        line = tqdm.format_meter(
            self._done, self.total, elapsed, prefix=self._description, postfix=postfix, bar_format=_PLAIN
        )
        print(line, file=sys.stderr, flush=True)

    def _shown_metrics(self) -> int | None:
        return None if self._max_metrics is None else self._max_metrics + 1  # the reward comes first


def _moves() -> bool:
    """Whether what is written to stderr can be written over: on a terminal, and in a notebook's cell."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def completion_tokens(trajectory: Trajectory) -> int:
    """How many tokens were sampled, by the choices' token ids or else their logprobs."""
    total = 0
    for history in trajectory.histories():
        for choice in history.choices():
            token_ids = getattr(choice, "token_ids", None)
            if token_ids is None:
                token_ids = (choice.logprobs.content if choice.logprobs else None) or ()
            total += len(token_ids)
    return total
