"""A model's run in Weights & Biases, by the wandb library, which is imported when a run is opened.

All of it is called in threads of reporters, and may take as long as it takes. Knows no hook.
"""

from __future__ import annotations

import logging
import netrc
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from art_core import CheckpointRef
from art_tracker_kit import COLUMNS, LoggedModel, Table, adapter_files

if TYPE_CHECKING:
    import wandb

STEP = "training_step"
ARTIFACT_TYPE = "lora"
#: wandb's own is 90 s. A run that can't be opened by then is kept in files, so that nothing waits and nothing is lost.
INIT_LIMIT_S = 30.0
#: wandb's own is none. What isn't sent by then, when a run is closed, stays in its files.
FINISH_LIMIT_S = 30.0

_log = logging.getLogger(__name__)


class WandbRun:
    """One run, called as the model is."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        self.users = 0
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        """One row at a step."""
        self._run.log({STEP: step, **metrics})

    def trajectories(self, table: Table, step: int, split: str) -> None:
        """The table of a step, and of how many trajectories it was made."""
        import wandb

        shown = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in table.rows], allow_mixed_types=True)
        name = f"trajectories/{split}"
        self._run.log({STEP: step, name: shown, f"{name}_total": table.total})

    def adapter(self, checkpoint: CheckpointRef, base_model: str) -> None:
        """The adapter as a version of the artifact that is called as the model is."""
        import wandb

        artifact = wandb.Artifact(
            checkpoint.model.name,
            type=ARTIFACT_TYPE,
            metadata={"wandb.base_model": base_model, "step": checkpoint.step},
        )
        for file in adapter_files(checkpoint.path):
            # Copied now: the folder may be deleted before it is uploaded.
            name = file.relative_to(checkpoint.path).as_posix()
            artifact.add_file(str(file), name=name, policy="mutable")
        self._run.log_artifact(artifact, aliases=[f"step{checkpoint.step}", "latest"])

    def close(self) -> None:
        """Send what is left, once whoever opened it has closed it."""
        with _opening:
            self.users -= 1
            if not self.users:
                # Who comes later goes on with the run, and must not be given one that has ended.
                for key in [key for key, run in _opened.items() if run is self]:
                    del _opened[key]
                self._run.finish()


_opening = threading.Lock()
_opened: dict[tuple[str | None, str, str], WandbRun] = {}


def open_run(model: LoggedModel) -> WandbRun:
    """Begin or go on with the model's run, the same for whoever opens it; in a folder of files when the service can't
    be had.

    Raises what wandb raises when it can't even do that.
    """
    key = (model.entity, model.project, model.name)
    with _opening:
        if key not in _opened:
            _opened[key] = _begun(model)
        _opened[key].users += 1
        return _opened[key]


def _begun(model: LoggedModel) -> WandbRun:
    import wandb

    folder = str(Path(os.environ.get("WANDB_DIR") or model.base_path).absolute())
    wanted = os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb.Settings().base_url) else "offline")
    if wanted in ("offline", "dryrun"):
        if not os.environ.get("WANDB_MODE"):
            _log.warning(
                "There is no key of Weights & Biases (WANDB_API_KEY, or `wandb login`), so the run of %s is kept in"
                " files under %s/wandb. To send it: wandb sync FOLDER",
                model.name,
                folder,
            )
        return WandbRun(_init(model, folder, "offline", _run_id(model)))
    try:
        return WandbRun(_init(model, folder, "online", _run_id(model)))
    except Exception as error:
        _log.warning(
            "Weights & Biases can't be had (%s: %s), so the run of %s is kept in files under %s/wandb."
            " To send it later: wandb sync --id %s FOLDER",
            type(error).__name__,
            error,
            model.name,
            folder,
            model.name,
        )
        # wandb holds the id of a run that it failed to open until the process ends.
        return WandbRun(_init(model, folder, "offline", f"{model.name}-{time.strftime('%Y%m%d-%H%M%S')}"))


def _run_id(model: LoggedModel) -> str:
    """The model's name, by which the next process goes on with the run. wandb refuses a second run of one id in a
    process, whatever its project: with two models of one name the second's id has its project in it.
    """
    taken = any(name == model.name for _, _, name in _opened)
    return "-".join(filter(None, (model.name, model.project, model.entity))) if taken else model.name


def _init(model: LoggedModel, folder: str, mode: Any, run_id: str) -> wandb.Run:
    import wandb

    Path(folder).mkdir(parents=True, exist_ok=True)
    return wandb.init(
        entity=model.entity,
        project=model.project,
        id=run_id,
        name=model.name,
        resume="allow",
        dir=folder,
        mode=mode,
        reinit="create_new",  # a run of the user's own, and those of other models, go on beside it
        settings=wandb.Settings(
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_LIMIT_S),
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_LIMIT_S),
            console="off",  # what is printed isn't ours to send
            quiet=True,
            disable_git=True,
            save_code=False,
        ),
    )


def _has_key(base_url: str) -> bool:
    """Whether wandb would find a key without asking for one at the terminal, where nobody expects it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(file).authenticators(urlsplit(base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
