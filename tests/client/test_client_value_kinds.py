"""Every kind of value that users were seen to put in trajectories, in every place, on its way through gathering,
training and logging: kept as what it says and the same everywhere, or named with the others kept.
"""

import asyncio
import dataclasses
import datetime
import enum
import math
import re
import uuid
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from pydantic import BaseModel

import art
from art.leave_out import without_unsound
from art_core import check_groups
from art_core.errors import InvalidTrajectory

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
files = pytest.importorskip("art_tracker_files")
groups_file = pytest.importorskip("art_engine_kit.groups_file")

LONE = b"caf\xe9".decode("utf-8", "surrogateescape")


class Grade(enum.IntEnum):
    GOOD = 3


class Verdict(BaseModel):
    score: float = 0.5


@dataclasses.dataclass
class Plain:
    score: float = 0.5


class Silent:
    def __repr__(self):
        raise RuntimeError

    __str__ = __repr__


class Unhelpful:
    def __float__(self):
        raise KeyError("no")


def itself():
    value = {}
    value["again"] = value
    return value


def sampled(**extra):
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "yes"},
            "logprobs": {"content": [{"token": "yes", "logprob": -0.5, "top_logprobs": []}]},
            "token_ids": [7],
            "prompt_token_ids": [1, 2],
            "policy_version": 0,
            **extra,
        }
    )


COMPLETION = ChatCompletion(id="c", choices=[sampled()], created=1, model="m", object="chat.completion")
# What float() takes as one number, and which.
NUMBERS = {
    "whole": (3, 3),
    "huge whole": (2**80, 2**80),
    "fraction": (0.5, 0.5),
    "bool": (True, True),
    "IntEnum": (Grade.GOOD, 3),
    "Decimal": (Decimal("0.5"), 0.5),
    "Fraction": (Fraction(1, 2), 0.5),
    "numpy float16": (np.float16(0.5), 0.5),
    "numpy float32": (np.float32(0.5), 0.5),
    "numpy float64": (np.float64(0.5), 0.5),
    "numpy int64": (np.int64(3), 3),
    "numpy uint8": (np.uint8(3), 3),
    "numpy bool": (np.bool_(True), True),
    "numpy array of no dimension": (np.array(0.5), 0.5),
    "numpy array of one number": (np.array([[0.5]]), 0.5),
    "torch scalar": (torch.tensor(0.5), 0.5),
    "torch bfloat16": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "torch whole": (torch.tensor(3), 3),
    "torch bool": (torch.tensor(True), True),
    "torch tensor of one number": (torch.tensor([0.5]), 0.5),
    "torch with a gradient": (torch.tensor(0.5, requires_grad=True), 0.5),
}
# Text that float() takes is a number where a number is wanted, and text in metadata.
NUMBERS_IN_TEXT = {
    "text of a number": ("0.5", 0.5),
    "text with blanks": (" 1e-3\n", 1e-3),
    "str of numpy": (np.str_("2"), 2),
}
NOT_FINITE = {"NaN": math.nan, "infinity": math.inf, "numpy NaN": np.float32("nan"), "text of NaN": "nan"}
TEXTS = {"text": "timeout", "no text": "", "a lone surrogate": LONE, "halves": "\udc00\ud800", "NUL": "a\x00b"}
NOT_NUMBERS = {
    "None": None,
    "bytes": b"0.5 points",
    "bytes that are no UTF-8": b"\xff",
    "list": [1],
    "tuple": (1, 2),
    "set": {1, 2},
    "dict": {"a": 1},
    "dict with foreign keys": {(1, 2): 1, 3: 2},
    "dict of itself": itself(),
    "numpy array": np.array([1, 2]),
    "torch tensor": torch.tensor([1.0, 2.0]),
    "too large for a float": 10**400,
    "complex": 1j,
    "date": datetime.date(2026, 1, 2),
    "time": datetime.datetime(2026, 1, 2, 3),
    "timedelta": datetime.timedelta(seconds=2),
    "numpy date": np.datetime64("2026-01-02"),
    "UUID": uuid.UUID(int=1),
    "path": Path("a/b"),
    "exception": ValueError("x"),
    "class": int,
    "function": itself,
    "object": object(),
    "object without repr": Silent(),
    "object whose float() fails": Unhelpful(),
    "pydantic object": Verdict(),
    "dataclass": Plain(),
    "message object": ChatCompletionMessage(role="assistant", content="hi"),
    "completion": COMPLETION,
    "list of choices": [sampled()],
    "parts": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
}
# Python itself can't write it; where it may stand in a message, writing the message down fails by name.
TOO_LARGE_FOR_TEXT = 10**5000
ALL = {
    **{name: value for name, (value, _) in (NUMBERS | NUMBERS_IN_TEXT).items()},
    **NOT_FINITE,
    **TEXTS,
    **NOT_NUMBERS,
}


