"""One llama.cpp server as a process of its own: started with its adapters, asked for samples, ended after the last.

Knows llama.cpp's own endpoints and its gaps. Runs in the engine's own environment.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aiohttp import ClientSession
from art_llamacpp_requests import JSON, Ids, scored

INNER = Path(__file__).with_name("art_llamacpp_inner.py")
START_LIMIT_S = 600.0


class Refused(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Llama:
    """A running llama.cpp server. `adapters` are the names of those it has, in order, `pieces` each token's bytes."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        url: str,
        key: str,
        adapters: Sequence[str],
        session: ClientSession,
        pieces: Sequence[bytes],
    ) -> None:
        self.process, self.adapters = process, adapters
        self._url, self._session, self._pieces = url, session, pieces
        self._headers = {"Authorization": f"Bearer {key}"}
        self._owed, self.last = 0, False
        # Any token that is a character by itself.
        self._letter = pieces.index(b"a")

    @classmethod
    async def start(cls, told: JSON, adapters: Sequence[str], session: ClientSession, pieces: Sequence[bytes]) -> Llama:
        """Start one, as `told` in the words of `art_llamacpp_inner`. Raises ValueError where it doesn't come up."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, str(INNER), stdin=pipe, stdout=pipe)
        assert process.stdin is not None
        assert process.stdout is not None
        key = secrets.token_hex(16)
        try:
            process.stdin.write(json.dumps({**told, "api_key": key}).encode() + b"\n")
            line = await asyncio.wait_for(process.stdout.readline(), START_LIMIT_S)
        except BaseException:
            process.kill()
            raise
        if not line:
            raise ValueError(f"llama.cpp ended with {await process.wait()}; what it said before is in the log")
        return cls(process, json.loads(line)["url"], key, adapters, session, pieces)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Within the block it isn't ended."""
        self._owed += 1
        try:
            yield
        finally:
            self._owed -= 1
            self.end_if_done()

    def end_if_done(self) -> None:
        """End it when another has taken its place and the last answer is given."""
        if self.last and not self._owed and self.process.stdin is not None:
            self.process.stdin.close()

    async def ask(self, path: str, body: JSON) -> JSON:
        """Raises Refused with llama.cpp's own status and reason."""
        async with self._session.post(f"{self._url}/{path}", json=body, headers=self._headers) as answer:
            found: JSON = await answer.json()
            if answer.status != 200:
                raise Refused(answer.status, str(found.get("error", {}).get("message", found)))
            return found

    async def ids(self, text: str) -> Ids:
        """A text as token ids."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        found: Ids = (await self.ask("tokenize", asked))["tokens"]
        return found

    async def sample(self, asked: JSON) -> tuple[JSON, list[JSON]]:
        """One sample, and the entry of logprobs of each of its tokens."""
        result = await self.ask("completion", asked)
        found = []
        for position, entry in enumerate(scored(result, self._pieces), start=1):
            found.append(entry or await self._score(asked, result["tokens"][:position]))
        return result, found

    async def _score(self, asked: JSON, sampled: Ids) -> JSON:
        """The logprob of the last token sampled, for which llama.cpp gave none: looked up among those of all tokens
        that might have come there. What it samples this time must be a whole character, else it would give none again.
        """
        before = {"prompt": [*asked["prompt"], *sampled[:-1]], "lora": asked["lora"]}
        settings = {
            "n_predict": 1,
            "n_probs": len(self._pieces),
            "temperature": 0.0,
            "logit_bias": [[self._letter, 1e6]],
        }
        result = await self.ask("completion", before | settings)
        likely = result["completion_probabilities"][0]["top_logprobs"]
        found = next(entry for entry in likely if entry["id"] == sampled[-1])
        return {**found, "top_logprobs": likely[: asked["n_probs"]]}
