"""The table of the page on requests is what the real servers do, and leaves out no field of OpenAI's requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params as text
from openai.types.chat import completion_create_params as chat

from art_conformance.request_probes import outcome, probes
from art_conformance.serving import port_for_a_server, serving
from art_conformance.tiny_model import write_base_model
from art_core import InferenceLaunch, installed_plugins
from art_runtime.environments import engine_for, python_for

PAGE = Path(__file__).parents[2] / "docs" / "requests.md"
ENGINES = ("torch", "vllm", "sglang")


def table() -> dict[str, list[str]]:
    """What the page says of each field, one word for each engine."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head = rows.index(["field", *ENGINES])
    return {row[0].replace("`", ""): row[1:] for row in rows[head + 2 :]}


def test_the_table_has_every_field_of_openais_requests() -> None:
    said = {name.partition(" ")[0] for name in table()}
    of_openai: set[str] = set()
    for params in (chat.CompletionCreateParamsBase, text.CompletionCreateParamsBase):
        of_openai |= set(params.__annotations__)
    assert of_openai - said == {"model"}
    assert [probe.name for probe in probes()] == list(table())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ENGINES)
async def test_the_real_server_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    spec: Any = installed_plugins().inference_engine(name)
    launch = InferenceLaunch(
        base_model=write_base_model(tmp_path / "base"),
        served_name="base-model",
        host="127.0.0.1",
        port=port_for_a_server(),
        api_key="a-test-key",
        python=str(python_for(spec)),
        dtype="float32",
    )
    column = ENGINES.index(name)
    async with serving(engine_for(spec), launch, tmp_path / "server.log") as live:
        found = {probe.name: await outcome(live, probe) for probe in probes()}
    assert found == {field: cells[column] for field, cells in table().items()}