def put_reward(trajectory, value):
    trajectory.reward = value


def put_metric(trajectory, value):
    trajectory.metrics["mark"] = value


def put_metadata(trajectory, value):
    trajectory.metadata["mark"] = value


def put_log(trajectory, value):
    trajectory.logs.append(value)


def put_tool_result(trajectory, value):
    trajectory.messages_and_choices.append({"role": "tool", "tool_call_id": "c", "content": value})


def put_argument(trajectory, value):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": value}}
    trajectory.messages_and_choices.append({"role": "assistant", "content": None, "tool_calls": [call]})


def put_role(trajectory, value):
    trajectory.messages_and_choices.append({"role": value, "content": "x"})


def put_item(trajectory, value):
    trajectory.messages_and_choices.append(value)


def put_item_elsewhere(trajectory, value):
    trajectory.additional_histories.append(art.History())
    trajectory.additional_histories[0].messages_and_choices.append(value)


# Where a value may be put, and what its error names.
PLACES = {
    "reward": (put_reward, r"reward"),
    "metrics": (put_metric, r"metrics\['mark'\] cannot be kept"),
    "metadata": (put_metadata, r"metadata\['mark'\] cannot be kept"),
    "logs": (put_log, r"logs\[0\] cannot be kept"),
    "tool result": (put_tool_result, r"item 2 cannot be used"),
    "argument of a call": (put_argument, r"item 2 cannot be used"),
    "role": (put_role, r"item 2 cannot be used"),
    "item": (put_item, r"item 2 cannot be used"),
    "item of an additional history": (put_item_elsewhere, r"additional_histories\[0\], item 0 cannot be used"),
}


def attempt(reward=1.0):
    return art.Trajectory(messages_and_choices=[{"role": "user", "content": "?"}, sampled()], reward=reward)


async def spoilt(place, value):
    trajectory = attempt()
    await asyncio.sleep(0)
    PLACES[place][0](trajectory, value)
    return trajectory


async def good(reward):
    await asyncio.sleep(0)
    return attempt(reward)


async def gathered(place, value):
    """The trajectory, or why there is none; that the others are kept is shown for both ways to gather."""
    (group,) = await art.gather_trajectory_groups(
        [art.TrajectoryGroup([good(0), spoilt(place, value), good(2)])], pbar_desc=None, max_exceptions=1
    )
    first, result, last = await art.gather_trajectories(
        [good(0), spoilt(place, value), good(2)], pbar_desc=None, max_exceptions=1
    )
    assert (first.reward, last.reward) == (0, 2)
    if isinstance(result, art.Trajectory):
        assert len(group) == 3
        return group[1]
    assert [t.reward for t in group] == [0, 2]
    assert len(group.exceptions) == 1
    assert not isinstance(result, TypeError | AttributeError), "a bare error"
    return result


def alike(value):
    """Comparable by content, with NaN equal to itself and two halves of a character the character."""
    if isinstance(value, dict):
        return {alike(name): alike(item) for name, item in value.items()}
    if isinstance(value, list):
        return [alike(item) for item in value]
    if isinstance(value, str):
        return (
            value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass").encode("utf-8", "surrogatepass")
        )
    return repr(value)


@pytest.fixture
def model(tmp_path):
    return art.Model(name="m", project="p", base_path=str(tmp_path), report_metrics=["tracker-files"])


