"""PipelineTrainer at work on a simulated backend: what is trained, held, dropped, kept and said."""

import asyncio
import itertools
import json
import os
import signal
from collections import Counter

import pytest

import art
from art.pipeline_trainer import (
    CheckpointInfo,
    CheckpointRetentionContext,
    PipelineTrainer,
    ScenarioSourceFailed,
    keep_recent_and_top,
    make_group_rollout_fn,
)
from art.pipeline_trainer.kept_state import PipelineRunning
from art.pipeline_trainer.rollouts import RolloutsKeepFailing
from art_core import BackendCapability, announce, installed_plugins
from art_core.history import read_history

pytestmark = pytest.mark.filterwarnings("ignore:model.log")


def group(rewards=(0.0, 1.0)):
    return art.TrajectoryGroup(
        [
            art.Trajectory(
                messages_and_choices=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], reward=r
            )
            for r in rewards
        ]
    )


async def quick(model, scenario, config):
    await asyncio.sleep(0)
    return group()


def error_of(raised):
    error = raised.value
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    return error


async def test_every_scenario_is_trained_once_and_the_last_batch_may_be_short(model, simulated, make_scenarios):
    await PipelineTrainer(model, simulated, quick, make_scenarios(10), min_batch_size=4, max_batch_size=4).train()
    assert sorted(simulated.trained()) == list(range(10))
    assert [len(batch) for _, batch in simulated.batches] == [4, 4, 2]
    assert not +simulated.leases
    assert simulated.options[0] == {
        "learning_rate": 1e-5, "loss_fn": "cispo", "normalize_advantages": True, "save_checkpoint": False,
    }  # fmt: skip


@pytest.mark.parametrize("off_policy", [0, 1, 3])
async def test_nothing_grows_older_than_allowed_and_slow_scenarios_are_trained_like_others(
    model, simulated, make_scenarios, off_policy
):
    """Rewards are tied to length here: what takes long is every fifth scenario."""

    async def rollout(model, scenario, config):
        await asyncio.sleep(0.05 if scenario["metadata"]["scenario_id"] % 5 == 0 else 0.001)
        return group()

    trainer = PipelineTrainer(
        model, simulated, rollout, make_scenarios(40),
        min_batch_size=2, max_batch_size=4, max_steps_off_policy=off_policy,
    )  # fmt: skip
    await trainer.train()
    assert sorted(simulated.trained()) == list(range(40)), "the trained mix is the offered one"
    for step, batch in simulated.batches:
        assert all(step - version <= off_policy for _, version in batch)


async def test_a_late_rollout_can_be_cancelled_instead_of_waited_for(model, simulated, make_scenarios):
    ended = []

    async def rollout(model, scenario, config):
        if scenario["metadata"]["scenario_id"] == 0:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append(0)
                raise
        return group()

    trainer = PipelineTrainer(
        model, simulated, rollout, make_scenarios(20),
        min_batch_size=2, max_batch_size=2, max_steps_off_policy=1, late_rollouts="cancel",
    )  # fmt: skip
    await trainer.train()
    assert ended == [0]
    assert sorted(simulated.trained()) == list(range(1, 20))


async def test_a_rollout_asks_the_step_that_it_holds(model, simulated, make_scenarios):
    simulated.train_s = 0.01
    names = {}

    async def rollout(model, scenario, config):
        number = scenario["metadata"]["scenario_id"]
        first = model.get_inference_name()
        await asyncio.sleep(0.001 * (number % 7))
        names[number] = (first, model.get_inference_name())
        assert simulated.leases[int(first.partition("@")[2])] > 0
        return group()

    await PipelineTrainer(
        model, simulated, rollout, make_scenarios(30), min_batch_size=2, max_batch_size=3, num_rollout_workers=5
    ).train()
    assert all(first == last for first, last in names.values())
    began = {scenario: version for _, batch in simulated.batches for scenario, version in batch}
    assert names == {number: (f"agent@{version}",) * 2 for number, version in began.items()}
    assert len({first for first, _ in names.values()}) > 3
    assert model.get_inference_name() == f"agent@{simulated.steps[-1]}"


