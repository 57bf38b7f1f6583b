"""Acme's backend under ART's suites."""

from typing import ClassVar

import httpx
import pytest
from art_backend_acme.backend import AcmeBackend

from art_conformance import BackendConformance, PluginConformance, PublicationConformance

BACKENDS = []


def open_acme(path):
    BACKENDS.append(AcmeBackend(path))
    return BACKENDS[-1]


class Acme:
    @pytest.fixture(scope="class")
    @classmethod
    def open_backend(cls):
        return open_acme

    @pytest.fixture(scope="class")
    @classmethod
    def transport(cls):
        async def handle(request):
            for backend in BACKENDS:
                if request.headers.get("Authorization") == f"Bearer {backend.key}":
                    return await backend.handle(request)
            return httpx.Response(401, json={"error": {"message": "the API key is missing or wrong"}})

        return httpx.MockTransport(handle)


class TestAcmePlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "acme-backend"


class TestAcmeBackend(Acme, BackendConformance):
    pass


class TestAcmePublication(Acme, PublicationConformance):
    known_failures: ClassVar = {"PUB-020": "it has no inference server that could be killed"}
