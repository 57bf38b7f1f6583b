"""Where the training service is and which key opens it. Reads the environment when it is asked, never before.

Knows addresses and keys; opens no connection.
"""

from __future__ import annotations

import ipaddress
import os
import re
import warnings
from urllib.parse import urlsplit

from .errors import KeyMissing

CLOUD = "https://api.training.wandb.ai/v1"
KEY_VARIABLE = "WANDB_API_KEY"
_KEY = re.compile(r"[\x21-\x7e]+")


def check_base_url(base_url: str) -> str:
    """The address without a slash at its end. Raises ValueError for what is no address of HTTP, or holds a password."""
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except (ValueError, AttributeError, TypeError):
        valid = False
    if not valid or re.search(r"\s", base_url):
        raise ValueError(
            f"base_url={base_url!r} is no address of a training service; it looks like {CLOUD!r} or"
            " 'http://127.0.0.1:8484/v1'."
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("base_url must hold neither a user, nor a password, nor a query; the key is api_key.")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        warnings.warn(
            f"base_url={base_url!r} isn't https: the API key and all trajectories travel in the clear.",
            RuntimeWarning,
            stacklevel=3,
        )
    return base_url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, for which no proxy is ever asked."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


class ApiKey:
    """The key that was given, or the environment's. Raises KeyMissing when it is asked for and there is none."""

    def __init__(self, given: str | None) -> None:
        if given is not None:
            _check(given, "api_key")
        self._given = given

    def __repr__(self) -> str:
        return "ApiKey()"

    def value(self) -> str:
        """The key itself: for a header, and for what hides it from messages."""
        if self._given is not None:
            return self._given
        found = os.environ.get(KEY_VARIABLE, "").strip()
        if not found:
            raise KeyMissing(
                f"There is no API key. Set {KEY_VARIABLE} in the environment, or give ServerlessBackend(api_key=...)."
                " The cloud's keys are at https://wandb.ai/authorize; a server of your own makes them with"
                " `art serve keys create`."
            )
        return _check(found, KEY_VARIABLE)


def _check(key: str, where: str) -> str:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        # What it is isn't said: a key with a line break at its end is still a key.
        raise KeyMissing(f"{where} is no API key: one has letters, digits and signs only, no spaces or line breaks.")
    return key