async def test_with_updates_in_flight_a_rollout_asks_the_newest_step(model, simulated, make_scenarios):
    asked = []

    async def rollout(model, scenario, config):
        if scenario["metadata"]["scenario_id"]:
            return group()
        first = model.get_inference_name()
        while simulated.steps[-1] < 2:
            await asyncio.sleep(0.001)
        asked.append((first, model.get_inference_name(), f"agent@{simulated.steps[-1]}"))
        assert simulated.leases[0], "the step that it began with is held all the same"
        return group()

    trainer = PipelineTrainer(
        model, simulated, rollout, make_scenarios(20),
        min_batch_size=2, max_batch_size=2, max_steps_off_policy=4, update="in_flight",
    )  # fmt: skip
    async with asyncio.timeout(20):
        await trainer.train()
    ((first, last, newest),) = asked
    assert first == "agent@0"
    assert last == newest != first


async def test_groups_whose_rewards_are_equal_are_dropped_and_too_many_end_the_run(
    model, simulated, make_scenarios, capsys
):
    async def rollout(model, scenario, config):
        return group((1.0, 1.0))

    trainer = PipelineTrainer(
        model, simulated, rollout, make_scenarios(100), min_batch_size=2, discard_queue_multiplier=3
    )
    await trainer.train()
    assert not simulated.batches
    assert "model collapse" in capsys.readouterr().err


async def test_a_failing_rollout_is_tried_again_then_left_out(model, simulated, make_scenarios, capsys):
    tries = Counter()

    async def rollout(model, scenario, config):
        number = scenario["metadata"]["scenario_id"]
        tries[number] += 1
        if number == 1 or (number == 2 and tries[2] == 1):
            raise OSError("no network")
        return group()

    await PipelineTrainer(model, simulated, rollout, make_scenarios(6), min_batch_size=2).train()
    assert sorted(simulated.trained()) == [0, 2, 3, 4, 5]
    assert (tries[1], tries[2]) == (3, 2)
    said = capsys.readouterr().err
    assert "scenario 1 failed 3 times and is left out: OSError: no network" in said
    assert "errored=1 retried=3" in said


@pytest.mark.parametrize("together", [False, True])
async def test_rollouts_that_only_fail_end_the_run_in_words(model, simulated, together):
    everybody = asyncio.Barrier(16)

    async def rollout(model, scenario, config):
        if together:
            await everybody.wait()
        raise OSError("no network")

    endless = ({"metadata": {"scenario_id": number}} for number in itertools.count())
    with pytest.raises(ExceptionGroup) as raised:
        await PipelineTrainer(
            model, simulated, rollout, endless, max_failures_in_a_row=8, num_rollout_workers=16, max_batch_size=16
        ).train()
    assert isinstance(error_of(raised), RolloutsKeepFailing)
    assert "no network" in str(error_of(raised))


async def test_a_source_that_raises_ends_the_run_in_words(model, simulated):
    async def scenarios():
        yield {"metadata": {"scenario_id": 0}}
        raise KeyError("column")

    with pytest.raises(ExceptionGroup) as raised:
        await PipelineTrainer(model, simulated, quick, scenarios()).train()
    assert isinstance(error_of(raised), ScenarioSourceFailed)
    assert "KeyError: 'column' after 1 scenarios" in str(error_of(raised))


async def test_an_endless_source_stops_after_max_steps_counted_from_the_call(model, simulated):
    def endless():
        return ({"metadata": {"scenario_id": number}} for number in itertools.count())

    for _ in range(2):
        await PipelineTrainer(model, simulated, quick, endless(), max_steps=3, max_batch_size=4).train()
    assert len(simulated.batches) == 6
    trained = simulated.trained()
    assert len(trained) == len(set(trained))


async def test_a_run_that_failed_while_training_goes_on_with_the_same_groups(model, simulated, make_scenarios):
    simulated.fail_with = RuntimeError("out of memory")
    ran = Counter()

    async def rollout(model, scenario, config):
        ran[scenario["metadata"]["scenario_id"]] += 1
        await asyncio.sleep(0)
        return group()

    with pytest.raises(ExceptionGroup):
        await PipelineTrainer(model, simulated, rollout, make_scenarios(8), max_batch_size=4).train()
    finished_before = {number for number, times in ran.items() if times}
    simulated.fail_with = None
    await PipelineTrainer(model, simulated, rollout, make_scenarios(8), max_batch_size=4).train()
    assert sorted(simulated.trained()) == list(range(8))
    assert finished_before


