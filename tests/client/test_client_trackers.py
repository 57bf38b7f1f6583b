"""What the trackers of a model are told: of its registration, of each log, and of a step trained the deprecated way."""

import asyncio
import math
import warnings
from pathlib import Path

import pytest
from pydantic import ValidationError

import art
from art.train_config import TrainConfig
from art_core import ModelKey, PluginRegistry, hookimpl, installed_plugins
from art_core.errors import InvalidName, PluginNotInstalled


class Recorder:
    """A tracker that keeps what it is told."""

    art_api = 1

    def __init__(self):
        self.metrics, self.groups, self.registered = [], [], []

    @hookimpl
    def art_log_metrics(self, model, metrics, step, split):
        self.metrics.append((model.name, metrics, step, split))

    @hookimpl
    async def art_log_trajectories(self, model, trajectory_groups, step, split):
        await asyncio.sleep(0)
        self.groups.append((model.name, list(trajectory_groups), step, split))

    @hookimpl
    def art_model_registered(self, backend, model):
        self.registered.append((backend, model))


@pytest.fixture
def trackers(monkeypatch):
    """A registry without the installed plugins."""
    registry = PluginRegistry()
    monkeypatch.setattr("art.model.installed_plugins", lambda: registry)
    return registry


@pytest.fixture
def recorder(trackers):
    recorder = Recorder()
    trackers.register(recorder, "recorder")
    return recorder


def groups():
    return [
        art.TrajectoryGroup(
            [
                art.Trajectory(reward=0.0, metrics={"hits": 1, "won": False}),
                art.Trajectory(reward=1.0, metrics={"hits": 2}),
            ],
            metrics={"judge": 0.5},
        ),
        art.TrajectoryGroup(
            [art.Trajectory(reward=2.0, metrics={"costs/tokens": 7.0})],
            exceptions=[ValueError("x")],
            metrics={"judge": 1.0},
        ),
    ]


EXPECTED = {
    "train/reward": 1.0,
    "train/reward_std_dev": 0.5,
    "train/exception_rate": 0.25,
    "train/hits": 1.5,
    "train/won": 0.0,
    "costs/tokens": 7.0,
    "train/group_judge": 0.75,
}


async def test_registration_is_told(backend, recorder):
    model = art.TrainableModel(name="agent-001", project="task", base_model="b")
    await model.register(backend)
    assert recorder.registered == [(backend, model)]


# logging


async def test_one_log_keeps_trajectories_and_metrics(model, recorder):
    given = groups()
    await model.log(given, metrics={"loss/train": 0.5, "mine": 2, "odd/one": 3}, step=7, split="train")
    assert recorder.groups == [("agent-001", given, 7, "train")]
    ((name, metrics, step, split),) = recorder.metrics
    assert (name, step, split) == ("agent-001", 7, "train")
    assert metrics == {**EXPECTED, "loss/train": 0.5, "train/mine": 2.0, "train/odd/one": 3.0}


async def test_the_defaults_of_log(model, backend, recorder):
    backend.steps = [0, 3]
    await model.log([art.Trajectory(reward=1.0), ValueError("x"), art.Trajectory(reward=3.0)])
    ((_, (group,), step, split),) = recorder.groups
    assert (step, split, len(group), len(group.exceptions)) == (3, "val", 2, 1)
    assert recorder.metrics[0][1] == {
        "val/reward": 2.0,
        "val/reward_std_dev": 1.0,
        "val/exception_rate": pytest.approx(1 / 3),
    }


async def test_a_given_metric_wins_over_a_computed_one(model, recorder):
    await model.log(groups(), metrics={"reward": 9.0}, split="train")
    assert recorder.metrics[0][1]["train/reward"] == 9.0


async def test_metrics_alone_a_single_group_and_nothing(model, recorder):
    await model.log(metrics={"val/score": 1}, step=2)
    assert recorder.groups == []
    assert recorder.metrics == [("agent-001", {"val/score": 1.0}, 2, "val")]
    await model.log(groups()[0], step=2)
    assert len(recorder.groups[0][1]) == 1
    await model.log()
    assert len(recorder.metrics) == 2


async def test_only_exceptions(model, recorder):
    await model.log([art.TrajectoryGroup([], exceptions=[ValueError("x")])], split="train")
    assert recorder.metrics[0][1] == {"train/exception_rate": 1.0}
    assert recorder.groups[0][1][0].exceptions[0].type == "ValueError"


