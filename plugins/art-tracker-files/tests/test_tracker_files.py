import asyncio
import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.chat_completion import Choice

from art_core import History, Trajectory, TrajectoryGroup, announce, installed_plugins
from art_core.history import append_history
from art_tracker_files import read_history, read_trajectories


@dataclass
class Logged:
    base_path: str
    name: str = "agent-001"
    project: str = "task"

    @property
    def folder(self) -> Path:
        return Path(self.base_path) / "task" / "models" / "agent-001"


@pytest.fixture
def model(tmp_path):
    return Logged(str(tmp_path))


async def log(model, *, groups=None, metrics=None, step=1, split="train"):
    registry = installed_plugins()
    if groups is not None:
        await announce(registry, "art_log_trajectories", model=model, trajectory_groups=groups, step=step, split=split)
    if metrics is not None:
        await announce(registry, "art_log_metrics", model=model, metrics=metrics, step=step, split=split)


def sampled(text="hé", *, logprobs=(-0.25, -1.5), version=3, **extra):
    content = [
        {
            "token": t,
            "bytes": list(t.encode()),
            "logprob": p,
            "top_logprobs": [{"token": "z", "bytes": None, "logprob": -3.0}],
        }
        for t, p in zip(text, logprobs, strict=True)
    ]
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text, "reasoning": "because"},
            "logprobs": {"content": content, "refusal": None},
            "token_ids": [7, 2**40],
            "prompt_token_ids": [1, 2, 3],
            "policy_version": version,
            **extra,
        }
    )


def whole_group():
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    tool_call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    trajectory = Trajectory(
        messages_and_choices=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Look\nhere."}]},
            sampled(),
            {"role": "assistant", "content": None, "tool_calls": [tool_call]},
            {"role": "tool", "tool_call_id": "c1", "content": "seen"},
            sampled("ok", version=4),
        ],
        tools=tools,
        additional_histories=[
            History(messages_and_choices=[{"role": "user", "content": "sub"}, sampled("no")], tools=None),
            History(messages_and_choices=[], tools=tools),
        ],
        reward=0.1 + 0.2,
        initial_policy_version=3,
        final_policy_version=4,
        metrics={"hits": 3, "won": True, "share": 1 / 3},
        metadata={"id": "x", "n": 2, "ok": False, "none": None, "f": 2.0},
        logs=["one", "two\nlines"],
    )
    try:
        raise RuntimeError("the tool is gone")
    except RuntimeError as error:
        failure = error
    return TrajectoryGroup(
        [trajectory, Trajectory(reward=-1.0)],
        exceptions=[failure],
        metadata={"scenario": 4},
        metrics={"judge": 0.5},
        logs=["judged"],
    )


def same(a: TrajectoryGroup, b: TrajectoryGroup) -> None:
    assert b.model_dump() == a.model_dump()
    for left, right in zip(a, b, strict=True):
        for one, other in zip(left.histories(), right.histories(), strict=True):
            assert [type(item) for item in one.messages_and_choices] == [type(i) for i in other.messages_and_choices]
            assert one.choices() == other.choices()


async def test_trajectories_come_back_as_they_went_in(model):
    groups = [whole_group(), TrajectoryGroup([]), TrajectoryGroup([], exceptions=[ValueError("all failed")])]
    await log(model, groups=groups, step=42)
    path = model.folder / "trajectories" / "train" / "0042.parquet"
    back = read_trajectories(path)
    assert len(back) == len(groups)
    for before, after in zip(groups, back, strict=True):
        same(before, after)
    assert "the tool is gone" in back[0].exceptions[0].traceback
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


async def test_the_table_can_be_queried(model):
    await log(model, groups=[whole_group()])
    rows = pq.read_table(model.folder / "trajectories" / "train" / "0001.parquet").to_pylist()
    assert [row["kind"] for row in rows] == ["trajectory", "trajectory", "exception"]
    assert rows[0]["reward"] == 0.1 + 0.2
    assert json.loads(rows[0]["metrics"])["hits"] == 3
    assert json.loads(rows[0]["messages"])[2]["content"] == "hé"
    assert rows[0]["histories"][0]["items"][2]["token_ids"] == [7, 2**40]
    assert rows[0]["histories"][0]["items"][2]["logprobs"] == [-0.25, -1.5]
    assert rows[2]["error_type"] == "RuntimeError"


