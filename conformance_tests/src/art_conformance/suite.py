"""What all suites share: known failures, and how a check of an undeclared capability is left out.

Left out is not met: the report counts it apart, and every suite has a check that undeclared means refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

from art_core import Capability
from art_core.errors import UnsupportedCapability

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


@contextmanager
def undeclared(plugin: str, capability: Capability, call: str) -> Iterator[None]:
    """Within the block `call` is made of a plugin that doesn't declare the capability, and must be refused in words."""
    kind = f"{type(capability).__name__}.{capability.name}"
    todo = (
        f"Declare {kind} if it can do that; if not, raise UnsupportedCapability({plugin!r}, {capability.value!r},"
        " 'what to use instead')"
    )
    refusal: UnsupportedCapability | None = None
    try:
        yield
    except UnsupportedCapability as error:
        refusal = error
    assert refusal is not None, f"{call} of {plugin} was done, and it doesn't declare {kind}. {todo}"
    said = (refusal.plugin, refusal.capability, bool(refusal.instead.strip()))
    assert said == (plugin, capability.value, True), f"{call} of {plugin} is refused as {refusal}. {todo}"
