"""The conformance suites of backends on ServerlessBackend, against a real `art serve` on engine torch.

A service serves a step when its job ends, so that its client's hooks hear of a checkpoint too late to refuse it: what
the publication suite requires of these isn't declared. The backend behind the service declares and meets it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from art_backend_serverless import ServerlessBackend
from art_conformance import BackendConformance, PublicationConformance
from art_conformance.targets import command_of
from art_core import Backend, installed_plugins
from art_runtime.environments import engine_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class AtOneServer:
    @pytest.fixture(scope="class")
    @classmethod
    def open_backend(cls, own_server: tuple[str, str]) -> Callable[[Path], Backend]:
        """A client of the one server: what was trained there is there again, whichever folder is asked for."""
        url, key = own_server
        return lambda folder: ServerlessBackend(key, url, show_progress=False)


class TestServerlessBackend(AtOneServer, BackendConformance):
    """Every check, each on models of its own at one server."""


class TestServerlessPublication(AtOneServer, PublicationConformance):
    """What can be seen of it from a client."""

    @pytest.fixture(scope="class")
    @classmethod
    def inference_command(cls, conformance_model: Path) -> tuple[str, ...]:
        return command_of(engine_for(installed_plugins().inference_engine("torch")), conformance_model)
