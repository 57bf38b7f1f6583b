"""The one way in which ART says that something is deprecated: as a warning that names the version in which it goes and
what to write in its place. Knows nothing of what is deprecated; docs/compatibility.md lists that.
"""

from __future__ import annotations

import warnings


def deprecated(what: str, *, instead: str, removed_in: str) -> None:
    """Warn whoever called the caller. `removed_in` is the version of art-core that has `what` no more.

    The arguments are written out where it is called: a test reads them there, and fails once that version has come.
    """
    message = f"{what} is deprecated and goes in art-core {removed_in}. {instead}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