async def logged(model, group, *, step):
    """What the files hold of the group, and what was warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        await model.log([group], step=step, split="train", metrics={"loss/train": 0.25})
    folder = model._folder()
    (back,) = files.read_trajectories(folder / "trajectories" / "train" / f"{step:04d}.parquet")
    (row,) = [record for record in files.read_history(folder / "history.jsonl") if record["step"] == step]
    assert row["loss/train"] == 0.25
    return back, row, "\n".join(str(warning.message) for warning in said)


def named(place):
    return re.compile(PLACES[place][1])


# The kinds, one by one


def takes(place, kind):
    """Whether the value can stand in the place: the rule that users are told, in a second form."""
    value = ALL[kind]
    if place in ("reward", "metrics"):
        finite = kind not in NOT_FINITE or place == "metrics"
        return finite and kind in {**NUMBERS, **NUMBERS_IN_TEXT, **NOT_FINITE}
    if place == "metadata":
        return kind not in NOT_NUMBERS or value is None
    if place == "logs":
        return kind != "object without repr"
    if place.startswith("item"):
        return False
    return kind not in UNWRITABLE


# JSON has a form for numbers, text, dates, paths, ...; for these it has none.
UNWRITABLE = {
    "bytes that are no UTF-8", "dict of itself", "numpy array", "torch tensor", "numpy date", "exception", "class",
    "function", "object", "object without repr", "object whose float() fails",
}  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("place", PLACES)
async def test_a_value_is_kept_everywhere_or_named_everywhere(model, tmp_path, place, kind):
    value = ALL[kind]
    result = await gathered(place, value)
    if not takes(place, kind):
        assert isinstance(result, Exception)
        assert named(place).search(str(result)), str(result)
        if place == "reward" and kind not in NOT_FINITE:
            return  # it can't even be set
    else:
        assert isinstance(result, art.Trajectory), result
    # Whoever gathers by other means hands it to train and log as it is.
    spoilt_one = await spoilt(place, value)
    group = art.TrajectoryGroup([attempt(0), spoilt_one, attempt(2)])
    step_file = tmp_path / "step.groups"
    if takes(place, kind):
        check_groups([group])
        groups_file.write_groups(step_file, [group])
        (trained,) = groups_file.read_groups(step_file)
    else:
        with pytest.raises(InvalidTrajectory, match=r"^trajectory_groups\[0\]\.trajectories\[1\][.:]") as refused:
            check_groups([group])
        assert named(place).search(str(refused.value))
    back, row, said = await logged(model, group, step=1)
    assert [t.reward for t in back][::2] == [0, 2]
    assert len(back) == 3
    if takes(place, kind):
        assert "cannot be kept" not in said
        assert "cannot be used" not in said
        assert alike([t.for_logging() for t in back]) == alike([t.for_logging() for t in trained])
    elif place == "reward":
        assert "not finite numbers: train/reward=" in said
    else:
        assert named(place).search(said), said
        assert "trajectory_groups[0].trajectories[1]" in said
        assert back[1].choices() == [sampled()]
    assert math.isfinite(row["train/reward"]) == (place != "reward" or kind not in NOT_FINITE)


@pytest.mark.parametrize("place", ["reward", "metrics", "metadata", "logs"])
async def test_a_number_that_python_cannot_write_is_named(place):
    result = await gathered(place, TOO_LARGE_FOR_TEXT)
    assert isinstance(result, ValueError)
    assert named(place).search(str(result))


@pytest.mark.parametrize("kind", NUMBERS | NUMBERS_IN_TEXT)
@pytest.mark.parametrize("place", ["reward", "metrics", "metadata"])
async def test_a_number_is_that_number_and_python_s_own(model, place, kind):
    value, number = (NUMBERS | NUMBERS_IN_TEXT)[kind]
    if place == "metadata" and kind in NUMBERS_IN_TEXT:
        number = value
    trajectory = await gathered(place, value)
    back, row, _ = await logged(model, art.TrajectoryGroup([trajectory]), step=2)
    for each in (trajectory, back[0]):
        kept = each.reward if place == "reward" else getattr(each, place)["mark"]
        assert kept == number
        assert type(kept) in ((float,) if place == "reward" else (float, int, bool, str, type(value)))
    if place == "metrics":
        assert row["train/mark"] == pytest.approx(float(number))


@pytest.mark.parametrize("kind", TEXTS)
async def test_text_comes_back_as_it_was(model, tmp_path, kind):
    text = TEXTS[kind]
    trajectory = attempt()
    trajectory.metadata[text] = text
    trajectory.metrics[text] = 1
    trajectory.log(text)
    put_tool_result(trajectory, text)
    put_argument(trajectory, text)
    trajectory.tools = [{"type": "function", "function": {"name": text, "description": text}}]
    group = art.TrajectoryGroup([trajectory, RuntimeError(text)], metadata={text: text}, metrics={text: 1}, logs=[text])
    trajectory.messages()
    check_groups([group])
    groups_file.write_groups(tmp_path / "step.groups", [group])
    (trained,) = groups_file.read_groups(tmp_path / "step.groups")
    back, row, said = await logged(model, group, step=3)
    assert said == ""
    assert row[f"train/{text}"] == 1
    for other in (trained, back):
        assert alike(other.for_logging()) == alike(group.for_logging())
        assert other.exceptions == group.exceptions
        assert other[0].logs == [text]


# Slips in building a trajectory


@pytest.mark.parametrize(
    ("slip", "kind"),
    [
        (COMPLETION, "ChatCompletion"),
        ([sampled()], "list"),
        (COMPLETION.choices[0].message, "ChatCompletionMessage"),
        ("Hello", "str"),
        (None, "NoneType"),
        ((sampled(),), "tuple"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_slip_is_told_at_its_place_and_again_by_train(slip, kind):
    trajectory = attempt()
    trajectory.messages_and_choices.append(slip)
    words = (
        f"item 2 cannot be used: a trajectory holds message dictionaries and the choices of a chat completion, not"
        f" {kind}; append `chat_completion.choices[0]`"
    )
    with pytest.raises(InvalidTrajectory) as at_its_place:
        trajectory.messages()
    assert str(at_its_place.value) == words
    with pytest.raises(InvalidTrajectory) as by_train:
        check_groups([art.TrajectoryGroup([trajectory])])
    assert str(by_train.value) == f"trajectory_groups[0].trajectories[0]: {words}"


def test_a_choice_s_dictionary_is_its_choice_wherever_it_is_put():
    trajectory = attempt()
    trajectory.messages_and_choices.append(sampled(policy_version=4).model_dump())
    assert trajectory.messages()[-1] == {"role": "assistant", "content": "yes"}
    assert trajectory.choices()[1].token_ids == [7]
    assert trajectory.policy_versions() == {0, 4}


def test_train_names_all_that_is_wrong_at_once():
    bad = [attempt() for _ in range(3)]
    bad[0].metrics["m"] = "timeout"
    bad[1].metadata["m"] = [1]
    bad[2].messages_and_choices.append(COMPLETION)
    groups = [art.TrajectoryGroup([attempt(0), bad[0]]), art.TrajectoryGroup([*bad[1:], attempt(math.nan)])]
    groups[1].metrics["m"] = None
    groups[1].trajectories.append("no trajectory")
    with pytest.raises(InvalidTrajectory) as refused:
        check_groups(groups)
    first, *lines, todo = str(refused.value).splitlines()
    assert first == "6 values cannot be trained on:"
    assert [line.partition("cannot")[0].partition(" is ")[0].rstrip() for line in lines] == [
        "trajectory_groups[0].trajectories[1].metrics['m']",
        "trajectory_groups[1].metrics['m']",
        "trajectory_groups[1].trajectories[0].metadata['m']",
        "trajectory_groups[1].trajectories[1]: item 2",
        "trajectory_groups[1].trajectories[2].reward",
        "trajectory_groups[1].trajectories[3]",
    ]
    assert "art.gather_trajectory_groups(groups, max_exceptions=...)" in todo


async def test_what_train_refuses_gathering_again_makes_exceptions_of():
    bad = attempt(5)
    bad.metrics["m"] = "timeout"
    groups = [art.TrajectoryGroup([attempt(0), bad, attempt(2)]), art.TrajectoryGroup([attempt(1), attempt(3)])]
    with pytest.raises(InvalidTrajectory):
        check_groups(groups)
    kept = await art.gather_trajectory_groups(groups, pbar_desc=None, max_exceptions=1)
    check_groups(kept)
    assert [[t.reward for t in group] for group in kept] == [[0, 2], [1, 3]]


async def test_what_is_wrong_with_a_group_s_own_values_costs_no_rollout():
    with pytest.raises(ValueError, match="is not one number"):
        art.TrajectoryGroup([], metrics={"m": None})
    rollout = good(1)
    with pytest.raises(ValueError, match="is not one number"):
        art.TrajectoryGroup([rollout], metrics={"m": None})  # said before the rollouts are paid for
    rollout.close()
    group = art.TrajectoryGroup([attempt(1), attempt(2)], metadata={"kept": 1})
    group.metrics["m"], group.metadata["n"] = None, {}
    group.exceptions.append(ValueError("raw"))
    with pytest.warns(RuntimeWarning) as said:
        (kept,) = await art.gather_trajectory_groups([group], pbar_desc=None, max_exceptions=1)
    assert [str(warning.message) for warning in said] == [
        "groups[0].metrics['m'] cannot be kept: None is not one number; it is left out",
        "groups[0].metadata['n'] cannot be kept: {} is not text, one number or None; it is left out",
    ]
    assert (len(kept), kept.metrics, kept.metadata, str(kept.exceptions[0])) == (2, {}, {"kept": 1}, "ValueError: raw")


# A whole step


def leave(_):
    raise SystemExit(1)


SPOILS = {
    "reward": lambda t: setattr(t, "reward", None),
    "0.5 points": lambda t: setattr(t, "reward", "0.5 points"),
    "reward is nan": lambda t: setattr(t, "reward", math.nan),
    "metrics['none']": lambda t: t.metrics.update(none=None),
    "metrics['list']": lambda t: t.metrics.update(list=[1]),
    "metadata['table']": lambda t: t.metadata.update(table={"a": 1}),
    "logs[0]": lambda t: t.logs.append(Silent()),
    "item 2 cannot be used: a message needs a 'role'": lambda t: t.messages_and_choices.append({"content": "x"}),
    "item 2 cannot be used: a trajectory holds": lambda t: t.messages_and_choices.append(COMPLETION),
    "SystemExit": leave,
}


async def test_of_a_step_with_ten_spoilt_in_ten_ways_all_others_are_trained_and_logged(model, tmp_path):
    tokenize = pytest.importorskip("art_training_kit.tokenize")
    spoilt_at = {25 * i + 3: spoil for i, spoil in enumerate(SPOILS.values())}

    async def rollout(number):
        trajectory = attempt(2 ** (number % 8))  # none of which is the mean of a group, with an advantage of 0
        trajectory.metadata["number"] = number
        if number in spoilt_at:
            spoilt_at[number](trajectory)
        return trajectory

    groups = await art.gather_trajectory_groups(
        [art.TrajectoryGroup(rollout(8 * g + i) for i in range(8)) for g in range(32)],
        pbar_desc=None,
        max_exceptions=len(SPOILS),
    )
    check_groups(groups)
    groups_file.write_groups(tmp_path / "step.groups", groups)
    step = tokenize.tokenize_groups(
        groups_file.read_records(tmp_path / "step.groups"), vocabulary_size=10, max_length=10
    )
    assert (len(step.rows), step.metrics["data/step_num_trajectories_trained"]) == (246, 246)
    await model.log(groups, step=1, split="train")
    back = files.read_trajectories(model._folder() / "trajectories" / "train" / "0001.parquet")
    kept = {trajectory.metadata["number"] for group in back for trajectory in group}
    assert kept == set(range(256)) - spoilt_at.keys()
    named_ones = [str(error) for group in back for error in group.exceptions]
    assert len(named_ones) == len(SPOILS)
    for words, error in zip(SPOILS, named_ones, strict=True):
        assert words in error


# Anything in any place

OF_THE_TABLE = [value for name, value in ALL.items() if name != "object without repr"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=4) | st.complex_numbers()
    | st.decimals() | st.fractions() | st.dates() | st.datetimes() | st.timedeltas() | st.uuids()
    | st.text(st.characters(categories=["Cs", "Lu"]), max_size=5) | st.sampled_from(OF_THE_TABLE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(sorted(PLACES)), value=ANYTHING)
def test_anything_anywhere_is_kept_the_same_or_named(tmp_path_factory, place, value):
    async def through():
        result = await gathered(place, value)
        if isinstance(result, Exception):
            assert named(place).search(str(result)), str(result)
        try:
            one = await spoilt(place, value)
        except ValueError:
            return
        group = art.TrajectoryGroup([attempt(0), one, attempt(2)])
        folder = tmp_path_factory.mktemp("any")
        model = art.Model(name="m", project="p", base_path=str(folder))
        back, _, said = await logged(model, group, step=1)
        assert [len(back), back[0].reward, back[2].reward] == [3, 0, 2]
        if isinstance(result, Exception):
            with pytest.raises(InvalidTrajectory, match=r"trajectory_groups\[0\]\.trajectories\[1\]"):
                check_groups([group])
            assert "trajectories[1]" in said or "not finite" in said or abs(one.reward) > 1e150
        else:
            check_groups([group])
            groups_file.write_groups(folder / "step.groups", [group])
            (trained,) = groups_file.read_groups(folder / "step.groups")
            assert alike([t.for_logging() for t in back]) == alike([t.for_logging() for t in trained])
            assert without_unsound(group, "groups[0]") == (group, [])

    asyncio.run(through())