async def test_values_that_json_cannot_hold_survive(model):
    group = TrajectoryGroup(
        [
            Trajectory(
                messages_and_choices=[sampled(logprobs=(-math.inf, -0.1), finish_reason="stop")],
                reward=math.inf,
                metrics={"lost": math.nan},
            )
        ]
    )
    await log(model, groups=[group])
    (back,) = read_trajectories(model.folder / "trajectories")
    assert back[0].reward == math.inf
    assert math.isnan(back[0].metrics["lost"])
    assert [t.logprob for t in back[0].choices()[0].logprobs.content] == [-math.inf, -0.1]


async def test_a_second_log_of_a_step_is_added(model):
    first, second = whole_group(), TrajectoryGroup([Trajectory(reward=9.0)], metadata={"second": True})
    await log(model, groups=[first])
    await log(model, groups=[second])
    await log(model, groups=[second], split="val")
    back = read_trajectories(model.folder / "trajectories" / "train" / "0001.parquet")
    assert len(back) == 2
    same(first, back[0])
    same(second, back[1])
    assert len(read_trajectories(model.folder / "trajectories")) == 3


async def test_logs_at_once_lose_nothing(model):
    group = TrajectoryGroup([Trajectory(reward=1.0)])
    await asyncio.gather(*(log(model, groups=[group], metrics={"train/n": float(i)}) for i in range(12)))
    assert len(read_trajectories(model.folder / "trajectories")) == 12
    assert {record["train/n"] for record in read_history(model.folder / "history.jsonl")} == set(map(float, range(12)))


async def test_an_unreadable_file_is_kept_and_a_new_one_begun(model):
    path = model.folder / "trajectories" / "train" / "0001.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"0001\.parquet is not a parquet file of trajectories"):
        read_trajectories(path)
    with pytest.warns(RuntimeWarning, match="kept as 0001.parquet.unreadable-"):
        await log(model, groups=[whole_group()])
    assert len(read_trajectories(path)) == 1
    assert [f.read_bytes() for f in path.parent.glob("*.unreadable-*")] == [b"not parquet at all"]


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trajectories(tmp_path / "0001.parquet")
    with pytest.raises(FileNotFoundError, match="no parquet file under"):
        read_trajectories(tmp_path)
    assert read_history(tmp_path / "history.jsonl") == []


async def test_history_holds_every_metric(model):
    await log(model, metrics={"train/reward": 0.5, "loss/train": math.nan, "loss/grad_norm": math.inf}, step=3)
    await log(model, metrics={"val/reward": 1.0}, step=4, split="val")
    path = model.folder / "history.jsonl"
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second = read_history(str(path))
    assert (first["step"], first["split"], first["train/reward"]) == (3, "train", 0.5)
    assert math.isnan(first["loss/train"])
    assert first["loss/grad_norm"] == math.inf
    assert first["recorded_at"] < second["recorded_at"]
    assert second["val/reward"] == 1.0


def test_a_torn_line_costs_only_itself(tmp_path):
    path = tmp_path / "history.jsonl"
    append_history(path, {"train/reward": 1.0}, step=1, split="train")
    with path.open("ab") as file:
        file.write(b'{"step": 2, "train/rew')
    assert [record["step"] for record in read_history(path)] == [1]
    append_history(path, {"train/reward": 3.0}, step=3, split="train")
    with pytest.warns(RuntimeWarning, match="line 2 of .* is not whole"):
        assert [record["step"] for record in read_history(path)] == [1, 3]


