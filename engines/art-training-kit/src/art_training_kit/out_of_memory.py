"""What is done when a job doesn't fit into memory: once more with rows half as long, else an error that says what to
lower.

Knows the events of a job and how frameworks say that memory ran out. How a job is run is the trainer's.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from art_core.errors import TrainingFailed
from art_engine_kit.training_wire import AdapterWritten, TrainEvent

from .rows import TokenRow

_log = logging.getLogger(__name__)
# PyTorch's allocator for the CPU raises a plain RuntimeError.
_CPU_WORDS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate")
Attempt = Callable[[int], Iterator[TrainEvent]]


class RowsTooLong(TrainingFailed):
    """The rows can't be made any shorter: the longest sequence is as long as they are."""


def in_parts(length: int, parts: int, rows: Sequence[TokenRow]) -> int:
    """One of `parts` of a packed row's length, and never less than the longest of `rows`.

    Raises RowsTooLong where that changes nothing.
    """
    if parts == 1:
        return length
    longest = max(map(len, rows))
    shorter = max(longest, length // parts)
    if min(length, sum(map(len, rows))) <= shorter:
        raise RowsTooLong(f"Its rows can't be shorter: the longest sequence has {longest} tokens.")
    return shorter


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_WORDS)


def tried_in_less_memory(attempt: Attempt, what: str, where: str, on_retry: Callable[[], None]) -> Iterator[TrainEvent]:
    """The events of `attempt(1)`; where that runs out of memory, those of `attempt(2)`, with rows half as long, follow.

    `what` names the job and `where` what it is computed on. `on_retry` forgets what the first attempt left. Raises
    TrainingFailed when memory doesn't suffice for that either. A job whose adapter servers were told of isn't tried
    again: its name is taken.
    """
    told = False
    try:
        for event in attempt(1):
            told = told or isinstance(event, AdapterWritten)
            yield event
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = _first_line(error)
        if told:
            raise TrainingFailed(_words(what, where, said)) from error
    # Only here is the error gone, and what its frames held with it.
    on_retry()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _log.warning("%s ran out of memory on %s (%s); trying once more with rows half as long", what, where, said)
    try:
        yield from attempt(2)
    except RowsTooLong as error:
        raise TrainingFailed(f"{_words(what, where, said)} {error}") from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingFailed(
            _words(what, f"{where}, and with rows half as long as well", _first_line(error))
        ) from error


def _words(what: str, where: str, said: str) -> str:
    return (
        f"{what} ran out of memory on {where}: {said}. Nothing of it was kept; the step before is unchanged and"
        " still served. Lower packed_sequence_length (train), leave out the longest trajectories, or lower r or"
        " target_modules in peft_args; on a GPU, a base in 4 bits (engine unsloth, load_in_4bit) needs least."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
