"""Which inference servers a backend wants: how many of its own, or which of the user's. Checked before anything
starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True)
class ServerChoice:
    """`replicas` servers of our own, or with `urls` the user's, which take `api_key`."""

    replicas: int = 1
    urls: tuple[str, ...] = ()
    api_key: str = field(default="", repr=False)


def choose_servers(
    *,
    inference_engine: str | None,
    inference_python: str | None,
    inference_replicas: int,
    inference_url: str | Sequence[str] | None,
    inference_api_key: str | None,
) -> ServerChoice:
    """Read what was given to LocalBackend. Raises ValueError for what doesn't go together."""
    if type(inference_replicas) is not int or inference_replicas < 1:
        raise ValueError(f"inference_replicas must be a whole number of at least 1, not {inference_replicas!r}.")
    if inference_url is None:
        if inference_api_key is not None:
            raise ValueError(
                "inference_api_key is the key of a server of yours: give its inference_url too, or leave it out."
            )
        return ServerChoice(replicas=inference_replicas)
    urls = (inference_url,) if isinstance(inference_url, str) else tuple(inference_url)
    if inference_engine is None:
        raise ValueError(
            'inference_url needs inference_engine="vllm", "sglang" or the like: how to speak to the server.'
        )
    if inference_python is not None:
        raise ValueError("inference_python starts a server, inference_url uses a running one: give one of them.")
    if inference_replicas != 1:
        raise ValueError("inference_replicas starts servers; to use several running ones give a list as inference_url.")
    if not urls:
        raise ValueError("inference_url is an empty list: give at least one address, or leave it out.")
    addresses = tuple(_address(url) for url in urls)
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"inference_url names a server twice: {', '.join(addresses)}.")
    return ServerChoice(urls=addresses, api_key=inference_api_key or "")


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ValueError(
            f'inference_url must be an address such as "http://127.0.0.1:8000", not {_without_key(url)!r}.'
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _without_key(url: str) -> str:
    return url.rpartition("@")[2]
