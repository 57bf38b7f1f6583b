"""Says of an error in writing a step what it means for the run. Knows errors and jobs."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from art_engine_kit.training_wire import TrainJob


@contextmanager
def explained(job: TrainJob) -> Iterator[None]:
    """Says of an error in writing what it means for the run."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        full = error.errno == errno.ENOSPC
        what = "the disk is full" if full else str(error)
        todo = "Free some space there and train the step again" if full else "Mend that and train the step again"
        raise OSError(
            f"step {job.step} of {job.model} could not be saved to {job.destination}: {what}. Nothing of it was"
            " kept, and the"
            f" step before is unchanged. {todo}."
        ) from error