async def test_metrics_that_are_not_finite_are_kept_and_warned_of(model, recorder):
    with pytest.warns(RuntimeWarning, match="not finite numbers: train/reward=nan, loss/train=inf"):
        await model.log([art.Trajectory(reward=math.nan)], metrics={"loss/train": math.inf}, split="train")
    assert math.isnan(recorder.metrics[0][1]["train/reward"])
    assert recorder.metrics[0][1]["loss/train"] == math.inf


async def test_what_cannot_be_logged(model):
    async def attempt():
        return art.Trajectory()

    pending = art.TrajectoryGroup([attempt()])
    with pytest.raises(TypeError, match="await groups that are still being gathered"):
        await model.log([pending])
    pending.close()
    with pytest.raises(InvalidName, match="split"):
        await model.log(metrics={"a": 1}, split="../train")


async def test_a_tracker_that_fails_keeps_no_other_from_being_told(model, trackers):
    class Broken:
        art_api = 1

        @hookimpl
        def art_log_metrics(self, metrics):
            raise OSError("the disk is full")

    recorder = Recorder()
    trackers.register(Broken(), "broken")
    trackers.register(recorder, "recorder")
    with pytest.warns(RuntimeWarning, match="'broken' failed in art_log_metrics.*the disk is full"):
        await model.log(metrics={"a": 1})
    assert len(recorder.metrics) == 1


async def test_a_metric_that_is_no_number_costs_only_itself(model, recorder):
    given = groups()
    given[1][0].metrics["judge"] = "timeout"
    given[0].metrics["judge"] = None
    given[0][0].logs.append(3)
    with pytest.warns(RuntimeWarning) as said:
        await model.log(
            given, metrics={"loss": "high", "loss/train": 0.5, "data/n": [1], 7: "2"}, step=1, split="train"
        )
    assert str(said.pop().message).splitlines() == [
        "left out of the log, where all else is kept:",
        "trajectory_groups[0].metrics['judge'] cannot be kept: None is not one number",
        "trajectory_groups[1].trajectories[0].metrics['judge'] cannot be kept: 'timeout' is not one number",
        "metrics['loss'] cannot be kept: 'high' is not one number",
        "metrics['data/n'] cannot be kept: [1] is not one number",
    ]
    ((_, metrics, _, _),) = recorder.metrics
    assert metrics == {**EXPECTED, "train/group_judge": 1.0, "loss/train": 0.5, "train/7": 2.0}
    ((_, logged, _, _),) = recorder.groups
    assert [len(group) for group in logged] == [2, 1]
    assert logged[0][0].logs == ["3"]
    assert given[1][0].metrics == {"costs/tokens": 7.0, "judge": "timeout"}  # the user's own stay as they are


async def test_nothing_is_lost_to_a_warning_raised_as_an_error(model, recorder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="left out of the log"):
            await model.log(groups(), metrics={"loss/a": "high", "loss/b": 1}, split="train")
    assert len(recorder.groups[0][1]) == 2
    assert recorder.metrics[0][1] == {**EXPECTED, "loss/b": 1.0}


@pytest.mark.parametrize(
    "values", [[1.7e308] * 3, [1e308, -1e308], [math.inf, -math.inf], [2**1023, 0.5], [5e-324] * 2]
)
async def test_metrics_of_any_size_are_averaged(model, recorder, values):
    trajectories = [art.Trajectory(metrics={"m": value}) for value in values]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        await model.log(trajectories, split="train", metrics={"loss/train": 1})
    mean = recorder.metrics[0][1]["train/m"]
    assert math.isnan(mean) or min(map(float, values)) <= mean <= max(map(float, values))


@pytest.mark.parametrize("step", ["3", 3.0, 2.5, object()])
async def test_a_step_that_is_no_whole_number_is_refused(model, recorder, step):
    with pytest.raises(TypeError, match=r"model\.log: step must be a whole number, not "):
        await model.log(metrics={"a": 1}, step=step)
    assert recorder.metrics == []


async def test_a_step_of_another_library_is_a_step(model, recorder):
    np = pytest.importorskip("numpy")
    await model.log(metrics={"a": 1}, step=np.int64(3))
    assert [type(step) for _, _, step, _ in recorder.metrics] == [int]


