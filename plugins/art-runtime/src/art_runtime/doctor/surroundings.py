"""What surrounds a script: folders, locale, proxies and certificates by variables, files that hide modules.

ART's own processes are kept from most of it (`art_engine_kit.process_environment`); the script that uses ART isn't.
"""

from __future__ import annotations

import importlib.util
import locale as standard_locale
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from art_engine_kit.process_environment import LOOPBACK
from art_engine_kit.user_folders import can_be_written, home_for_processes

from .finding import Finding, State

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_NAMED = 8


def folders() -> Iterator[Finding]:
    """Home, temporary files and the working folder: whether something can be written there."""
    home = home_for_processes()
    if home is None:
        yield Finding(about="folders", state=State.OK, says=f"home is {os.path.expanduser('~')}")
    else:
        says = f"the home folder, {os.path.expanduser('~')}, can't be written; {home} stands in for it"
        yield Finding(about="folders", state=State.NOTE, says=says, mend="export HOME=a folder that can be written")
    used = tempfile.gettempdir()
    wanted = os.environ.get("TMPDIR")
    if wanted and os.path.abspath(wanted) != os.path.abspath(used):
        says = f"TMPDIR={wanted} can't be used; {used} is"
        yield Finding(about="folders", state=State.NOTE, says=says, mend="unset TMPDIR, or make that folder")
    if not can_be_written(Path.cwd()):
        says = f"this folder, {Path.cwd()}, can't be written, and runs go there unless a path is given"
        mend = "LocalBackend(path=...) with a folder that can be written"
        yield Finding(about="folders", state=State.NOTE, says=says, mend=mend)


def locale() -> Iterator[Finding]:
    """Whether text is UTF-8."""
    encoding = "utf-8" if sys.flags.utf8_mode else standard_locale.getpreferredencoding(False)
    names = sys.getfilesystemencoding()
    if encoding.lower().replace("-", "") == names.lower().replace("-", "") == "utf8":
        yield Finding(about="locale", state=State.OK, says="text and file names are UTF-8")
        return
    says = f"text is {encoding} and file names are {names}: a script that prints or opens other letters fails"
    yield Finding(about="locale", state=State.NOTE, says=says, mend="export PYTHONUTF8=1")


def proxies() -> Iterator[Finding]:
    """Proxies, and whether programs that aren't ART's ask them for this machine."""
    given = [name for low in _PROXIES for name in (low, low.upper()) if os.environ.get(name)]
    if not given:
        yield Finding(about="proxies", state=State.OK, says="none")
        return
    excepted = ",".join(os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY"))
    missing = [name for name in LOOPBACK if name not in {part.strip() for part in excepted.split(",")}]
    if not missing or "*" in excepted:
        yield Finding(about="proxies", state=State.OK, says=f"{', '.join(given)}; not for this machine")
        return
    says = (
        f"{', '.join(given)} set, and not excepted: {', '.join(missing)}. ART asks no proxy for this machine; others do"
    )
    mend = f"export NO_PROXY={','.join(filter(None, [os.environ.get('NO_PROXY', ''), *missing]))}"
    yield Finding(about="proxies", state=State.NOTE, says=says, mend=mend)


def certificates() -> Iterator[Finding]:
    """Variables that name certificates which aren't there: every download fails then."""
    gone = [name for name in _CERTIFICATES if os.environ.get(name) and not os.path.exists(os.environ[name])]
    for name in gone:
        says = f"{name}={os.environ[name]}, which is not there: nothing can be fetched over https"
        yield Finding(about="certificates", state=State.WRONG, says=says, mend=f"unset {name}")
    if not gone:
        yield Finding(about="certificates", state=State.OK, says="no variable names one that is missing")


def shadowing() -> Iterator[Finding]:
    """Modules in the working folder that a script there imports in place of Python's or of an installed one."""
    here = Path.cwd()
    found = sorted({path for path in _modules_in(here) if _hides(path, here)})
    if not found:
        yield Finding(about="shadowing files", state=State.OK, says=f"none in {here}")
        return
    names = ", ".join(path.name for path in found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
    says = f"{names} in {here}: a script there imports that in place of the module of this name"
    yield Finding(about="shadowing files", state=State.WRONG, says=says, mend=f"mv {found[0].name} my_{found[0].name}")


def _modules_in(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            yield path


def _hides(path: Path, here: Path) -> bool:
    name = path.stem
    if name in sys.builtin_module_names or not name.isidentifier():
        return False
    if name in sys.stdlib_module_names:
        return not Path(os.__file__).parent.samefile(here)
    if name not in _installed_names():
        return False
    # Where it lies by itself, the working folder left out: an editable install's own checkout hides nothing.
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if entry and Path(entry) != here]
    try:
        spec = importlib.util.find_spec(name)
    finally:
        sys.path[:] = before
    origin = None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    return origin is not None and not Path(origin).is_relative_to(here)


def _installed_names() -> set[str]:
    return set(metadata.packages_distributions())