async def test_a_batch_that_was_published_before_the_client_ended_is_not_trained_again(
    model, simulated, make_scenarios
):
    simulated.die_after_publishing = True
    with pytest.raises(ExceptionGroup):
        await PipelineTrainer(model, simulated, quick, make_scenarios(9), max_batch_size=4).train()
    simulated.die_after_publishing = False
    await PipelineTrainer(model, simulated, quick, make_scenarios(9), max_batch_size=4).train()
    assert sorted(simulated.trained()) == list(range(9))


async def test_without_resume_it_begins_with_the_first_scenario(model, simulated, make_scenarios):
    await PipelineTrainer(model, simulated, quick, make_scenarios(4)).train()
    await PipelineTrainer(model, simulated, quick, make_scenarios(4), resume=False).train()
    assert sorted(simulated.trained()) == [0, 0, 1, 1, 2, 2, 3, 3]


async def test_request_stop_trains_what_is_ready_and_keeps_the_rest_for_the_next_run(model, simulated, make_scenarios):
    finished = 0

    async def rollout(model, scenario, config):
        nonlocal finished
        if scenario["metadata"]["scenario_id"] >= 6:
            await asyncio.sleep(60)
        finished += 1
        if finished == 6:
            asyncio.get_running_loop().call_later(0.1, trainer.request_stop)
        return group()

    trainer = PipelineTrainer(model, simulated, rollout, make_scenarios(9), min_batch_size=8)
    async with asyncio.timeout(20):
        await trainer.train()
    assert sorted(simulated.trained()) == list(range(6))
    await PipelineTrainer(model, simulated, quick, make_scenarios(9)).train()
    assert sorted(simulated.trained()) == list(range(9))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_sigint_or_sigterm_finishes_the_step_and_saves(model, simulated, make_scenarios, number):
    simulated.train_s = 0.2
    before = signal.getsignal(number)
    training = asyncio.ensure_future(
        PipelineTrainer(model, simulated, quick, make_scenarios(50), max_batch_size=4).train()
    )
    async with asyncio.timeout(20):
        while not simulated.options:
            await asyncio.sleep(0.005)
        os.kill(os.getpid(), number)
        await training
    assert signal.getsignal(number) is before
    assert len(simulated.batches) == 1
    simulated.train_s = 0
    await PipelineTrainer(model, simulated, quick, make_scenarios(50), max_batch_size=4).train()
    assert sorted(simulated.trained()) == list(range(50))


async def test_two_pipelines_of_one_model_refuse_in_words(model, simulated, make_scenarios):
    async def rollout(model, scenario, config):
        await asyncio.sleep(60)

    first = PipelineTrainer(model, simulated, rollout, make_scenarios(4))
    running = asyncio.ensure_future(first.train())
    await asyncio.sleep(0.1)
    with pytest.raises(PipelineRunning, match="another PipelineTrainer is training the model"):
        await PipelineTrainer(model, simulated, quick, make_scenarios(4)).train()
    first.request_stop()
    await running


async def test_evaluations_are_logged_at_the_step_that_they_measured(model, simulated, make_scenarios, tmp_path):
    seen = []

    async def evaluate(model, step, config):
        await asyncio.sleep(0.02)
        seen.append((step, model.get_inference_name()))
        return [group()[1]] if step else {"val": [group()], "test": [group()]}

    trainer = PipelineTrainer(
        model, simulated, quick, make_scenarios(40), eval_fn=evaluate, eval_every_n_steps=4, max_batch_size=4
    )
    await trainer.train()
    assert seen == [(step, f"agent@{step}") for step in (0, 4, 8)]
    rows = read_history(tmp_path / "task/models/agent/history.jsonl")
    assert {row["step"]: row["val/reward"] for row in rows if "val/reward" in row} == {0: 0.5, 4: 1.0, 8: 1.0}
    assert [options["save_checkpoint"] for options in simulated.options][:5] == [False, False, False, True, False]


