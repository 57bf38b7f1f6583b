"""Every error that the kernel raises on purpose.

Each says what happened, why, and what to do next. This module knows no other module of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_READABLE = 60


class ArtError(Exception):
    """The base of every error raised by art-core, its engines and its backends."""


class InvalidName(ArtError, ValueError):
    """A project or model name that cannot be a folder, an adapter name and a part of an address at once."""


class InvalidTrajectory(ArtError, ValueError):
    """A trajectory or a group that cannot be trained on; the message names it by its position."""


class UnknownArgument(ArtError, TypeError):
    """An argument or a setting that nothing reads. It is never silently ignored."""

    def __init__(self, name: str, *, where: str, known: Iterable[str]) -> None:
        self.name, self.known = name, tuple(sorted(known))
        # A server's hundreds of options would bury the nearest one.
        listed = ", ".join(self.known) or "none"
        takes = listed if len(self.known) <= _READABLE else f"{len(self.known)} others, as its documentation lists"
        super().__init__(f"{where} has no argument {name!r}.{did_you_mean(name, self.known)} It takes: {takes}.")


class UnsupportedCapability(ArtError, NotImplementedError):
    """Something was asked of a plugin that it does not declare.

    `plugin` is the plugin's name, `capability` the member's value, `instead` what to install or use in its place.
    """

    def __init__(self, plugin: str, capability: str, instead: str) -> None:
        self.plugin, self.capability, self.instead = plugin, capability, instead
        super().__init__(f"{plugin} does not declare the capability {capability!r}. {instead}")


class PluginError(ArtError):
    """A plugin that was asked for by name is missing, broken, incompatible, disabled or a duplicate."""


class PluginNotInstalled(PluginError, ImportError):
    """The plugin that was asked for is not there; the message holds the pip line that installs it."""


class MisspeltHook(PluginError):
    """A plugin implements a hook that does not exist."""


class BaseModelNotFound(ArtError, FileNotFoundError):
    """No plugin, folder or hub entry answers to this base model name."""


class AdapterMismatch(ArtError, ValueError):
    """An adapter that does not fit its base model: a wrong rank, width or module, or values that are not finite."""


class CheckpointError(ArtError):
    """The base of errors about checkpoints on disk."""


class CheckpointNotFound(CheckpointError, LookupError):
    """The step that was asked for is not there; the message lists those that are."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint folder whose content is not what its manifest says. It is skipped and never deleted."""


class CheckpointInUse(CheckpointError):
    """A checkpoint that is served or leased cannot be deleted."""


class PublicationFailed(ArtError):
    """A checkpoint was not published. The step that was served before is still served.

    `stage` is the name of the stage that failed: check, load, verify or route. `put_aside` is where a checkpoint that
    is itself at fault is kept now, out of the way; None for one that may be published later.
    """

    put_aside: Path | None = None

    def __init__(self, message: str, *, stage: str, put_aside: Path | None = None) -> None:
        self.stage, self.put_aside = stage, put_aside
        super().__init__(message)


class InvalidRequest(ArtError, ValueError):
    """A request to a model that cannot be answered as it is. `param` is the field at fault, such as
    "messages.2.content".
    """

    def __init__(self, message: str, *, param: str) -> None:
        self.param = param
        super().__init__(message)


class EngineRefused(ArtError):
    """An engine answered a control call with a refusal; `reason` is what it said."""

    def __init__(self, engine: str, action: str, reason: str) -> None:
        self.engine, self.action, self.reason = engine, action, reason
        super().__init__(f"{engine} refused to {action}: {reason}")


class ServerUnusable(ArtError, ConnectionError):
    """An inference server that the user runs is not there, refuses the key, or cannot load adapters. The message says
    what it must be started with.
    """


class ProcessFailed(ArtError):
    """A process that this machine runs for us did not start, died or stopped answering; the message ends with its
    log.
    """


class BackendUnreachable(ArtError, ConnectionError):
    """The backend's host process does not answer; the message says how to see why and how to start it again."""


class TrainingFailed(ArtError):
    """A training job failed in the worker; the step before it is still the latest one and is still served."""


class ModelBusy(ArtError):
    """Another client is training this very model. Two writers of one adapter would overwrite each other."""


class NotRegistered(ArtError, RuntimeError):
    """A model was used before `await model.register(backend)`."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest known word, or an empty string when none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