@pytest.mark.parametrize(
    ("report", "told"), [(None, ["one", "two"]), (["one"], ["one"]), (["two", "one"], ["one", "two"]), ([], [])]
)
async def test_only_the_trackers_that_are_named_are_told(backend, trackers, report, told):
    recorders = {name: Recorder() for name in ("one", "two")}
    for name, recorder in recorders.items():
        trackers.register(recorder, name)
    model = art.TrainableModel(name="m", project="p", base_model="b", report_metrics=report)
    await model.register(backend)
    await model.log(groups(), metrics={"loss/train": 1}, step=1, split="train")
    assert [name for name, recorder in recorders.items() if recorder.metrics] == told
    assert [name for name, recorder in recorders.items() if recorder.groups] == told
    assert all(recorder.registered for recorder in recorders.values())


async def test_a_tracker_that_is_not_there_is_refused_with_those_that_are(backend, trackers):
    class NoTracker:
        art_api = 1

        @hookimpl
        def art_model_registered(self, backend, model):
            raise AssertionError("nothing may be registered")

    trackers.register(Recorder(), "recorder")
    trackers.register(NoTracker(), "watcher")
    for name, why in (
        ("recordr", "which is no tracker here. Did you mean 'recorder'? Installed trackers: recorder."),
        ("watcher", "The plugin is active: it is told nothing that is logged. Installed trackers: recorder."),
        ("wandb", "which is no tracker here. Installed trackers: recorder."),
    ):
        model = art.TrainableModel(name="m", project="p", base_model="b", report_metrics=["recorder", name])
        with pytest.raises(PluginNotInstalled, match=f"report_metrics names '{name}'") as refused:
            await model.register(backend)
        assert str(refused.value).endswith(why)
        assert backend.calls == []
        with pytest.raises(PluginNotInstalled):
            await art.Model(name="m", project="p", report_metrics=[name]).log(metrics={"a": 1})


async def test_without_a_tracker_the_pip_line_is_named(model, trackers):
    with pytest.warns(RuntimeWarning, match="pip install art-tracker-files"):
        await model.log(metrics={"a": 1})


async def test_log_writes_files_with_the_files_tracker(model):
    read = pytest.importorskip("art_tracker_files")
    assert any(info.name == "tracker-files" for info in installed_plugins().infos)
    given = groups()
    await model.log(given, metrics={"loss/train": 0.5}, step=7, split="train")
    folder = ModelKey(model.project, model.name).folder(Path(model.base_path))
    (record,) = read.read_history(folder / "history.jsonl")
    assert {k: v for k, v in record.items() if k != "recorded_at"} == {
        "step": 7,
        "split": "train",
        "loss/train": 0.5,
        **EXPECTED,
    }
    back = read.read_trajectories(folder / "trajectories" / "train" / "0007.parquet")
    assert [group.model_dump() for group in back] == [group.model_dump() for group in given]


# training


async def test_backend_train_logs_nothing(model, backend, recorder):
    result = await backend.train(model, groups(), learning_rate=1e-5)
    assert isinstance(result, art.LocalTrainResult)
    assert recorder.metrics == recorder.groups == []


async def test_model_train_is_deprecated_and_does_both(model, backend, recorder):
    with pytest.warns(DeprecationWarning, match="is deprecated") as caught:
        await model.train((group for group in groups()), config=art.TrainConfig(learning_rate=1e-5))
    text = str(caught[0].message)
    assert "result = await backend.train(model, groups, learning_rate=1e-5)" in text
    assert 'await model.log(groups, metrics=result.metrics, step=result.step, split="train")' in text
    assert caught[0].filename == __file__
    assert backend.calls[-1] == ("train", "agent-001", 2, {"learning_rate": 1e-5})
    assert recorder.metrics == [("agent-001", {**EXPECTED, "loss/train": 0.5}, 1, "train")]
    assert len(recorder.groups[0][1]) == 2


async def test_the_train_config_becomes_arguments(model, backend, recorder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        await model.train(groups())
        assert backend.calls[-1][-1] == {"learning_rate": 5e-6}
        await model.train(groups(), TrainConfig(kl_penalty_coef=0.1, grad_accumulation_sequences=4), verbose=True)
    assert backend.calls[-1][-1] == {
        "learning_rate": 5e-6,
        "kl_penalty_coef": 0.1,
        "grad_accumulation_sequences": 4,
        "verbose": True,
    }
    with pytest.raises(ValidationError, match="learning_rat"):
        TrainConfig(learning_rat=1)