async def test_a_failed_evaluation_is_told_and_costs_nothing_else(model, simulated, make_scenarios, capsys):
    async def evaluate(model, step, config):
        raise ValueError("no test set")

    await PipelineTrainer(model, simulated, quick, make_scenarios(8), eval_fn=evaluate).train()
    assert sorted(simulated.trained()) == list(range(8))
    assert "the evaluation of step 0 failed: ValueError: no test set" in capsys.readouterr().err


async def test_retention_keeps_the_newest_and_never_deletes_what_is_leased(model, simulated, make_scenarios):
    async def rollout(model, scenario, config):
        await asyncio.sleep(0.02 if scenario["metadata"]["scenario_id"] == 0 else 0)
        return group()

    trainer = PipelineTrainer(
        model, simulated, rollout, make_scenarios(40), max_batch_size=4,
        checkpoint_retention_strategy=keep_recent_and_top(recent=2, top=0),
    )  # fmt: skip
    await trainer.train()
    assert simulated.steps[-1] == len(simulated.batches)
    assert len(simulated.steps) <= 4


async def test_the_served_the_held_and_those_to_be_evaluated_are_never_offered_and_a_function_says_what_stays(
    model, simulated, make_scenarios
):
    offers, evaluated = [], asyncio.Event()

    async def evaluate(model, step, config):
        await evaluated.wait()
        return [group()[1]]

    def keep_even_ones(context):
        offered = [each.step for each in context.checkpoints]
        held = {step for step, holders in simulated.leases.items() if holders}
        offers.append((context.current_step, offered, held))
        if context.current_step == 6:
            evaluated.set()
        return [step for step in offered if step % 2 == 0]

    trainer = PipelineTrainer(
        model, simulated, quick, make_scenarios(40), eval_fn=evaluate, eval_every_n_steps=2, max_batch_size=4,
        checkpoint_retention_strategy=keep_even_ones,
    )  # fmt: skip
    async with asyncio.timeout(20):
        await trainer.train()
    assert max(current for current, _, _ in offers) > 6
    for current, offered, held in offers:
        assert current not in offered
        assert not held & set(offered)
        if current <= 6:
            assert not {0, 2, 4} & set(offered), "they wait for their evaluation"
    left = set(simulated.steps) - {simulated.steps[-1]}
    assert {0, 2, 4} <= left
    assert not {1, 3, 5} & left


def test_the_newest_and_the_best_by_a_metric_stay():
    checkpoints = [
        CheckpointInfo(step=step, metrics={} if reward is None else {"val/reward": reward})
        for step, reward in enumerate((0.9, 0.1, None, 0.8, 0.2, 0.3))
    ]
    context = CheckpointRetentionContext(current_step=6, checkpoints=checkpoints)
    assert set(keep_recent_and_top(recent=2, top=2)(context)) == {0, 3, 4, 5}
    assert set(keep_recent_and_top(recent=1, top=1, metric="train/reward")(context)) == {5}


async def test_metrics_and_state_have_the_names_of_the_contract(model, simulated, make_scenarios, tmp_path):
    await PipelineTrainer(model, simulated, quick, make_scenarios(8), max_batch_size=4).train()
    (row,) = [r for r in read_history(tmp_path / "task/models/agent/history.jsonl") if r["step"] == 2]
    for name in (
        *("train/reward", "train/discarded_stale_groups", "train/steps_off_policy", "time/step_wall_s"),
        *("time/step_trainer_s", "time/step_actor_s", "throughput/step_trainer_idle_s", "data/cum/trainer_tokens"),
        *("throughput/step_actor_idle_s", "checkpoint/saved", "checkpoint/created_at_unix", "loss/train"),
    ):
        assert name in row, name
    state = json.loads((tmp_path / "task/models/agent/state.json").read_bytes())
    assert state["_pipeline_trainer"]["training_step"] == 2
    assert state["_pipeline_trainer"]["scenario_offset"] == 8
    assert state["_metrics_builder_state"]["cum_state"]["data/cum/trainer_tokens"] == 16.0


async def test_a_stall_is_named_with_what_each_part_did(model, simulated, make_scenarios, capsys):
    async def rollout(model, scenario, config):
        await asyncio.sleep(60)

    trainer = PipelineTrainer(
        model, simulated, rollout, make_scenarios(2), stall_limit_seconds=0.05, log_interval_seconds=0.05
    )
    running = asyncio.ensure_future(trainer.train())
    await asyncio.sleep(0.3)
    trainer.request_stop()
    await running
    said = capsys.readouterr().err
    assert "no rollout has finished and the optimizer took no step" in said
    assert "trainer: waiting for a batch" in said
    assert "scenario 0 since step 0" in said
    assert "[status] scenarios[trained=0" in said


