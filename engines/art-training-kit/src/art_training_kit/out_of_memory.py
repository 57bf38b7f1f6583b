"""What is done when a job doesn't fit into memory: once more with rows half as long, else an error that says what to
lower.

Knows the events of a job and how frameworks say that memory ran out. How a job is run is the trainer's.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator

import torch

from art_core.errors import TrainingFailed
from art_engine_kit.training_wire import AdapterWritten, TrainEvent

_log = logging.getLogger(__name__)
# PyTorch's allocator for the CPU raises a plain RuntimeError.
_CPU_WORDS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate")
Attempt = Callable[[int], Iterator[TrainEvent]]


class RowsTooLong(TrainingFailed):
    """The rows can't be made any shorter: the longest sequence is as long as they are."""


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
        if told:
            raise TrainingFailed(_words(what, where, error)) from error
        said = _first_line(error)
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
        raise TrainingFailed(_words(what, where, error, tried="rows half as long as well")) from error


def _words(what: str, where: str, error: BaseException | str, tried: str = "") -> str:
    said = error if isinstance(error, str) else _first_line(error)
    also = f", and with {tried}" if tried else ""
    return (
        f"{what} ran out of memory on {where}{also}: {said}. Nothing of it was kept; the step before is unchanged and"
        " still served. Lower packed_sequence_length (train), leave out the longest trajectories, or lower r or"
        " target_modules in peft_args; on a GPU, a base in 4 bits (engine unsloth, load_in_4bit) needs least."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
