"""Who may begin, what is trained next and what has grown too old, as plain state without I/O, for one event loop.

Knows scenarios by number, groups, and the versions they began with. Knows no model, no backend, no disk.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from art_core import TrajectoryGroup

from ..policy_age import mean_age
from .settings import PipelineSettings


@dataclass(frozen=True, slots=True)
class ReadyGroup:
    """A finished group: the number of its scenario, and the lowest version that its trajectories began with."""

    scenario: int
    version: int
    group: TrajectoryGroup
    actor_s: float = 0.0


@dataclass
class Flow:
    """Groups on their way from a rollout to a training step.

    Rollouts are paced instead of thrown away: those running and waiting are never more than the steps that they may
    still be trained in can take, and a batch takes the oldest first. A step waits for rollouts that would be too old
    after it, unless `late_rollouts` says otherwise; so tasks that take long are trained as often as others.
    `skipped` are numbers up to `version` that no step has: a backend gives the number of one that failed to no other.
    """

    settings: PipelineSettings
    version: int
    running: dict[int, int] = field(default_factory=dict)
    ready: list[ReadyGroup] = field(default_factory=list)
    training: tuple[ReadyGroup, ...] = ()
    skipped: set[int] = field(default_factory=set)

    @property
    def next_step(self) -> int:
        """The version that a group which begins now can be trained from, at the earliest."""
        return self.version + bool(self.training)

    def age(self, version: int) -> int:
        """The steps that were trained since a version."""
        return self.version - version - sum(step > version for step in self.skipped)

    def may_begin(self) -> bool:
        """True when one more rollout may begin."""
        s, under_way = self.settings, len(self.running) + len(self.ready)
        if s.max_steps_off_policy == 0 and under_way >= s.min_batch_size:
            return False  # it would have to be waited for
        return (
            len(self.running) < s.num_rollout_workers
            and len(self.ready) < max(s.queue_maxsize, s.min_batch_size)
            and under_way < (self.version + s.max_steps_off_policy + 1 - self.next_step) * s.max_batch_size
        )

    def begin(self, scenario: int, version: int) -> None:
        """A rollout began with a version."""
        if scenario in self.running:
            raise AssertionError(f"scenario {scenario} is running already")
        self.running[scenario] = version

    def end(self, scenario: int, finished: ReadyGroup | None) -> None:
        """A rollout ended, with a group to train on or with none."""
        del self.running[scenario]
        if finished is not None:
            self.ready.append(finished)

    def drop_stale(self) -> list[ReadyGroup]:
        """Take out the groups that no step may train any more, those of weights that are gone among them."""
        s = self.settings
        limit = s.limit_mean_steps_off_policy
        stale = [
            each
            for each in self.ready
            if not 0 <= self.age(each.version) <= s.max_steps_off_policy
            or (limit is not None and mean_age(each.group, self.age) > limit)
        ]
        if stale:
            gone = {each.scenario for each in stale}
            self.ready = [each for each in self.ready if each.scenario not in gone]
        return stale

    def must_wait(self) -> bool:
        """True when a batch taken now would leave more groups of some age than the steps they still have can train.

        Groups have the steps until they are older than max_steps_off_policy. Only what runs can be waited for.
        """
        s = self.settings
        if s.late_rollouts != "wait":
            return False
        ready = Counter(each.version for each in self.ready)
        running = Counter(self.running.values())
        finished = begun = 0
        for version in sorted(ready.keys() | running.keys()):
            finished, begun = finished + ready[version], begun + running[version]
            left = max(0, finished - s.max_batch_size) + begun
            if running[version] and left > (s.max_steps_off_policy - self.age(version)) * s.max_batch_size:
                return True
        return False

    def too_old(self) -> list[int]:
        """The running scenarios that no step may train any more."""
        oldest = self.settings.max_steps_off_policy
        return [scenario for scenario, version in self.running.items() if self.age(version) > oldest]

    def may_take(self, *, no_more: bool) -> bool:
        """True when a batch may be taken; `no_more`: nothing will begin after what runs now."""
        if self.training or not self.ready:
            return False
        # Asked after each rollout: what costs least first.
        enough = len(self.ready) >= self.settings.min_batch_size or (no_more and not self.running)
        return enough and not self.must_wait()

    def take(self) -> tuple[ReadyGroup, ...]:
        """The next batch, the oldest groups first."""
        ordered = sorted(self.ready, key=lambda each: (each.version, each.scenario))
        self.training = tuple(ordered[: self.settings.max_batch_size])
        self.ready = ordered[self.settings.max_batch_size :]
        return self.training

    def trained(self, step: int) -> None:
        """The batch was trained, and `step` is served. No other step was made since the last one."""
        self.skipped.update(range(self.version + 1, step))
        self.training, self.version = (), step
