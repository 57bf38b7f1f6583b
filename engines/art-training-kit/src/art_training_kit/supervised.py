"""From the records of trajectories to the token rows of supervised batches: every reply is trained, nothing sampled is
needed.

Which tokens are replies is `response_masks`'. Knows no reward, no policy and no optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from art_core.errors import InvalidRequest, InvalidTrajectory
from art_core.trajectories import refuse
from art_engine_kit.chat_rendering import ChatRenderer
from art_engine_kit.group_records import GroupRecord, TrajectoryRecord

from .response_masks import reply_rows
from .rows import TokenRow

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupervisedStep:
    """The rows of each batch, in the order given; a batch of which nothing can be trained has none.

    `lengths` are those of the longest sequences of the trajectories with a reply, too long ones included.
    """

    batches: list[list[TokenRow]]
    metrics: dict[str, float]
    lengths: list[int]

    @property
    def rows(self) -> list[TokenRow]:
        """Of all batches."""
        return [row for batch in self.batches for row in batch]


def tokenize_supervised(
    groups: Iterable[GroupRecord],
    *,
    renderer: ChatRenderer,
    tokenizer: Any,
    batch_size: int,
    vocabulary_size: int,
    max_length: int,
) -> SupervisedStep:
    """Write and tokenize every history. `batch_size` trajectories in their order make a batch; those with a row longer
    than `max_length` tokens are left out of theirs, and counted.

    Raises InvalidTrajectory, naming each, for conversations that the template does not take.
    """
    batches: list[list[TokenRow]] = []
    lengths: list[int] = []
    problems: list[str] = []
    total = dropped = 0
    for total, (where, trajectory) in enumerate(_trajectories(groups), start=1):
        if (total - 1) % batch_size == 0:
            batches.append([])
        try:
            rows = _rows(trajectory, total - 1, renderer, tokenizer, where)
        except InvalidTrajectory as error:
            problems.append(str(error))
            continue
        if any(int(row.token_ids.max()) >= vocabulary_size for row in rows):
            problems.append(f"{where} holds a token outside the base model's vocabulary of {vocabulary_size}.")
        if rows:
            lengths.append(max(map(len, rows)))
        if not rows or lengths[-1] > max_length:
            dropped += 1
            continue
        batches[-1] += rows
    refuse(problems)
    metrics = {
        "data/step_num_trajectories": float(total),
        "data/step_num_dropped_trajectories": float(dropped),
    }
    return SupervisedStep(batches, metrics, lengths)


def _trajectories(groups: Iterable[GroupRecord]) -> Iterator[tuple[str, TrajectoryRecord]]:
    for g, group in enumerate(groups):
        for t, trajectory in enumerate(group.trajectories):
            yield f"trajectory_groups[{g}].trajectories[{t}]", trajectory


def _rows(
    trajectory: TrajectoryRecord, index: int, renderer: ChatRenderer, tokenizer: Any, where: str
) -> list[TokenRow]:
    made = []
    for h, record in enumerate(trajectory.histories):
        name = where if h == 0 else f"{where}.additional_histories[{h - 1}]"
        history = record.read()
        try:
            written = reply_rows(renderer, tokenizer, history.messages(), history.tools, where=name)
        except InvalidRequest as error:
            raise InvalidTrajectory(f"{name}: {error}") from error
        for problem in written.problems:
            _log.warning("%s", problem)
        made += [
            TokenRow(row.token_ids, row.trained, np.zeros(len(row.trained), np.float32), index) for row in written.rows
        ]
    return made


def rates_of(given: Sequence[float], batches: int) -> list[float]:
    """A rate for each batch. Raises ValueError where there are several and not as many as batches."""
    if len(given) not in (1, batches):
        raise ValueError(
            f"learning_rate has {len(given)} rates and the trajectories make {batches} batches; give one rate, or one"
            " for each batch."
        )
    return list(given) * batches if len(given) == 1 else list(given)
