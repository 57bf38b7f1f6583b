"""The reference backend under the same suites as every other. What breaks it is in `test_publication_mutants` and
`test_backend_mutants`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from art_conformance import BackendConformance, PublicationConformance
from art_conformance.backend_machine import MachineChecks
from art_conformance.reference_backend import ReferenceBackend, transport_to


class _Reference:
    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls) -> list[ReferenceBackend]:
        return []

    @pytest.fixture(scope="class")
    @classmethod
    def open_backend(cls, opened: list[ReferenceBackend]) -> Any:
        def open_backend(folder: Path) -> ReferenceBackend:
            opened.append(ReferenceBackend(folder))
            return opened[-1]

        return open_backend

    @pytest.fixture(scope="class")
    @classmethod
    def transport(cls, opened: list[ReferenceBackend]) -> httpx.AsyncBaseTransport:
        return transport_to(opened)


class TestReferencePublication(_Reference, PublicationConformance):
    known_failures = {"PUB-020": "it has no inference server that could be killed"}  # noqa: RUF012


class TestReferenceBackend(_Reference, BackendConformance):
    pass


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
class TestReferenceInManyOrders(_Reference, MachineChecks):
    orders = 12
    order_length = 30
