"""Checkpoint folders: whole or not there, each corruption named and skipped, nothing deleted."""

from __future__ import annotations

import json
import math
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_core import CheckpointRef, ModelKey
from art_core.atomic_files import write_atomically, write_json_atomically
from art_core.errors import CorruptCheckpoint
from art_engine_kit.canary import CANARY, Canary, CanaryPrompt, read_canary
from art_engine_kit.checkpoint_folder import (
    ADAPTER_WEIGHTS,
    MANIFEST,
    CheckpointManifest,
    read_manifest,
    remove_unfinished,
    saving,
    step_folder,
    whole_steps,
)

KEY = ModelKey("project", "agent")


def save(checkpoints: Path, step: int, content: bytes = b"weights", metrics: dict[str, float] | None = None) -> Path:
    folder = step_folder(checkpoints, step)
    with saving(folder, step=step, base_model="tiny", engine="torch", metrics=metrics) as temporary:
        (temporary / ADAPTER_WEIGHTS).write_bytes(content)
        (temporary / "adapter_config.json").write_text("{}")
    return folder


def steps_with_warnings(checkpoints: Path) -> tuple[list[int], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = list(whole_steps(checkpoints))
    return steps, [str(warning.message) for warning in caught]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_saved_can_be_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 7, metrics={"loss/train": 0.5})
    assert folder.name == "0007"
    manifest = read_manifest(folder, hashes=True)
    assert (manifest.step, manifest.base_model, manifest.engine) == (7, "tiny", "torch")
    assert manifest.metrics == {"loss/train": 0.5}
    assert set(manifest.files) == {ADAPTER_WEIGHTS, "adapter_config.json"}
    assert manifest.files[ADAPTER_WEIGHTS].size == len(b"weights")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["0007"]


@given(st.dictionaries(st.text(), st.floats()))
def test_metrics_come_back_whatever_number_they_hold(metrics: dict[str, float]) -> None:
    manifest = CheckpointManifest(step=1, base_model="tiny", engine="torch", metrics=metrics, files={})
    back = CheckpointManifest.model_validate_json(manifest.model_dump_json())
    assert back.metrics.keys() == metrics.keys()
    assert all(back.metrics[k] == v or (math.isnan(v) and math.isnan(back.metrics[k])) for k, v in metrics.items())


def test_a_loss_that_is_not_a_number_does_not_corrupt_its_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, metrics={"loss/kl_div": math.nan, "loss/train": -math.inf})
    assert steps_with_warnings(tmp_path) == ([1], [])


def test_files_in_subfolders_are_in_the_manifest(tmp_path: Path) -> None:
    with saving(tmp_path / "0001", step=1, base_model="tiny", engine="torch") as folder:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text("{}")
    assert set(read_manifest(tmp_path / "0001").files) == {"tokenizer/vocab.json"}
    (tmp_path / "0001" / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer/vocab\.json cannot be read"):
        read_manifest(tmp_path / "0001")


def test_an_error_while_saving_leaves_nothing_and_reaches_the_caller(tmp_path: Path) -> None:
    old = tree(save(tmp_path, 1))
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        saving(tmp_path / "0002", step=2, base_model="tiny", engine="torch") as folder,
    ):
        (folder / ADAPTER_WEIGHTS).write_bytes(b"half")
        raise RuntimeError("out of memory")
    assert [p.name for p in tmp_path.iterdir()] == ["0001"]
    assert tree(tmp_path / "0001") == old


def test_a_step_is_never_written_twice(tmp_path: Path) -> None:
    old = tree(save(tmp_path, 1, b"first"))
    with pytest.raises(FileExistsError, match="never written twice"):
        save(tmp_path, 1, b"second")
    assert tree(tmp_path / "0001") == old
    assert [p.name for p in tmp_path.iterdir()] == ["0001"]


def test_of_two_writers_of_one_step_one_wins_whole_and_the_other_is_told(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    outcomes: dict[str, BaseException | None] = {}

    def write(content: str) -> None:
        try:
            with saving(tmp_path / "0001", step=1, base_model="tiny", engine="torch") as folder:
                (folder / ADAPTER_WEIGHTS).write_bytes(content.encode() * 1000)
                (folder / "author").write_text(content)
                barrier.wait(timeout=20)
            outcomes[content] = None
        except BaseException as error:
            outcomes[content] = error

    writers = [threading.Thread(target=write, args=(name,)) for name in ("left", "right")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=30)
    (lost,) = [error for error in outcomes.values() if error is not None]
    (winner,) = [name for name, error in outcomes.items() if error is None]
    assert isinstance(lost, FileExistsError)
    assert "another writer" in str(lost)
    read_manifest(tmp_path / "0001", hashes=True)
    assert (tmp_path / "0001" / "author").read_text() == winner
    assert [p.name for p in tmp_path.iterdir()] == ["0001"]


def _truncate(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).write_bytes(b"wei")


def _remove_weights(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).unlink()


def _remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _empty_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"")


