"""The conformance suite of backends on ServerlessBackend, against a real `art serve` on engine torch.

A service serves a step when its job ends, so what a hook of the client does before publication comes too late: of the
publication suite those checks are left to the backend behind the service, on which they are run elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from art_backend_serverless import ServerlessBackend
from art_conformance import BackendConformance
from art_core import Backend

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class TestServerlessBackend(BackendConformance):
    """Every check, each on models of its own at one server."""

    @pytest.fixture(scope="class")
    @classmethod
    def open_backend(cls, own_server: tuple[str, str]) -> Callable[[Path], Backend]:
        """A client of the one server: what was trained there is there again, whichever folder is asked for."""
        url, key = own_server
        return lambda folder: ServerlessBackend(key, url, show_progress=False)
