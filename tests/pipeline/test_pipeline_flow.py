"""The flow and the kept state together, against a model: each scenario is somewhere, once; nothing trained is old."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import art
from art.pipeline_trainer.flow import Flow, ReadyGroup
from art.pipeline_trainer.kept_state import KeptState
from art.pipeline_trainer.settings import PipelineSettings

TOTAL = 1000


def settings_of(**given):
    return PipelineSettings(**{
        "num_rollout_workers": 5, "min_batch_size": 2, "max_batch_size": 3, "max_steps_off_policy": 1,
        "queue_maxsize": 8, "limit_mean_steps_off_policy": None, "late_rollouts": "wait", "update": "pinned",
        "max_steps": None, "discard_queue_multiplier": 100, "log_interval_seconds": 60, "stall_limit_seconds": 60,
        "rollout_timeout_seconds": None, "max_attempts": 2, "max_failures_in_a_row": 9, "eval_every_n_steps": 0,
        "eval_at_start": False, "checkpoint_retention_interval": 1, "status_ewa_alpha": 0.2, **given,
    })  # fmt: skip


def group():
    return art.TrajectoryGroup([art.Trajectory(reward=0.0), art.Trajectory(reward=1.0)])


class Pipeline(RuleBasedStateMachine):
    """The oracle is four sets of scenarios, running, waiting, done with, and in the batch; and the list of the steps
    that were trained, whose numbers may leave some out.
    """

    @initialize(
        off_policy=st.integers(0, 3), least=st.integers(1, 3), more=st.integers(0, 3), workers=st.integers(1, 8),
        late=st.sampled_from(["wait", "discard"]),
    )  # fmt: skip
    def begin(self, off_policy, least, more, workers, late):
        self.settings = settings_of(
            max_steps_off_policy=off_policy, min_batch_size=least, max_batch_size=least + more,
            num_rollout_workers=workers, late_rollouts=late, queue_maxsize=max(1, off_policy * (least + more)),
        )  # fmt: skip
        self.folder = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.step, self.steps = 0, [0]
        self.running, self.waiting, self.batch, self.done = set(), set(), set(), set()
        self.next, self.again = 0, []
        self.open()

    def open(self):
        self.kept = KeptState(Path(self.folder.name))
        kept = self.run(self.kept.open(self.step, resume=True))
        self.flow = Flow(self.settings, self.step, skipped=set(kept.skipped))
        self.flow.ready = [ReadyGroup(g.scenario, g.version, g.group) for g in kept.groups]
        return kept

    def age(self, version):
        return sum(step > version for step in self.steps)

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    @precondition(lambda self: self.flow.may_begin())
    @rule()
    def start(self):
        number = self.again.pop(0) if self.again else self.next
        self.next = max(self.next, number + 1)
        self.flow.begin(number, self.flow.version)
        self.run(self.kept.handed_out(number, 0, self.next))
        self.running.add(number)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(["group", "equal", "fail"]))
    def end(self, data, outcome):
        number = data.draw(st.sampled_from(sorted(self.running)))
        self.running.remove(number)
        version = self.flow.running[number]
        if outcome == "group":
            self.run(self.kept.finished(number, version, 0.0, group()))
            self.flow.end(number, ReadyGroup(number, version, group()))
            self.waiting.add(number)
        else:
            self.flow.end(number, None)
            if outcome == "fail":
                self.run(self.kept.handed_out(number, 1, self.next))
                self.again.append(number)
            else:
                self.run(self.kept.finished(number))
                self.done.add(number)

    @precondition(lambda self: not self.batch)
    @rule()
    def discard(self):
        stale = {each.scenario for each in self.flow.drop_stale()}
        if self.settings.late_rollouts == "wait":
            assert not stale, "paced rollouts never grow too old"
        self.run(self.kept.gone(stale, {}))
        self.waiting -= stale
        self.done |= stale

    @precondition(lambda self: not self.batch and self.flow.may_take(no_more=False))
    @rule()
    def take(self):
        self.discard()
        if not self.flow.may_take(no_more=False):
            return
        batch = self.flow.take()
        assert self.settings.min_batch_size <= len(batch) <= self.settings.max_batch_size
        assert all(self.age(each.version) <= self.settings.max_steps_off_policy for each in batch)
        assert max(each.version for each in batch) <= min((e.version for e in self.flow.ready), default=self.step)
        self.batch = {each.scenario for each in batch}
        self.waiting -= self.batch
        self.run(self.kept.taken(self.batch, self.step))

    @precondition(lambda self: self.batch)
    @rule(failed=st.sampled_from([0, 0, 1, 3]))
    def train(self, failed):
        """Steps that failed before, whose numbers are used up."""
        self.step += 1 + failed
        self.steps.append(self.step)
        self.flow.trained(self.step)
        self.run(self.kept.gone(self.batch, {}, skipped=self.flow.skipped))
        self.done |= self.batch
        self.batch = set()

    @rule(published=st.booleans())
    def kill_and_resume(self, published):
        """The file is left as it is, as after SIGKILL; the lock goes with the process."""
        if self.batch and published:
            self.step += 1
            self.steps.append(self.step)
            self.done |= self.batch
        else:
            self.waiting |= self.batch
        self.batch = set()
        self.run(self.kept.close())
        kept = self.open()
        assert {each.scenario for each in kept.groups} == self.waiting
        assert set(kept.unfinished) == self.running | set(self.again)
        assert kept.handed_out == self.next
        self.again = sorted(kept.unfinished)
        self.running = set()

    @invariant()
    def everything_is_somewhere_once(self):
        if not hasattr(self, "flow"):
            return
        parts = [self.running, self.waiting, self.batch, self.done, set(self.again)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == self.next
        assert set(self.flow.running) == self.running
        assert {each.scenario for each in self.flow.ready} == self.waiting
        assert (
            self.flow.running
            or self.flow.may_begin()
            or self.batch
            or self.flow.may_take(no_more=False)
            or any(self.age(each.version) > self.settings.max_steps_off_policy for each in self.flow.ready)
        ), "nothing can go on"

    def teardown(self):
        if hasattr(self, "flow"):
            self.run(self.kept.close())
            self.loop.close()
            self.folder.cleanup()


TestPipeline = Pipeline.TestCase
TestPipeline.settings = settings(max_examples=40, stateful_step_count=40)


def test_a_group_of_weights_that_are_gone_is_stale():
    flow = Flow(settings_of(), version=2)
    flow.ready = [ReadyGroup(0, 5, group()), ReadyGroup(1, 2, group()), ReadyGroup(2, 0, group())]
    assert {each.scenario for each in flow.drop_stale()} == {0, 2}


def test_a_step_whose_number_was_used_up_by_one_that_failed_is_one_step():
    flow = Flow(settings_of(max_steps_off_policy=1), version=7)
    flow.ready = [ReadyGroup(0, 7, group()), ReadyGroup(1, 7, group())]
    flow.take()
    flow.trained(10)
    flow.ready = [ReadyGroup(2, 7, group())]
    assert (flow.age(7), flow.age(6), flow.age(10)) == (1, 2, 0)
    assert flow.drop_stale() == []
    flow.take()
    flow.trained(11)
    flow.ready = [ReadyGroup(3, 7, group()), ReadyGroup(4, 10, group())]
    assert [each.scenario for each in flow.drop_stale()] == [3]


@pytest.mark.parametrize(("limit", "dropped"), [(0.5, {0}), (1.0, set())])
def test_the_mean_age_of_tokens_may_be_limited(limit, dropped):
    flow = Flow(settings_of(max_steps_off_policy=4, limit_mean_steps_off_policy=limit), version=2)
    old = art.TrajectoryGroup([art.Trajectory(reward=r, initial_policy_version=1) for r in (0.0, 1.0)])
    flow.ready = [ReadyGroup(0, 1, old)]
    assert {each.scenario for each in flow.drop_stale()} == dropped
