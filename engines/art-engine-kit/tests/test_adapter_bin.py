"""adapter_model.bin: torch's own files are read to the last bit, and no file can make anything run."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from art_core.errors import AdapterMismatch
from art_engine_kit.adapter_bin import read_adapter_bin
from art_engine_kit.adapter_files import check_adapter
from art_engine_kit.base_shapes import LinearShapes

torch = pytest.importorskip("torch")


def zipped(pickled: bytes, file: Path, *, storages: dict[str, bytes] | None = None, **entries: bytes) -> Path:
    """A file as torch lays it out, around any pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", b"3\n")
        for key, content in (storages or {"0": bytes(64)}).items():
            archive.writestr(f"a/data/{key}", content)
        for name, content in entries.items():
            archive.writestr(f"a/{name}", content)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_torch_wrote_is_read_to_the_last_bit(dtype: Any, tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6).to(dtype)
    state = {
        "plain": whole,
        "transposed": whole.t(),
        "part": whole[1:3, 2:5],
        "of one storage": whole.view(-1)[::5],
        "parameter": torch.nn.Parameter(whole * 2),
        "one number": torch.tensor(3.0, dtype=dtype),
    }
    for content in (state, collections.OrderedDict(state)):
        torch.save(content, tmp_path / "adapter_model.bin")
        read = dict(read_adapter_bin(tmp_path / "adapter_model.bin"))
        assert list(read) == list(state)
        for name, tensor in state.items():
            assert read[name].shape == tuple(tensor.shape)
            assert np.array_equal(read[name].float32(), tensor.detach().float().numpy())


def test_an_adapter_is_the_same_from_both_files(
    make_adapter: Callable[..., Path], shapes: LinearShapes, tmp_path: Path
) -> None:
    folder = make_adapter()
    first = check_adapter(folder, shapes)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    second = check_adapter(folder, shapes)
    assert first.pairs.keys() == second.pairs.keys()
    for module, pair in first.pairs.items():
        assert np.array_equal(pair.a.float32(), second.pairs[module].a.float32())
        assert np.array_equal(pair.b.float32(), second.pairs[module].b.float32())


class Runs:
    """Unpickled as it would like to be, it calls something."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["system", "eval", "builtin in protocol 0", "import", "getattr", "torch.load"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(how: str, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    hostile = {
        "system": pickle.dumps(Runs(os.system, f"touch {mark}")),
        "eval": pickle.dumps({"x": Runs(eval, f"open({str(mark)!r}, 'w').close()")}),
        "builtin in protocol 0": pickle.dumps(Runs(eval, f"open({str(mark)!r}, 'w').close()"), protocol=0),
        "import": pickle.dumps([Runs(__import__, "antigravity")]),
        "getattr": pickle.dumps(Runs(getattr, Runs(__import__, "os"), "getpid")),
        "torch.load": pickle.dumps(Runs(torch.load, str(mark))),
    }[how]
    file = zipped(hostile, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterMismatch, match=r"adapter_model\.bin asks for \S+, which plain weights don't need"):
        read_adapter_bin(file)
    assert not mark.exists()
    if how in ("system", "eval", "builtin in protocol 0"):
        pickle.loads(hostile)
        assert mark.exists(), "the file would have run nothing anyway"
    # Torch's own careful reader is of the same mind.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


class Stored:
    """A tensor as torch pickles one, told in any way."""

    def __init__(self, *told: Any) -> None:
        self.told = told

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.told


class Pickler(pickle.Pickler):
    """Writes a tuple that begins with "storage" as torch writes where a tensor's bytes are."""

    def persistent_id(self, told: Any) -> Any:
        return told if isinstance(told, tuple) and told[:1] == ("storage",) else None


def told(*tensor: Any) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"x": Stored(*tensor)})
    return buffer.getvalue()


FLOATS = ("storage", torch.FloatStorage, "0", "cpu", 16)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ((FLOATS, 0, (5, 4), (4, 1), False, None), "reaches beyond its own bytes"),
        ((FLOATS, 15, (2,), (1,), False, None), "reaches beyond its own bytes"),
        ((FLOATS, 0, (1 << 20, 1 << 20), (0, 0), False, None), "reaches beyond its own bytes"),
        ((FLOATS, -1, (2,), (1,), False, None), "not a plain one"),
        ((FLOATS, 0, (2,), (-1,), False, None), "not a plain one"),
        ((FLOATS, 0, (2.0,), (1,), False, None), "not a plain one"),
        ((7, 0, (2,), (1,), False, None), "not a plain one"),
        (((*FLOATS[:2], "../0", "cpu", 16), 0, (2,), (1,), False, None), "no plain tensor's bytes"),
        (((*FLOATS[:2], "1", "cpu", 16), 0, (2,), (1,), False, None), "not a whole file"),
        ((("storage", torch.LongStorage, "0", "cpu", 8), 0, (2,), (1,), False, None), "asks for torch.LongStorage"),
    ],
)
def test_a_tensor_that_is_not_in_the_file_is_refused(tensor: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterMismatch, match=says):
        read_adapter_bin(zipped(told(*tensor), tmp_path / "adapter_model.bin"))


def test_what_is_no_file_of_plain_weights_is_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    with pytest.raises(AdapterMismatch, match="is missing"):
        read_adapter_bin(file)
    for content, says in (
        ([torch.zeros(2)], "holds a list where weights by name are expected"),
        ({"step": 3}, "'step', which is no tensor"),
        ({"x": {"y": torch.zeros(2)}}, "'x', which is no tensor"),
        ({3: torch.zeros(2)}, "3, which is no tensor"),
    ):
        torch.save(content, file)
        with pytest.raises(AdapterMismatch, match=rf"{says}.*save_pretrained\(new_folder\)"):
            read_adapter_bin(file)
    torch.save({"x": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterMismatch, match="not a whole file of torch weights"):
        read_adapter_bin(file)
    good = told(FLOATS, 0, (4, 4), (4, 1), False, None)
    assert read_adapter_bin(zipped(good, file, byteorder=b"little"))[0][1].shape == (4, 4)
    with pytest.raises(AdapterMismatch, match="big-endian"):
        read_adapter_bin(zipped(good, file, byteorder=b"big"))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", good)
    with pytest.raises(AdapterMismatch, match="compressed"):
        read_adapter_bin(file)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_in_words_or_read_whole(data: st.DataObject, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    torch.save({"x": torch.arange(6.0).view(2, 3)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else content)
    with contextlib.suppress(AdapterMismatch):
        assert all(tensor.float32().size > 0 for _, tensor in read_adapter_bin(file))
