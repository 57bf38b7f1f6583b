"""What one step of supervised fine-tuning can be told: the keyword arguments of `train_sft`.

Knows numbers and how many batches they make; knows no loss and no trajectory.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from .keyword_options import KeywordOptions
from .train_options import TrainOptions
from .training_wire import SupervisedOptions

AUTO_BATCH_SIZE: Final = 2
Rate = Annotated[float, Field(ge=0)]


class SftOptions(KeywordOptions):
    """The keyword arguments of `LocalBackend.train_sft`."""

    learning_rate: Rate | list[Rate] = 5e-5
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    packed_sequence_length: int | None = Field(None, ge=1)
    save_checkpoint: bool = True

    def supervised(self, num_trajectories: int, *, where: str) -> SupervisedOptions:
        """What the worker is told. Raises ValueError for no trajectories, and when there are several rates and not one
        for each batch.
        """
        if not num_trajectories:
            raise ValueError(f"{where}: there are no trajectories to train on.")
        size = AUTO_BATCH_SIZE if self.batch_size == "auto" else self.batch_size
        batches = -(-num_trajectories // size)
        rates = self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]
        if isinstance(self.learning_rate, list) and len(rates) != batches:
            raise ValueError(
                f"{where}: learning_rate has {len(rates)} rates, and {num_trajectories} trajectories make {batches}"
                f" batches of {size}; give one rate, or one for each batch."
            )
        return SupervisedOptions(learning_rates=rates, batch_size=size)

    def train_options(self) -> TrainOptions:
        """What a supervised job reads of a step's options."""
        return TrainOptions(packed_sequence_length=self.packed_sequence_length)
