"""Base models by their name on the model hub, such as `Qwen/Qwen3-0.6B`: fetched once, then read from the hub's cache.

The last to be asked: a plugin that knows the name, or a folder, comes first. Knows nothing of what the weights are for.
"""

from __future__ import annotations

import re
from pathlib import Path

from art_core.errors import BaseModelNotFound

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_hub_name(name: str) -> Path | None:
    """The folder of a hub model or adapter; None when `name` can't be one.

    The hub's client shows its own progress bar, and reads its own variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE). Raises
    BaseModelNotFound when the hub has no such model or cannot be reached and the model isn't in the cache.
    """
    if not _HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise BaseModelNotFound(
            f"base_model={name!r} looks like a name on the model hub, and could not be fetched from there: {reason}"
            " Give a folder of weights instead, or 'smollm2-135m-instruct', which needs no hub."
        ) from error
