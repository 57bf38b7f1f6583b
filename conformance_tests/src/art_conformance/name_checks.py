"""What a backend makes of long, odd and hostile names: exactly that name, or a refusal before anything is written.

Part of `BackendConformance`. Which names are allowed is the backend's to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from art_core import ArtError, BackendCapability

from .agents import SMALL_RATE, Agent, version_of
from .backend_fixtures import BackendSuite, NewAgent
from .requirements import MUST, check

LONGEST = 128
# No folder, no file of its own, and no part of an address.
HOSTILE = (
    *("", ".", "..", "../../evil", "/evil", "..\\evil", "C:evil", "~evil", ".evil", "-evil", "evil/", "evil/../../x"),
    *("evil\0", "evil\n", "evil\r\nX: y", "evil name", " evil", "evil?key=", "evil#", "%2e%2e%2fevil", "evil;rm"),
    *("агент", "\uff45vil", "e\u0301vil", "evil\u202e", "evil\u200b", "\U0001f608", "\ud800"),
    *("e" * (LONGEST + 1), "e" * 5000),
)
# Folders on one system or another that are none, and words that mean something in a file of JSON or YAML.
ODD = ("a..b", "NUL", "null")


class NameChecks(BackendSuite):
    """The check of names."""

    @check(
        "BCK-041",
        MUST,
        "A model or project of a long, odd or hostile name is served and trained under exactly that name, or refused in"
        " words before anything is written.",
        live=True,
    )
    async def test_odd_names(self, agent: Agent, new_agent: NewAgent) -> None:
        await self._refused_or_served(agent)
        alike = [agent.model.name.ljust(LONGEST, "-")[:-1] + end for end in "xy"]
        long = [await new_agent(backend=agent.backend, name=name, project=alike[0]) for name in alike]
        others = [await new_agent(backend=agent.backend, name=name) for name in ODD]
        assert (await long[1].train(learning_rate=SMALL_RATE)).step == 1
        for served, step in ((long[0], 0), (long[1], 1), *((other, 0) for other in others)):
            await _serves(served, step)
        assert (await others[0].train(learning_rate=SMALL_RATE)).step == 1
        await _serves(others[0], 1)

    async def _refused_or_served(self, agent: Agent) -> None:
        backend, model = agent.backend, agent.model
        roots = [root for root in (agent.registration.base_path, Path(model.base_path)) if root is not None]
        before = set(_folders(roots))
        every: list[dict[str, Any]] = [{field: name} for field in ("name", "project") for name in HOSTILE]
        for fields in every:
            hostile = replace(model, **fields)
            said = None
            try:
                registration = await backend.register(hostile)
            except (ArtError, ValueError) as refusal:
                said = str(refusal)
            if said is None:
                await _serves(replace(agent, model=hostile, registration=registration), 0)
                before = set(_folders(roots))
            else:
                assert len(said) > 20, f"the refusal of {fields} gives no reason: {said!r}"
                left = set(_folders(roots)) - before
                assert not left, f"{fields} was refused, and left {sorted(left)}"
        if BackendCapability.FORK in backend.capabilities:
            for name in HOSTILE:
                with pytest.raises((ArtError, ValueError)):
                    await backend.fork_checkpoint(model, name)
        await _serves(agent, 0)


async def _serves(agent: Agent, step: int) -> None:
    assert await agent.backend.get_step(agent.model) == step
    for name in (None, agent.named(step)):
        found = await agent.ask(name, max_tokens=2)
        assert {version_of(sample) for sample in found} == {step}, f"{agent.model.name!r} answers from another step"


def _folders(roots: list[Path]) -> Iterator[Path]:
    for root in roots:
        # What lies beside it is looked at too, where a name that climbs out of it would end.
        yield from (path for path in (*root.rglob("*"), *root.parent.glob("*evil*")) if path.is_dir())
