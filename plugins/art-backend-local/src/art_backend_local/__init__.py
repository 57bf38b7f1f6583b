"""ART's local backend: serves and trains models on this machine.

`LocalBackend` is what users construct; everything else runs behind it, most of it in a host process of its own.
"""

from .backend import LocalBackend
from .host_start import PathInUse

__all__ = ["LocalBackend", "PathInUse"]