def _half_manifest(folder: Path) -> None:
    content = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(content[: len(content) // 2])


def _binary_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")


def _other_format(folder: Path) -> None:
    _edit(folder, format=2)


def _other_step(folder: Path) -> None:
    _edit(folder, step=9)


def _manifest_is_a_folder(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


CORRUPTIONS: list[tuple[Callable[[Path], None], str]] = [
    (_truncate, "adapter_model.safetensors has 3 bytes where its manifest says 7"),
    (_remove_weights, "adapter_model.safetensors cannot be read"),
    (_remove_manifest, "it has no manifest"),
    (_empty_manifest, "its manifest cannot be read"),
    (_half_manifest, "its manifest cannot be read"),
    (_binary_manifest, "its manifest cannot be read"),
    (_other_format, "its manifest cannot be read"),
    (_other_step, "its manifest says step 9"),
    (_manifest_is_a_folder, "its manifest cannot be read"),
    (_empty, "it has no manifest"),
]


@pytest.mark.parametrize(("corrupt", "said"), CORRUPTIONS, ids=[c.__name__.strip("_") for c, _ in CORRUPTIONS])
def test_each_corruption_is_named_and_skipped_and_the_last_good_one_used(
    tmp_path: Path, corrupt: Callable[[Path], None], said: str
) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    corrupt(bad)
    left = tree(bad)
    with pytest.raises(CorruptCheckpoint) as caught:
        read_manifest(bad)
    assert said in str(caught.value)
    assert str(bad) in str(caught.value)
    steps, told = steps_with_warnings(tmp_path)
    assert steps == [1]
    assert len(told) == 1
    assert said in told[0]
    assert "skipped and kept" in told[0]
    assert tree(bad) == left


def test_changed_bytes_of_the_same_size_are_found_by_their_hash(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / ADAPTER_WEIGHTS).write_bytes(b"WEIGHTS")
    read_manifest(folder)
    with pytest.raises(CorruptCheckpoint, match=r"adapter_model\.safetensors differs from what was saved"):
        read_manifest(folder, hashes=True)


def test_a_corrupt_step_can_be_written_again_and_nothing_of_it_is_lost(tmp_path: Path) -> None:
    _truncate(save(tmp_path, 1))
    with pytest.warns(RuntimeWarning, match=r"kept as 0001\.corrupt-"):
        save(tmp_path, 1, b"anew")
    assert (tmp_path / "0001" / ADAPTER_WEIGHTS).read_bytes() == b"anew"
    (aside,) = tmp_path.glob("0001.corrupt-*")
    assert (aside / ADAPTER_WEIGHTS).read_bytes() == b"wei"
    assert steps_with_warnings(tmp_path) == ([1], [])


@pytest.mark.parametrize("name", ["notes", "0001.corrupt-abc", ".saving-0002-77-x", "²", "٣", "1"])
def test_other_names_are_no_steps(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert steps_with_warnings(tmp_path) == ([], [])


def test_steps_are_ordered_by_number_beyond_four_digits(tmp_path: Path) -> None:
    for step in (10000, 2, 9999):
        save(tmp_path, step)
    assert list(whole_steps(tmp_path)) == [2, 9999, 10000]
    assert max(whole_steps(tmp_path)) == 10000


def test_what_killed_writers_left_is_removed_by_name(tmp_path: Path) -> None:
    assert remove_unfinished(tmp_path / "never-made") == []
    save(tmp_path, 1)
    left = tmp_path / ".saving-0002-77-x"
    left.mkdir()
    (left / ADAPTER_WEIGHTS).write_bytes(b"half")
    assert remove_unfinished(tmp_path) == [left]
    assert [p.name for p in tmp_path.iterdir()] == ["0001"]


def test_a_canary_comes_back_with_impossible_tokens_too(tmp_path: Path) -> None:
    assert read_canary(tmp_path) is None
    canary = Canary(
        prompts=[CanaryPrompt(token_ids=[1, 2], expected={3: -0.5, 4: -math.inf}, previous={3: -0.25, 4: -9.0})]
    )
    write_atomically(tmp_path / CANARY, canary.model_dump_json().encode())
    assert read_canary(tmp_path) == canary
    (tmp_path / CANARY).write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"canary\.json cannot be read"):
        read_canary(tmp_path)


def test_an_atomic_write_that_fails_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_json_atomically(target, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(target, {"a": object()})
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_an_inference_name_and_an_adapter_name_say_step_and_project(tmp_path: Path) -> None:
    checkpoint = CheckpointRef(KEY, 3, tmp_path)
    assert (checkpoint.inference_name, checkpoint.adapter_name) == ("agent@3", "project/agent@3")
