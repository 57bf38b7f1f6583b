"""What all suites share: known failures, and how a check of an undeclared capability is left out.

Left out is not met: the report counts it apart, and every suite has a check that undeclared means refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import pytest

from art_core import Capability

from .pytest_plugin import UNDECLARED
from .requirements import requirement_of


class Suite:
    """The base of every suite. A subclass lists what it is known to fail, with the reason, in `known_failures`; a
    known failure that passes fails the run.
    """

    known_failures: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def declared(cls) -> Collection[Capability]:
        """The capabilities that the subject declares."""
        return frozenset()

    @pytest.fixture(autouse=True)
    def _leave_out_undeclared(self, request: pytest.FixtureRequest) -> None:
        requirement: Any = requirement_of(request.function)
        if requirement is None or requirement.needs is None:
            return
        if requirement.needs not in request.getfixturevalue("declared"):
            request.node.stash[UNDECLARED] = True
            pytest.skip(f"the capability {requirement.needs.value!r} is not declared")
