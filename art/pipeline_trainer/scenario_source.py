"""Scenarios in order, from an iterable or an asynchronous one, each with its number; those to be tried again first.

Goes on where an earlier run was by reading the source from its begin. Knows nothing of rollouts.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from contextlib import aclosing
from typing import Any

from art_core import ArtError


class ScenarioSourceFailed(ArtError):
    """The iterator of scenarios raised; `__cause__` is what it raised."""


class ScenarioSource:
    """Scenarios of a source that gives the same ones in the same order each time it is begun.

    `offset` are to be passed over, but for `unfinished`: numbers below it, with the attempts made at each.
    """

    def __init__(
        self, scenarios: Iterable[Any] | AsyncIterable[Any], *, offset: int, unfinished: Mapping[int, int]
    ) -> None:
        self._source = _read(scenarios)
        self._position, self._offset = 0, offset
        self.attempts = dict(unfinished)
        self._again: dict[int, Any] = {}
        self._ended = False

    @property
    def handed_out(self) -> int:
        """How many scenarios were handed out, counting from the source's begin."""
        return max(self._position, self._offset)

    @property
    def ended(self) -> bool:
        """True when there is none left, neither in the source nor to be tried again."""
        return self._ended and not self._again

    async def next(self) -> tuple[int, Any] | None:
        """The next scenario and its number; None at the end. Raises ScenarioSourceFailed."""
        if self._again:
            number = min(self._again)
            return number, self._again.pop(number)
        while not self._ended:
            try:
                scenario = await anext(self._source)
            except StopAsyncIteration:
                self._ended = True
                break
            except Exception as error:
                raise ScenarioSourceFailed(
                    f"the source of scenarios raised {type(error).__name__}: {error} after {self._position} scenarios,"
                    " so the run ends. What was finished is kept: mend the source and run again."
                ) from error
            number, self._position = self._position, self._position + 1
            if number >= self._offset or number in self.attempts:
                return number, scenario
        return None

    def again(self, number: int, scenario: Any) -> None:
        """Hand it out once more, before any new one."""
        self._again[number] = scenario

    async def close(self) -> None:
        """Let the source go."""
        async with aclosing(self._source):
            return


async def _read(scenarios: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any]:
    if isinstance(scenarios, AsyncIterable):
        async for scenario in scenarios:
            yield scenario
    else:
        for scenario in scenarios:
            yield scenario
