"""art-backend-example under ART's suites. `pytest --conformance-list` says what each check requires."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from art_backend_example.backend import ExampleBackend

from art_conformance import BackendConformance, PluginConformance, PublicationConformance

BACKENDS: list[ExampleBackend] = []


def open_here(path: Path) -> ExampleBackend:
    BACKENDS.append(ExampleBackend(path))
    return BACKENDS[-1]


class Opened:
    @pytest.fixture(scope="class")
    @classmethod
    def open_backend(cls) -> Callable[[Path], ExampleBackend]:
        return open_here

    # A backend with a server of its own needs no transport: leave this fixture out.
    @pytest.fixture(scope="class")
    @classmethod
    def transport(cls) -> httpx.MockTransport:
        async def handle(request: httpx.Request) -> httpx.Response:
            for backend in BACKENDS:
                if request.headers.get("Authorization") == f"Bearer {backend.key}":
                    return await backend.handle(request)
            return httpx.Response(401, json={"error": {"message": "the API key is missing or wrong"}})

        return httpx.MockTransport(handle)


class TestExamplePlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        return "example"


class TestExampleBackend(Opened, BackendConformance):
    pass


class TestExamplePublication(Opened, PublicationConformance):
    known_failures: ClassVar = {"PUB-020": "it has no inference server that could be killed"}
