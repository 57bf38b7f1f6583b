"""How long a step took and how many tokens a second it sampled and trained, from one `model.log` to the next.

Gathering notes on each group when its rollouts began and ended; nothing else is timed here. Knows groups and the names
of metrics; writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from art_core import TrajectoryGroup

from .progress import completion_tokens

# Not a field, since it is no part of what was sampled: it is neither written nor compared.
_SPAN = "_gathered_from_to"


def moment() -> float:
    """Seconds of a clock that nobody sets."""
    return time.monotonic()


def note_gathered(group: TrajectoryGroup, began: float) -> None:
    """Note that a group's rollouts began at that moment and have just ended."""
    object.__setattr__(group, _SPAN, (began, moment()))


@dataclass
class StepClock:
    """The clock of one model in this process. It starts with the first group that is logged.

    `sampled` and `trained` are tokens and the seconds that they took.
    """

    begun: float | None = None
    last: float = 0.0
    sampled: tuple[float, float] = (0.0, 0.0)
    trained: tuple[float, float] = (0.0, 0.0)

    def metrics(self, groups: Sequence[TrajectoryGroup], split: str, given: Mapping[str, float]) -> dict[str, float]:
        """`time/*` and `throughput/*` of what is logged now, by their full names; empty for groups not gathered here.

        `time/step_actor_s` is from the first rollout's begin to the last one's end, `time/step_wall_s` from the last
        logged training step to now. The idle seconds are the rest of that wall for the actor and for the trainer; the
        averages are over all of this process's steps, in tokens a second. Any split but "train" is an evaluation.
        """
        spans = [span for group in groups if (span := getattr(group, _SPAN, None))]
        if not spans:
            return {}
        began = min(begin for begin, _ in spans)
        actor_s = max(end for _, end in spans) - began
        if split != "train":
            return {"time/step_eval_s": actor_s}
        now = moment()
        if self.begun is None:
            self.begun = self.last = began
        wall_s, self.last = now - self.last, now
        tokens = sum(completion_tokens(trajectory) for group in groups for trajectory in group)
        self.sampled = _added(self.sampled, tokens, actor_s)
        found = {
            "time/wall_clock_sec": now - self.begun,
            "time/step_wall_s": wall_s,
            "time/step_actor_s": actor_s,
            "throughput/step_actor_idle_s": max(0.0, wall_s - actor_s),
            "throughput/avg_actor_tok_per_s": _rate(self.sampled),
        }
        trainer_s = given.get("time/step_trainer_s")
        if trainer_s is not None:
            self.trained = _added(self.trained, given.get("data/step_trainer_tokens", 0.0), trainer_s)
            found["throughput/step_trainer_idle_s"] = max(0.0, wall_s - trainer_s)
            found["throughput/avg_trainer_tok_per_s"] = _rate(self.trained)
        return found


def _added(total: tuple[float, float], tokens: float, seconds: float) -> tuple[float, float]:
    return total[0] + tokens, total[1] + seconds


def _rate(total: tuple[float, float]) -> float:
    tokens, seconds = total
    return tokens / seconds if seconds else 0.0
