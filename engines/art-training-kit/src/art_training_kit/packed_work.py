"""What one job trains once it is packed, whatever it learns from, and what is said of it at its start and its end.

Knows rows and counts. How a gradient is taken, and what is loaded and saved, is the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from art_engine_kit.training_wire import JobStarted

from .optimizer import OptimizerOptions
from .packing import PackedRow
from .rows import TokenRow

# One optimizer step under way: a number after each row, and its metrics at the end.
GradientStepRun = Iterator[int | dict[str, float]]


@dataclass(frozen=True)
class PackedWork:
    """What one job trains, once it is packed. `gradient_steps` makes them one after the other, from the adapter that is
    loaded by then.
    """

    counts: dict[str, float]
    rows: Sequence[TokenRow]
    packed: Sequence[PackedRow]
    num_gradient_steps: int
    gradient_steps: Callable[[], Iterable[GradientStepRun]]
    optimizer_options: OptimizerOptions
    learns_from: str

    @property
    def tokens(self) -> int:
        """Of all rows, shared prefixes counted each time."""
        return sum(map(len, self.rows))

    @property
    def packed_tokens(self) -> int:
        """Of all rows, shared prefixes counted once."""
        return sum(map(len, self.packed))

    @property
    def trained_tokens(self) -> int:
        """Of all rows, those in the loss."""
        return sum(len(row.trained) for row in self.rows)

    def started(self) -> JobStarted:
        """What a job says of it at first."""
        return JobStarted(
            num_sequences=len(self.rows),
            num_rows=len(self.packed),
            packed_tokens=self.packed_tokens,
            trained_tokens=self.trained_tokens,
        )

    def metrics(self, seconds: float) -> dict[str, float]:
        """What it came to, in this many seconds."""
        counted = totals(
            tokens=self.tokens,
            trained=self.trained_tokens,
            packed=self.packed_tokens,
            gradient_steps=self.num_gradient_steps,
        )
        speed = {"time/step_trainer_s": seconds, "throughput/step_trainer_tok_per_s": self.tokens / seconds}
        return self.counts | counted | speed


def totals(*, tokens: int, trained: int, packed: int, gradient_steps: int) -> dict[str, float]:
    """A step's totals, by the names of its metrics."""
    return {
        "data/step_trainer_tokens": float(tokens),
        "data/step_trained_tokens": float(trained),
        "data/step_packed_tokens": float(packed),
        "data/step_num_gradient_steps": float(gradient_steps),
    }


def mean_of(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the gradient steps that have it; the first has them all."""
    return {key: fmean(sample[key] for sample in samples if key in sample) for key in samples[0]}
