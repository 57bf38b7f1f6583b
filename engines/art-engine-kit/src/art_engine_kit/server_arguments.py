"""The command line of an engine's server: which options it has, and how values are written for it.

For engines that pass a user's arguments through to a server of someone else's. Knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from art_core.errors import UnknownArgument


@dataclass(frozen=True, kw_only=True)
class ServerArguments:
    """The options of a server, by their names with underscores and without leading dashes.

    `values` take one word, `lists` several, `flags` none, and `switches` none with a `--no-` form beside.
    """

    values: frozenset[str]
    lists: frozenset[str] = frozenset()
    flags: frozenset[str] = frozenset()
    switches: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return self.values | self.lists | self.flags | self.switches

    def command_line(self, options: Mapping[str, Any], *, where: str) -> list[str]:
        """The words that give the server these options; None leaves one at the server's default.

        A dictionary is written as JSON. A name with its leading dashes passes unchecked, for a server that is newer
        than this list. Raises UnknownArgument naming the nearest option, ValueError for a value that doesn't fit.
        """
        words: list[str] = []
        for name, value in options.items():
            if value is not None:
                words += _unchecked(name, value) if name.startswith("--") else self._checked(name, value, where)
        return words

    def _checked(self, name: str, value: Any, where: str) -> list[str]:
        option = name.replace("-", "_")
        if option not in self.names:
            raise UnknownArgument(name, where=where, known=self.names)
        dashed = f"--{option.replace('_', '-')}"
        if option in self.switches or option in self.flags:
            if not isinstance(value, bool):
                raise ValueError(f"{where}: {name} is on or off, so it takes True or False, not {value!r}.")
            if value:
                return [dashed]
            return [f"--no-{dashed[2:]}"] if option in self.switches else []
        if isinstance(value, bool) or (isinstance(value, list | tuple) and option not in self.lists):
            raise ValueError(f"{where}: {name} takes one value, not {value!r}.")
        if option in self.lists and isinstance(value, list | tuple):
            return [dashed, *map(_word, value)]
        return [dashed, _word(value)]


def users_arguments(
    given: Mapping[str, Any], *, decided: Mapping[str, str], where: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """What a user gave as an engine's arguments: the options by their names with underscores, and the variables of
    `env` for the server's process.

    `decided` are the options that follow from the launch, each with a sentence on where from. Raises ValueError for one
    of them, and for an `env` that is no dictionary.
    """
    options = {name if name.startswith("--") else name.replace("-", "_"): value for name, value in given.items()}
    env = options.pop("env", None) or {}
    if not isinstance(env, Mapping):
        raise ValueError(f"{where}: env takes a dictionary of variables, not {env!r}.")
    for name in options:
        reason = decided.get(name.lstrip("-").replace("-", "_"))
        if reason is not None:
            raise ValueError(f"{where}: {name} can't be set. {reason}")
    return options, {str(name): str(value) for name, value in env.items()}


def _unchecked(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name] if value else []
    return [name, *map(_word, value)] if isinstance(value, list | tuple) else [name, _word(value)]


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