FULL_DISK = """
import asyncio, resource, sys, warnings
sys.path.insert(0, {tests!r})
from test_tracker_files import Logged, log, whole_group
from art_core import installed_plugins
from pathlib import Path

async def main():
    model = Logged({path!r})
    installed_plugins()
    await log(model, groups=[whole_group()], metrics={{"train/reward": 1.0}})
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await log(model, groups=[whole_group()] * 50)
        for i in range(50):
            await log(model, metrics={{"train/reward": 2.0, "loss/train": 0.125}}, step=7)
    print([str(w.message) for w in caught if "tracker-files" in str(w.message)])
asyncio.run(main())
"""


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_the_old_files(tmp_path):
    """A file size limit makes the kernel refuse the write half-way, as a full disk does."""
    script = FULL_DISK.format(tests=str(Path(__file__).parent), path=str(tmp_path), limit=2000)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = eval(done.stdout)
    model = Logged(str(tmp_path))
    assert any("art_log_trajectories" in line and "the file is as it was before" in line for line in said)
    assert any("art_log_metrics" in line and '"loss/train": 0.125' in line for line in said)
    records = read_history(model.folder / "history.jsonl")
    assert records[0]["train/reward"] == 1.0
    assert all(record["step"] in (1, 7) for record in records)
    assert (model.folder / "history.jsonl").read_bytes().endswith(b"\n")
    (back,) = read_trajectories(model.folder / "trajectories" / "train" / "0001.parquet")
    same(whole_group_without_time(back), back)
    assert sorted(f.name for f in (model.folder / "trajectories" / "train").iterdir()) == ["0001.parquet"]


def whole_group_without_time(like):
    group = whole_group()
    for made, read in zip(group, like, strict=True):
        made.start_time = read.start_time
    group.exceptions = like.exceptions
    return group


def test_loading_the_plugin_imports_no_pyarrow():
    code = textwrap.dedent("""
        import sys
        from art_core import installed_plugins
        import art_tracker_files.plugin
        assert "pyarrow" not in sys.modules
    """)
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "ART_LOAD_PLUGINS": "tracker-files"}
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBER = st.one_of(st.integers(-(2**31), 2**31), st.floats(allow_nan=False), st.booleans())
LOGPROB = st.floats(max_value=0.0, allow_nan=False)


@st.composite
def choices(draw):
    tokens = draw(st.lists(st.tuples(TEXT, LOGPROB, st.integers(0, 2**20)), max_size=6))
    content = [{"token": t, "bytes": list(t.encode()), "logprob": p, "top_logprobs": []} for t, p, _ in tokens]
    fields = {
        "index": 0,
        "finish_reason": draw(st.sampled_from(["stop", "length", "tool_calls"])),
        "message": {"role": "assistant", "content": draw(st.none() | TEXT)},
        "logprobs": draw(
            st.sampled_from([None, {"content": content, "refusal": None}, {"content": None, "refusal": None}])
        ),
    }
    if draw(st.booleans()):
        fields |= {"token_ids": [i for *_, i in tokens], "prompt_token_ids": draw(st.lists(st.integers(0, 9)))}
    if draw(st.booleans()):
        fields["policy_version"] = draw(st.integers(0, 10))
    return Choice.model_validate(fields)


ITEMS = st.lists(
    st.one_of(st.builds(lambda text: {"role": "user", "content": text}, TEXT), choices()),
    max_size=4,
)
TRAJECTORIES = st.builds(
    Trajectory,
    messages_and_choices=ITEMS,
    tools=st.none() | st.just([]),
    additional_histories=st.lists(st.builds(History, messages_and_choices=ITEMS), max_size=2),
    reward=st.floats(allow_nan=False),
    initial_policy_version=st.none() | st.integers(0, 9),
    final_policy_version=st.none() | st.integers(0, 9),
    metrics=st.dictionaries(TEXT, NUMBER, max_size=3),
    metadata=st.dictionaries(TEXT, st.none() | NUMBER | TEXT, max_size=3),
    logs=st.lists(TEXT, max_size=2),
)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(st.lists(TRAJECTORIES, max_size=3), st.lists(TEXT, max_size=2)), max_size=3))
def test_any_groups_come_back(tmp_path_factory, drawn):
    from art_tracker_files.trajectory_files import add_trajectories

    groups = [TrajectoryGroup(t, exceptions=[ValueError(e) for e in errors]) for t, errors in drawn]
    path = tmp_path_factory.mktemp("any") / "0001.parquet"
    add_trajectories(path, groups[:1])
    add_trajectories(path, groups[1:])
    back = read_trajectories(path)
    assert len(back) == len(groups)
    for before, after in zip(groups, back, strict=True):
        same(before, after)