async def test_no_step_is_deleted_that_a_rollout_is_about_to_hold(model, simulated, make_scenarios):
    trainer = PipelineTrainer(
        model, simulated, quick, make_scenarios(200), num_rollout_workers=8, min_batch_size=1, max_batch_size=1,
        checkpoint_retention_strategy=keep_recent_and_top(recent=0, top=0),
    )  # fmt: skip
    await trainer.train()
    assert simulated.asked_too_late == []
    assert len(simulated.steps) < 200


async def test_a_long_step_says_how_far_it_is(model, simulated, make_scenarios, capsys):
    other = art.TrainableModel(name="another", project="task", base_model="some-base")
    train = simulated.train

    async def told(model, groups, **options):
        for of, done in ((model, 3), (other, 4)):
            how_far = {"step": 1, "done": done, "total": 5, "metrics": {"loss/train": 0.5}}
            await announce(installed_plugins(), "art_gradient_step", model=of, **how_far)
        async with asyncio.timeout(30):
            while "trainer: gradient step 3 of 5 of step 1" not in capsys.readouterr().err:
                await asyncio.sleep(0.01)
        return await train(model, groups, **options)

    simulated.train = told
    await PipelineTrainer(
        model, simulated, quick, make_scenarios(4), max_batch_size=4, log_interval_seconds=0.05
    ).train()
    assert len(simulated.batches) == 1


async def test_make_group_rollout_fn_keeps_what_an_attempt_raised(model):
    count = itertools.count()

    async def single(model, scenario, config):
        if next(count) == 1:
            raise ValueError("broken tool")
        return art.Trajectory(reward=1.0)

    made = await make_group_rollout_fn(single, n=3)(model, {}, None)
    assert (len(made), [str(error) for error in made.exceptions]) == (2, ["ValueError: broken tool"])


async def test_a_backend_without_places_for_the_steps_that_may_be_held_is_refused(
    model, backend_class, make_scenarios, tmp_path
):
    narrow = backend_class(tmp_path, served_steps=5)
    await model.register(narrow)
    with pytest.raises(ValueError, match=r"need 6 steps of 'agent'.*places for 5.*max_adapters=6.*max_steps_off_poli"):
        await PipelineTrainer(model, narrow, quick, make_scenarios(8)).train()
    await PipelineTrainer(model, narrow, quick, make_scenarios(8), max_steps_off_policy=3).train()
    assert sorted(narrow.trained()) == list(range(8))


async def test_rollouts_of_one_step_share_one_lease(model, simulated, make_scenarios):
    await PipelineTrainer(model, simulated, quick, make_scenarios(64), num_rollout_workers=8).train()
    assert simulated.most_leases == 1
    assert not +simulated.leases


async def test_a_backend_that_takes_turns_is_refused_with_the_way_out(model, backend_class, tmp_path):
    shared = backend_class(tmp_path, capabilities=frozenset({BackendCapability.LEASES}))
    with pytest.raises(ValueError, match=r"trainer_gpu_ids=.*inference_gpu_ids="):
        PipelineTrainer(model, shared, quick, [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_rollout_workers": 0}, {"min_batch_size": 0}, {"max_batch_size": 3}, {"max_steps_off_policy": -1},
        {"queue_maxsize": 0}, {"max_steps": -1}, {"discard_queue_multiplier": 0}, {"log_interval_seconds": 0},
        {"eval_every_n_steps": -1}, {"loss_fn": "reinforce"}, {"loss_fn_config": {}}, {"adam_params": {}},
        {"status_ewa_alpha": 0}, {"checkpoint_retention_interval": 0}, {"update": "sometimes"},
        {"checkpoint_retention_strategy": keep_recent_and_top()},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
async def test_a_setting_out_of_range_is_refused_when_the_trainer_is_made(model, simulated, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("checkpoint_retention_strategy", "val/reward")):
        PipelineTrainer(model, simulated, quick, [], **wrong)
