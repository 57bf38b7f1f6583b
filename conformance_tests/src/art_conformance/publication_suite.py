"""`PublicationConformance`: nothing is ever served under a name that it isn't, seen from outside a backend.

Steps are trained on a tiny model; the oracle says which weights answered. Spoiled checkpoints come in through
`art_before_publish_checkpoint`, the last moment before an engine sees them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from art_core import ArtError, BackendCapability, CheckpointRef, ModelKey

from .agents import RATE, SMALL_RATE, Agent, version_of
from .backend_fixtures import BackendSuite, NewAgent, OpenBackend
from .oracle import Oracle
from .recorder import STEP, TRAINING
from .requirements import MUST, check
from .serving import REQUEST_LIMIT_S, Sample, gather_limited
from .spoiled import SPOILED, other_weights

Cap = BackendCapability
RECOVERY_LIMIT_S = 120.0
# A check of what happens while a step is published goes on to the next step where nothing happened.
PUBLISH_TRIES = 4


class PublicationConformance(BackendSuite):
    """Give the fixture `open_backend` (scope="class"); for the check that kills the inference server also
    `inference_command`, the words that follow the interpreter on its command line.
    """

    @pytest.fixture(scope="class")
    @classmethod
    def inference_command(cls) -> tuple[str, ...]:
        return ()

    @check("PUB-001", MUST, "Once registered, the plain name answers from step 0, as the base model.", live=True)
    async def test_step_zero(self, agent: Agent, oracle: Oracle) -> None:
        found = await agent.ask(n=2)
        assert {version_of(sample) for sample in found} == {0}
        self.assert_answers_as(oracle, found, None)

    @check("PUB-002", MUST, "When a step has been trained, the plain name answers from it, as its weights.", live=True)
    async def test_latest(self, agent: Agent, oracle: Oracle) -> None:
        folders: list[Path | None] = [None]
        for step in (1, 2):
            result = await agent.train()
            assert result.step == step
            found = await agent.ask(n=4, max_tokens=24)
            assert {version_of(sample) for sample in found} == {step}
            self.assert_answers_as(oracle, found, await agent.folder(step), folders)
            folders.append(await agent.folder(step))

    @check(
        "PUB-003", MUST, "name@k answers from step k, and the answer says so in its model and its choices.", live=True
    )
    async def test_step_by_name(self, agent: Agent, oracle: Oracle) -> None:
        await agent.train()
        name = agent.named(1)
        answer = await agent.post(name, n=2)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        found = await agent.ask(name, n=4)
        assert {version_of(sample) for sample in found} == {1}
        self.assert_answers_as(oracle, found, await agent.folder(1), [None])
        assert (await agent.post()).json()["model"] == name, "the plain name does not say which step answered"

    @check("PUB-004", MUST, "A name or a step that isn't served is a 404 that lists what there is.", live=True)
    async def test_unknown_names(self, agent: Agent) -> None:
        for name in ("nobody", f"{agent.model.name}@7", "nobody@0"):
            answer = await agent.post(name)
            assert answer.status_code == 404, f"{name!r} gave HTTP {answer.status_code}: {answer.text[:300]}"
            assert agent.model.name in answer.text, f"the 404 does not list what there is: {answer.text[:300]}"

    @check(
        "PUB-005",
        MUST,
        "Every choice carries token ids, prompt ids, logprobs and its step, without being asked to.",
        live=True,
    )
    async def test_form(self, agent: Agent, oracle: Oracle) -> None:
        answer = await agent.post(n=3)
        for sample in await agent.ask(n=3):
            assert sample.ids
            assert sample.prompt_ids == oracle.chat_ids([{"role": "user", "content": "Say something about the city."}])
            assert version_of(sample) == 0
        assert len(answer.json()["choices"]) == 3

    @check(
        "PUB-006",
        MUST,
        "Until a step is published the old one answers the plain name, and the new one is a 404.",
        needs=Cap.PUBLICATION_HOOKS,
        live=True,
    )
    async def test_not_before(self, agent: Agent, oracle: Oracle) -> None:
        seen: list[tuple[list[Sample], int]] = []

        async def look(checkpoint: CheckpointRef) -> None:
            found = await agent.ask(n=2)
            seen.append((found, (await agent.post(agent.named(checkpoint.step))).status_code))

        agent.heard.before_publish = look
        await agent.train()
        assert len(seen) == 1, "art_before_publish_checkpoint was not called once"
        found, status = seen[0]
        assert {version_of(sample) for sample in found} == {0}
        self.assert_answers_as(oracle, found, None)
        assert status == 404, f"the step could be asked for before it was published: HTTP {status}"

    @check(
        "PUB-007",
        MUST,
        "Requests in flight finish on the step that they started with, and say which it was.",
        needs=Cap.PUBLICATION_HOOKS,
        live=True,
    )
    async def test_in_flight(self, agent: Agent, new_agent: NewAgent, oracle: Oracle) -> None:
        # The tiny model ends some answers by chance, maybe all of them just before a step is routed. A further try is
        # a further model's: after a few steps of one the tiny model is so sure that two steps answer alike.
        for _ in range(PUBLISH_TRIES - 1):
            if await self._in_flight(agent, oracle):
                return
            agent = await new_agent(backend=agent.backend)
        assert await self._in_flight(agent, oracle), (
            "no request was in flight while a step was published: it shows nothing"
        )

    async def _in_flight(self, agent: Agent, oracle: Oracle) -> int:
        """Publish a fresh model's first step under requests; gives how many of them spanned it."""
        groups = await agent.groups()
        asking: list[asyncio.Task[None]] = []
        answers: list[tuple[list[Sample], bool]] = []
        heard = agent.heard.names().count("art_checkpoint_published")

        def published() -> bool:
            return agent.heard.names().count("art_checkpoint_published") > heard

        async def keep_asking(max_tokens: int) -> None:
            while not published():
                found = await agent.ask(n=2, max_tokens=max_tokens)
                answers.append((found, published()))

        async def start(_: CheckpointRef) -> None:
            # Of unlike lengths, so that they don't all end at once, which may be when the step is routed.
            asking.extend(asyncio.create_task(keep_asking(max_tokens)) for max_tokens in (80, 130, 180, 230))
            while len(answers) < len(asking) and not any(task.done() for task in asking):
                await asyncio.sleep(0.01)

        agent.heard.before_publish = start
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                await agent.backend.train(agent.model, groups, learning_rate=0.05)
            await gather_limited(*asking)
        finally:
            for task in asking:
                task.cancel()
        folders = {0: None, 1: await agent.folder(1)}
        spanning = 0
        for found, ended_after in answers:
            versions = {version_of(sample) for sample in found}
            assert len(versions) == 1
            (version,) = versions
            self.assert_answers_as(oracle, found, folders[version], [folders[1 - version]])
            spanning += ended_after and version == 0
        assert {version_of(sample) for sample in await agent.ask()} == {1}
        return spanning

    @check(
        "PUB-008",
        MUST,
        "Under constant load over several steps no request fails, and every answer is its step's.",
        live=True,
    )
    async def test_under_load(self, agent: Agent, oracle: Oracle) -> None:
        ended = asyncio.Event()
        answers: list[Sample] = []

        async def keep_asking() -> None:
            while not ended.is_set():
                answers.extend(await agent.ask(max_tokens=24))

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        try:
            for step, rate in ((1, RATE), (2, RATE), (3, RATE / 4)):
                assert (await agent.train(learning_rate=rate)).step == step
        finally:
            ended.set()
            outcomes = await asyncio.gather(*asking, return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert not failed, f"a request failed: {failed[0]}"
        folders: dict[int, Path | None] = {0: None, **{step: await agent.folder(step) for step in (1, 2, 3)}}
        for version in sorted({version_of(sample) for sample in answers}):
            mine = [sample for sample in answers if version_of(sample) == version][:24]
            others = [folder for step, folder in folders.items() if step != version]
            self.assert_answers_as(oracle, mine, folders[version], others)

    @check(
        "PUB-010",
        MUST,
        "A spoiled checkpoint is refused with its reason, and the old step is served on.",
        needs=Cap.PUBLICATION_HOOKS,
        live=True,
    )
    async def test_spoiled(self, agent: Agent, oracle: Oracle, conformance_model: Path) -> None:
        await agent.train()
        for kind, spoil in SPOILED.items():
            await self._refused(agent, oracle, kind, lambda c, spoil=spoil: spoil(c.path, conformance_model))  # type: ignore[misc]

    @check(
        "PUB-011",
        MUST,
        "Sound weights that don't answer their canary are refused: they are not this checkpoint.",
        needs=Cap.PUBLICATION_HOOKS,
        live=True,
    )
    async def test_canary(self, agent: Agent, oracle: Oracle, conformance_model: Path) -> None:
        await agent.train()
        await self._refused(agent, oracle, "other weights", lambda c: other_weights(c.path, conformance_model))

    @check(
        "PUB-012",
        MUST,
        "A hook that refuses a checkpoint keeps the old step served, and its error reaches the caller.",
        needs=Cap.PUBLICATION_HOOKS,
        live=True,
    )
    async def test_refusal(self, agent: Agent, oracle: Oracle) -> None:
        await agent.train()
        agent.heard.refuse["art_before_publish_checkpoint"] = ValueError("the suite says no to this one")
        groups = await agent.groups()
        with pytest.raises(Exception, match="the suite says no to this one"):
            await agent.backend.train(agent.model, groups, learning_rate=0.05)
        await self._still_serves(agent, oracle, 1)
        assert agent.heard.names("art_checkpoint_publish_failed") == ["art_checkpoint_publish_failed"]

    @check(
        "PUB-013",
        MUST,
        "After a refused checkpoint the next training step is published as usual.",
        needs=Cap.PUBLICATION_HOOKS,
        live=True,
    )
    async def test_goes_on(self, agent: Agent, oracle: Oracle, conformance_model: Path) -> None:
        await agent.train()
        await self._refused(agent, oracle, "NaN", lambda c: SPOILED["NaN"](c.path, conformance_model))
        agent.heard.before_publish = None
        result = await agent.train()
        assert result.step >= 2
        found = await agent.ask(n=4)
        assert {version_of(sample) for sample in found} == {result.step}
        self.assert_answers_as(oracle, found, await agent.folder(result.step), [await agent.folder(1)])

    @check(
        "PUB-014", MUST, "The hooks of a step fire once each and in order, and the failing ones not at all.", live=True
    )
    async def test_hooks_of_a_step(self, agent: Agent) -> None:
        result = await agent.train()
        assert tuple(agent.heard.names(*TRAINING)) == STEP
        assert agent.heard.last("art_before_train")["step"] == result.step
        assert agent.heard.last("art_after_train")["result"] == result
        receipt = agent.heard.last("art_checkpoint_published")["receipt"]
        assert receipt.step == result.step
        assert receipt.model == ModelKey(agent.model.project, agent.model.name)
        assert receipt.inference_name == agent.named(result.step)
        if Cap.PUBLICATION_HOOKS in agent.backend.capabilities:
            # Elsewhere the stages are another machine's.
            assert {"checked", "loaded", "verified", "routed"} <= receipt.seconds.keys()

    @check(
        "PUB-015",
        MUST,
        "For a step that fails exactly the failing hooks fire: one for its publication, one for it.",
        needs=Cap.PUBLICATION_HOOKS,
        live=True,
    )
    async def test_hooks_of_a_failure(self, agent: Agent, oracle: Oracle, conformance_model: Path) -> None:
        await self._refused(agent, oracle, "NaN", lambda c: SPOILED["NaN"](c.path, conformance_model), step=0)
        heard = agent.heard.names(*TRAINING)
        assert heard.count("art_checkpoint_publish_failed") == 1, heard
        assert heard.count("art_train_failed") == 1, heard
        assert "art_checkpoint_published" not in heard
        assert "art_after_train" not in heard
        agent.heard.heard.clear()
        agent.heard.refuse["art_before_train"] = ValueError("not now")
        with pytest.raises(ValueError, match="not now"):
            await agent.train()
        heard = agent.heard.names(*TRAINING)
        assert heard == ["art_before_train", "art_train_failed"]

    @check(
        "PUB-016",
        MUST,
        "A plugin that fails while it is told of a step harms neither the step nor other plugins.",
        live=True,
    )
    async def test_failing_listener(self, agent: Agent) -> None:
        for hook in ("art_checkpoint_saved", "art_checkpoint_published", "art_after_train"):
            agent.heard.refuse[hook] = RuntimeError("a listener that fails")
        with pytest.warns(RuntimeWarning, match="a listener that fails"):
            result = await agent.train()
        assert await agent.backend.get_step(agent.model) == result.step == 1

    @check(
        "PUB-020",
        MUST,
        "An inference server killed with SIGKILL comes back, with the right adapter under each name.",
        live=True,
    )
    async def test_killed_server(
        self, agent: Agent, oracle: Oracle, inference_command: tuple[str, ...], new_agent: NewAgent
    ) -> None:
        assert inference_command, "give the fixture `inference_command`, by which the inference server can be found"
        await agent.train()
        other = await new_agent(backend=agent.backend)
        servers = _processes(inference_command, agent.model.base_model)
        assert servers, f"no process runs {' '.join(inference_command)} on {agent.model.base_model}"
        for server in servers:
            server.kill()
        await asyncio.to_thread(psutil.wait_procs, servers, 10)
        for asked, version, folder in ((agent, 1, await agent.folder(1)), (other, 0, None)):
            found = await _answered(asked)
            assert {version_of(sample) for sample in found} == {version}
            self.assert_answers_as(oracle, found, folder)
        assert (await agent.train(learning_rate=SMALL_RATE)).step == 2

    @check(
        "PUB-021",
        MUST,
        "A published step is the same weights under the same name after its model is registered again, and after the"
        " backend is opened again.",
        live=True,
    )
    async def test_published_again(
        self, open_backend: OpenBackend, new_agent: NewAgent, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        folder = tmp_path_factory.mktemp("again")
        async with open_backend(folder) as first:
            agent = await new_agent(backend=first)
            for rate in (RATE, RATE / 2):
                await agent.train(learning_rate=rate)
            saved = [await agent.folder(step) for step in (1, 2)]
            name = agent.named(2)
            await asyncio.gather(*(first.register(agent.model) for _ in range(2)))
            await self._same(agent, oracle, name, saved)
        async with open_backend(folder) as second:
            for _ in range(2):
                registration = await second.register(agent.model)
                again = Agent(second, agent.model, registration, agent.client, agent.heard)
                await self._same(again, oracle, name, saved)

    async def _same(self, agent: Agent, oracle: Oracle, name: str, saved: list[Path]) -> None:
        """The latest step has its name and its weights, and where the one before is served, that has its own."""
        assert agent.named(2) == name
        for asked in (None, name):
            found = await agent.ask(asked, max_tokens=48)
            assert {version_of(sample) for sample in found} == {2}
            self.assert_answers_as(oracle, found, saved[1], [None, saved[0]])
        if (await agent.post(agent.named(1))).status_code == 200:
            found = await agent.ask(agent.named(1), max_tokens=48)
            self.assert_answers_as(oracle, found, saved[0], [None, saved[1]])

    async def _refused(
        self, agent: Agent, oracle: Oracle, kind: str, spoil: Callable[[CheckpointRef], Any], step: int = 1
    ) -> None:
        """Train a step that is spoiled before it is published; it must be refused, and `step` served on."""
        agent.heard.before_publish = spoil
        groups = await agent.groups()
        with pytest.raises(ArtError) as refusal:
            await agent.backend.train(agent.model, groups, learning_rate=0.05)
        assert len(str(refusal.value)) > 20, f"the refusal of a checkpoint ({kind}) gives no reason: {refusal.value!r}"
        assert "art_checkpoint_publish_failed" in agent.heard.names(), kind
        await self._still_serves(agent, oracle, step)

    async def _still_serves(self, agent: Agent, oracle: Oracle, step: int) -> None:
        assert await agent.backend.get_step(agent.model) == step
        found = await agent.ask(n=4)
        assert {version_of(sample) for sample in found} == {step}
        self.assert_answers_as(oracle, found, await agent.folder(step) if step else None)
        answer = await agent.post(agent.named(step + 1))
        assert answer.status_code == 404, f"the refused step can be asked for: HTTP {answer.status_code}"


def _processes(command: tuple[str, ...], base_model: str) -> list[psutil.Process]:
    """The processes that run `command` on a base model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if tuple(words[1 : 1 + len(command)]) == command and base_model in words:
            found.append(process)
    return found


async def _answered(agent: Agent) -> list[Sample]:
    """Ask until an answer comes; meanwhile only errors that say to try again are allowed."""
    deadline = time.monotonic() + RECOVERY_LIMIT_S
    while True:
        answer = await agent.post(n=4)
        if answer.status_code == 200:
            return await agent.ask(n=4)
        assert answer.status_code in (429, 500, 502, 503, 504), f"HTTP {answer.status_code}: {answer.text[:500]}"
        assert time.monotonic() < deadline, f"no answer {RECOVERY_LIMIT_S:g} s after the kill: {answer.text[:500]}"
        await asyncio.sleep(0.5)
