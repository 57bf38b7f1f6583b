"""`model.train_sft` and what is built on it: what the backend is asked, what is logged, how a file becomes batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import art
from art.sft import create_lr_schedule, create_sft_dataset_iterator, train_sft_from_file
from art_core import PluginRegistry, Registration, hookimpl
from art_core.errors import InvalidTrajectory


class SupervisedBackend:
    """A backend that writes down what it is asked to train on."""

    name = "supervised"

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], Any, Any]] = []

    async def register(self, model: Any) -> Registration:
        return Registration(inference_base_url="http://127.0.0.1:9", inference_api_key="key")

    async def train_sft(self, model: Any, trajectories: Any, *, learning_rate: Any, batch_size: Any) -> art.TrainResult:
        said = [str(trajectory.messages()[0]["content"]) for trajectory in trajectories]
        self.asked.append((said, learning_rate, batch_size))
        return art.TrainResult(step=len(self.asked), metrics={"loss/train": 1.5})


class Tracker:
    """What was logged."""

    art_api = 1

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, dict[str, float]]] = []

    @hookimpl
    def art_log_metrics(self, metrics: dict[str, float], step: int, split: str) -> None:
        self.rows.append((step, split, metrics))


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    tracker, registry = Tracker(), PluginRegistry()
    registry.register(tracker, name="tracker")
    monkeypatch.setattr("art.model.installed_plugins", lambda: registry)
    return tracker


@pytest.fixture
async def model(tracker: Tracker, tmp_path: Path) -> art.TrainableModel:
    model = art.TrainableModel(name="agent", project="shop", base_model="tiny", base_path=str(tmp_path))
    await model.register(SupervisedBackend())  # type: ignore[arg-type]
    return model


def chat(number: int) -> art.Trajectory:
    return art.Trajectory(
        messages_and_choices=[{"role": "user", "content": str(number)}, {"role": "assistant", "content": "yes"}]
    )


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Seven chats."""
    file = tmp_path / "chats.jsonl"
    lines = [json.dumps({"messages": chat(number).messages()}) for number in range(7)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def joined(parts: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


def asked(model: art.TrainableModel) -> list[tuple[list[str], Any, Any]]:
    backend: Any = model.backend()
    return backend.asked  # type: ignore[no-any-return]


async def test_a_call_is_one_step_whose_metrics_are_logged(model: art.TrainableModel, tracker: Tracker) -> None:
    result = await model.train_sft(chat(number) for number in range(3))
    assert result.step == 1
    assert asked(model) == [(["0", "1", "2"], 5e-5, "auto")]
    ((step, split, metrics),) = tracker.rows
    assert (step, split, metrics["loss/train"]) == (1, "train", 1.5)
    await model.train_sft([chat(9)], art.TrainSFTConfig(learning_rate=[1e-3], batch_size=4), log_metrics=False)
    assert asked(model)[1] == (["9"], [1e-3], 4)
    assert len(tracker.rows) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": -1},
        {"learning_rate": float("inf")},
        {"learning_rate": [1e-5, -1]},
        {"batch_size": 0},
        {"epochs": 2},
    ],
)
def test_a_setting_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        art.TrainSFTConfig(**wrong)


async def test_a_file_is_trained_in_batches_at_the_rates_of_a_schedule(model: art.TrainableModel, chats: Path) -> None:
    await train_sft_from_file(model, chats, epochs=2, batch_size=3, peak_lr=1e-3, warmup_ratio=0.4)
    ((said, rates, batch_size),) = asked(model)
    assert sorted(said) == sorted(2 * list("0123456"))
    assert rates == create_lr_schedule(5, 1e-3, "linear", warmup_steps=2)
    assert batch_size == 3


async def test_a_run_in_parts_trains_what_the_whole_does(model: art.TrainableModel, chats: Path) -> None:
    await train_sft_from_file(model, chats, epochs=2, seed=3)
    (whole,) = asked(model)
    asked(model).clear()
    results = await train_sft_from_file(model, chats, epochs=2, seed=3, save_every=3)
    assert [result.step for result in results] == [1, 2, 3]
    assert [len(rates) for _, rates, _ in asked(model)] == [3, 3, 1]
    assert joined(said for said, _, _ in asked(model)) == whole[0]
    assert joined(rates for _, rates, _ in asked(model)) == whole[1]
    asked(model).clear()
    await train_sft_from_file(model, chats, epochs=2, seed=3, final_step=4)
    await train_sft_from_file(model, chats, epochs=2, seed=3, initial_step=4)
    assert joined(said for said, _, _ in asked(model)) == whole[0]
    assert joined(rates for _, rates, _ in asked(model)) == whole[1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "epochs"), ({"batch_size": 0}, "batch_size"), ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"save_every": 0}, "save_every"), ({"initial_step": 4}, "initial_step is 4"), ({"peak_lr": -1.0}, "peak_lr"),
        ({"schedule_type": "square"}, "linear, cosine, constant"),
    ],
)  # fmt: skip
async def test_a_number_out_of_range_is_named(model: art.TrainableModel, chats: Path, wrong: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        await train_sft_from_file(model, chats, **wrong)
    assert asked(model) == []


async def test_a_bad_line_is_named_before_anything_is_trained(model: art.TrainableModel, chats: Path) -> None:
    with chats.open("a", encoding="utf-8") as file:
        file.write('{"messages": "none"}\n')
    with pytest.raises(InvalidTrajectory, match=r"chats\.jsonl, line 8"):
        await train_sft_from_file(model, chats, save_every=1)
    assert asked(model) == []


@pytest.mark.parametrize("shuffle", [True, False])
def test_chunks_of_a_list_cover_each_epoch_once_and_resume(shuffle: bool) -> None:
    chats = [chat(number) for number in range(11)]

    def chunks(**more: Any) -> Iterator[Any]:
        return create_sft_dataset_iterator(chats, chunk_size=2, epochs=2, batch_size=3, shuffle=shuffle, **more)

    whole = list(chunks())
    assert [(c.step, c.epoch, c.epoch_step, len(c.trajectories)) for c in whole] == [
        (0, 0, 0, 6), (2, 0, 2, 5), (4, 1, 0, 6), (6, 1, 2, 5),
    ]  # fmt: skip
    for epoch in (0, 1):
        said = [t.messages()[0]["content"] for c in whole if c.epoch == epoch for t in c.trajectories]
        assert (said == [str(n) for n in range(11)]) is not shuffle
        assert sorted(said, key=int) == [str(n) for n in range(11)]
    assert joined(c.config.learning_rate for c in whole) == create_lr_schedule(8, 2e-4)
    assert list(chunks(initial_step=5)) == whole[2:]
