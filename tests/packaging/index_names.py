"""`make names`: whether each name that we give a distribution, or tell a user to install, is ours on the package index.

Asks with uv, where pip is configured to look. What it finds is unpacked and read, never built or run. Ours is what
describes itself as our pyproject.toml does. Exits with 1 when a name is somebody else's, with 2 when the index can't be
asked.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

from art_runtime.environments.indexes import uv_settings

ROOT = Path(__file__).parents[2]
LIMIT_S = 180.0
NOT_THERE = re.compile(r"was not found in the (package registry|provided package locations)")


class IndexUnreachable(Exception):
    """The index gave no answer; the message is uv's."""


def our_names() -> dict[str, str | None]:
    """Each name with the description that its pyproject.toml gives; None for one that the README only promises."""
    promised = re.findall(r"`(art-[a-z0-9-]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    names: dict[str, str | None] = dict.fromkeys(promised)
    for file in (ROOT / "pyproject.toml", *ROOT.glob("*/*/pyproject.toml"), *ROOT.glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        names[project["name"]] = project["description"]
    return dict(sorted(names.items()))


def ask(name: str, folder: Path, arguments: Sequence[str], variables: Mapping[str, str]) -> Distribution | str | None:
    """What the index has under a name: the latest of it that can be read, or why none can; None when the name is free.

    `arguments` and `variables` tell uv where to look. Raises IndexUnreachable.
    """
    uv = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--quiet",
        "--python",
        sys.executable,
        "--no-config",
        "--no-cache",
    ]
    asked = subprocess.run(
        [*uv, "--no-deps", "--no-build", "--prerelease", "allow", "--target", str(folder), *arguments, name],
        env={**os.environ, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if asked.returncode == 0:
        (found,) = distributions(path=[str(folder)])
        return found
    said = " ".join(asked.stderr.split())
    if asked.returncode != 1:
        raise IndexUnreachable(said)
    return None if NOT_THERE.search(said) else said


def verdict(found: Distribution | str | None, description: str | None) -> str:
    """ "free", "ours" with the version, or whose it is."""
    if found is None:
        return "free"
    if isinstance(found, str):
        return f"TAKEN by something that can't be read: {found}"
    summary = " ".join(found.metadata.get_all("Summary") or ())
    if description is not None and summary == description:
        return f"ours, {found.version}"
    home = ", ".join(found.metadata.get_all("Home-page") or found.metadata.get_all("Project-URL") or ())
    return f"TAKEN by version {found.version} of another: {summary or 'no summary'}{f' ({home})' if home else ''}"


def verdicts() -> Iterator[tuple[str, str]]:
    """Each name with its verdict. Raises IndexUnreachable at the first that can't be asked."""
    where = uv_settings()
    for name, description in our_names().items():
        with tempfile.TemporaryDirectory() as folder:
            yield name, verdict(ask(name, Path(folder), *where), description)


def main() -> int:
    """Print a line for each name."""
    taken = []
    try:
        for name, what in verdicts():
            print(f"{name:24} {what}", flush=True)
            taken += [name] if what.startswith("TAKEN") else []
    except IndexUnreachable as error:
        print(
            f"The package index can't be asked: {error}\nNothing is known of the names that aren't listed.",
            file=sys.stderr,
        )
        return 2
    if taken:
        print(
            f"Not ours: {', '.join(taken)}. Choose another name, before anybody installs a stranger's code.",
            file=sys.stderr,
        )
    return 1 if taken else 0


if __name__ == "__main__":
    raise SystemExit(main())
