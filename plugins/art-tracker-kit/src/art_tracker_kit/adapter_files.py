"""The files of a checkpoint that are the adapter. Knows the shape of a PEFT folder; opens nothing."""

from __future__ import annotations

from pathlib import Path

NOT_THE_ADAPTER = frozenset({"optimizer.state"})


def adapter_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that whoever serves it needs, by name: all but the optimizer's state, which is
    twice as large and of use only where the run goes on.

    Raises FileNotFoundError when there is no adapter, such as when the checkpoint was deleted meanwhile.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in NOT_THE_ADAPTER)
    if not any(file.name == "adapter_config.json" for file in files):
        raise FileNotFoundError(
            f"{folder} holds no adapter (adapter_config.json). A checkpoint may be deleted before a tracker that is"
            " behind gets to it."
        )
    return files
