"""The ranks that train one job together, as one of them sees the others: who takes which packed row, whether all are
well, and the sums over all.

Every rank does the whole job but for the rows that are another's: it tokenizes, packs and steps the optimizer itself,
on gradients that are the same everywhere, so that nothing but sums travels. The first, which leads, alone saves. Knows
torch.distributed; knows no policy, no loss and no process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import torch
from torch import distributed, nn

from art_core.errors import TrainingFailed
from art_engine_kit.training_wire import AdapterWritten, TrainEvent

from .cancellation import stop_if
from .out_of_memory import Attempt, is_out_of_memory
from .packing import PackedRow

_log = logging.getLogger(__name__)
# The ranks wait for one another: for the longest row, and for the first of them while it saves.
WAIT_LIMIT = timedelta(minutes=30)


class _State(IntEnum):
    """How a rank is. Of several the largest decides what all do."""

    WELL = 0
    OUT_OF_MEMORY = 1
    FAILED = 2


class AnotherRankFailed(TrainingFailed):
    """What went wrong on another rank, in its words. All ranks give up the job, and take the next."""


class AnotherRankOutOfMemory(MemoryError):
    """Another rank has no memory left. All ranks try again, or none does."""


class Ranks:
    """All ranks of a worker, as the one with this number sees them. Made without arguments it is the only one."""

    def __init__(
        self,
        number: int = 0,
        count: int = 1,
        on_lost: Callable[[str], NoReturn] | None = None,
        *,
        in_step: bool = False,
    ) -> None:
        self.number = number
        self.count = count
        self.are_in_step = in_step
        self._on_lost = on_lost

    def in_step(self) -> Ranks:
        """These ranks, where none computes a row without all others: each has as many turns as every other."""
        return Ranks(self.number, self.count, self._on_lost, in_step=True)

    @classmethod
    def meet(cls, number: int, count: int, folder: Path, on_lost: Callable[[str], NoReturn]) -> Ranks:
        """Wait for the others, through a file in `folder`, which all must be given. `on_lost` ends the process: with a
        rank gone, nothing can be agreed on any more.
        """
        gpu = torch.cuda.is_available()
        file = folder / "ranks"
        # Fails where a rank that ended removed the folder. FileStore would wait for it for minutes, and hold the GIL,
        # so that this process couldn't even notice that another is gone.
        file.touch()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=distributed.FileStore(str(file), count),  # type: ignore[attr-defined]
            rank=number,
            world_size=count,
            timeout=WAIT_LIMIT,
        )
        return cls(number, count, on_lost)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that saves, and that the client hears."""
        return self.number == 0

    def share(self, rows: Sequence[PackedRow]) -> list[PackedRow]:
        """This rank's part of `rows`."""
        return self._dealt(rows)[self.number]

    def idle_turns(self, rows: Sequence[PackedRow]) -> int:
        """How many of the others' turns at `rows` this rank has to take part in after its own."""
        if not self.are_in_step:
            return 0
        dealt = self._dealt(rows)
        return max(map(len, dealt)) - len(dealt[self.number])

    @contextmanager
    def turn(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        """What this rank computes at once. Raises JobCancelled where the client is gone. In step, a fault within it
        ends the process: the others wait in the midst of theirs, and can't be told.
        """
        stop_if(cancelled)
        if not self.are_in_step:
            yield
            return
        # One that failed before this, or is told that the client is gone, doesn't come to it: it says so in `alike`.
        self.agree()
        try:
            yield
        except Exception as error:
            _log.exception("rank %d of %d can't go on", self.number, self.count)
            self._lost(error)

    def together(self, attempt: Attempt) -> Attempt:
        """`attempt`, left by every rank in the same way, as `alike` says. One that servers were told of isn't tried
        again, so running out of memory is then a fault like any other.
        """

        def attempted(parts: int) -> Iterator[TrainEvent]:
            told = False
            with self.alike(lambda: not told):
                for event in attempt(parts):
                    told = told or isinstance(event, AdapterWritten)
                    yield event

        return attempted

    @contextmanager
    def alike(self, may_try_again: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """A block that every rank leaves in the same way: where one fails, all do. Raises AnotherRankFailed where the
        fault is another's, and AnotherRankOutOfMemory where that may be tried again.
        """
        try:
            yield
        except (AnotherRankFailed, AnotherRankOutOfMemory):
            raise
        except Exception as error:
            again = is_out_of_memory(error) and may_try_again()
            self._agree(_State.OUT_OF_MEMORY if again else _State.FAILED, error)
            raise
        self.agree()

    def agree(self) -> None:
        """Wait until every rank is here. Raises as `alike` does where one isn't well."""
        self._agree(_State.WELL)

    def add(self, numbers: Sequence[float]) -> list[float]:
        """The sums of each number over all ranks, in float64."""
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        self._all_reduce(total)
        return [float(value) for value in total]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each parameter's gradient becomes the sum over all ranks; one that a rank has no gradient of counts as 0."""
        if self.count == 1:
            return
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        total = torch.cat([part.reshape(-1) for part in parts])
        # That took memory, which one may not have had.
        self.agree()
        self._all_reduce(total)
        for parameter, values in zip(
            parameters, torch.split(total, [each.numel() for each in parameters]), strict=True
        ):
            parameter.grad = values.view_as(parameter)

    def _agree(self, state: _State, error: Exception | None = None) -> None:
        if self.count == 1:
            return
        worst = torch.tensor(int(state))
        self._all_reduce(worst, distributed.ReduceOp.MAX)
        if worst == _State.WELL:
            return
        said: list[tuple[_State, str]] = [(state, "")] * self.count
        mine = (state, "" if error is None else f"{type(error).__name__}: {error}")
        try:
            distributed.all_gather_object(said, mine)
        except RuntimeError as lost:
            self._lost(lost)
        if worst == state:
            return
        number, words = next((rank, words) for rank, (theirs, words) in enumerate(said) if theirs == worst)
        text = f"rank {number} of {self.count} (counted from 0): {words}"
        if worst == _State.OUT_OF_MEMORY:
            raise AnotherRankOutOfMemory(text) from error
        raise AnotherRankFailed(text) from error

    def _all_reduce(self, tensor: torch.Tensor, by: distributed.ReduceOp.RedOpType | None = None) -> None:
        try:
            distributed.all_reduce(tensor, distributed.ReduceOp.SUM if by is None else by)
        except RuntimeError as error:
            self._lost(error)

    def _lost(self, error: Exception) -> NoReturn:
        assert self._on_lost is not None
        self._on_lost(
            f"rank {self.number} of {self.count} (counted from 0) can't go on: {type(error).__name__}: {error}"
        )

    def _dealt(self, rows: Sequence[PackedRow]) -> list[list[PackedRow]]:
        """The rows of each rank: the longest first, each to the one with the fewest tokens so far."""
        tokens = [0] * self.count
        dealt: list[list[PackedRow]] = [[] for _ in tokens]
        for row in sorted(rows, key=len, reverse=True):
            taker = tokens.index(min(tokens))
            tokens[taker] += len(row)
            dealt[taker].append(row)
        return dealt
