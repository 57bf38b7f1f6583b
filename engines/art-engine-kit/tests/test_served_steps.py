"""What is served of a model, held against an oracle that keeps one flat record of every request and lease."""

from __future__ import annotations

import re

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from art_core import ModelKey
from art_core.errors import CheckpointInUse, CheckpointNotFound
from art_engine_kit.served_steps import ServedSteps

STEPS = st.integers(min_value=0, max_value=6)


class ServedStepsAgainstOracle(RuleBasedStateMachine):
    """The oracle knows only lists: what was loaded, where each request and each lease is, and every route taken."""

    def __init__(self) -> None:
        super().__init__()
        self.served = ServedSteps(ModelKey("project", "agent"))
        self.loaded: list[int] = []
        self.routes: list[int] = []
        self.requests: list[int] = []
        self.leases: list[int] = []
        self.resting = False

    @property
    def may_rest(self) -> bool:
        routed = self.routes[-1:]
        return bool(routed) and routed[0] in self.loaded and routed[0] not in self.requests + self.leases

    def used(self, step: int) -> bool:
        return step in self.requests or step in self.leases or self.routes[-1:] == [step]

    @rule(step=STEPS)
    def the_engine_loads(self, step: int) -> None:
        self.served.add(step)
        if step not in self.loaded:
            self.loaded.append(step)
        if [step] == self.routes[-1:]:
            self.resting = False

    @rule(step=STEPS)
    def route(self, step: int) -> None:
        if step not in self.loaded or (self.routes and step < self.routes[-1]):
            with pytest.raises(ValueError, match=r"not loaded|only forward"):
                self.served.route(step)
        else:
            self.served.route(step)
            self.routes.append(step)
            self.resting = False

    @rule(step=st.none() | STEPS)
    def a_request_begins(self, step: int | None) -> None:
        wanted = self.routes[-1] if step is None and self.routes else step
        if wanted is None or wanted not in self.loaded:
            asked = "project/agent" if step is None else f"project/agent@{step}"
            there = ", ".join(map(str, sorted(self.loaded))) or "none"
            with pytest.raises(CheckpointNotFound, match=re.escape(f"{asked} is not served; served steps: {there}.")):
                self.served.acquire(step)
        else:
            assert self.served.acquire(step) == wanted
            self.requests.append(wanted)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def a_request_ends(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(self.requests))
        self.requests.remove(step)
        self.served.release(step)

    @rule(step=STEPS)
    def a_request_ends_that_never_began(self, step: int) -> None:
        if step not in self.requests:
            with pytest.raises(ValueError, match="more often"):
                self.served.release(step)

    @rule(step=STEPS)
    def lease(self, step: int) -> None:
        if step not in self.loaded:
            with pytest.raises(CheckpointNotFound, match="cannot be leased"):
                self.served.lease(step)
        else:
            self.served.lease(step)
            self.leases.append(step)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(self.leases))
        self.leases.remove(step)
        self.served.end_lease(step)

    @rule(step=STEPS)
    def remove(self, step: int) -> None:
        if self.used(step):
            with pytest.raises(CheckpointInUse):
                self.served.remove(step)
        else:
            self.served.remove(step)
            if step in self.loaded:
                self.loaded.remove(step)

    @rule()
    def rest(self) -> None:
        if self.may_rest:
            assert self.served.rest() == self.routes[-1]
            self.loaded.remove(self.routes[-1])
            self.resting = True
        else:
            with pytest.raises(CheckpointInUse):
                self.served.rest()

    @rule()
    def the_engine_dies(self) -> None:
        wanted = set() if self.resting else set(self.routes[-1:])
        assert self.served.lose_all() == set(self.leases) | wanted
        self.loaded.clear()

    @invariant()
    def they_agree(self) -> None:
        assert self.served.loaded == frozenset(self.loaded)
        assert self.served.routed == (self.routes[-1] if self.routes else None)
        assert self.routes == sorted(self.routes)
        assert self.served.can_rest == self.may_rest
        assert self.served.leased == bool(self.leases)
        for step in range(7):
            assert self.served.in_flight(step) == self.requests.count(step)
            assert self.served.in_use(step) == self.used(step)
        idle = sorted(step for step in self.loaded if not self.used(step))
        assert self.served.idle() == idle
        for keep in range(9):
            kept = idle[-keep:] if keep else []
            assert self.served.idle(keep=keep) == [step for step in idle if step not in kept]


TestServedSteps = ServedStepsAgainstOracle.TestCase
TestServedSteps.settings = settings(max_examples=150, stateful_step_count=40)


def test_an_engine_that_dies_while_it_is_brought_back_still_gets_every_needed_step() -> None:
    served = ServedSteps(ModelKey("project", "agent"))
    for step in (1, 2, 3):
        served.add(step)
    served.lease(1)
    served.route(3)
    assert served.lose_all() == {1, 3}
    served.add(3)
    assert served.lose_all() == {1, 3}
    assert served.lose_all() == {1, 3}


def test_a_step_that_rests_is_not_brought_back_until_it_was_asked_for() -> None:
    served = ServedSteps(ModelKey("project", "agent"))
    served.add(2)
    served.route(2)
    assert served.rest() == 2
    for other in (1, 3):
        served.add(other)
        assert served.lose_all() == set()
    served.add(2)
    assert served.lose_all() == {2}


def test_step_zero_rests_only_while_nobody_has_it() -> None:
    served = ServedSteps(ModelKey("project", "agent"))
    served.add(0)
    served.route(0)
    for begin, end in ((served.lease, served.end_lease), (served.acquire, served.release)):
        begin(0)
        assert not served.can_rest
        end(0)
        assert served.can_rest


def test_the_steps_of_a_long_run_are_told_apart_by_their_numbers() -> None:
    served = ServedSteps(ModelKey("project", "agent"))
    served.add(1000)
    served.route(1000)
    assert served.in_use(int("1000"))
    assert served.rest() == 1000
    served.add(int("1000"))
    assert served.lose_all() == {1000}
