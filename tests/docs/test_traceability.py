"""What pages promise is mapped, once, to requirements and tests that there are, and the page of it is what the mapping
gives. What each holds is for whoever writes the mapping to read.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from art_conformance import catalogue

SCRIPT = Path(__file__).with_name("traceability.py")


@pytest.fixture(scope="module")
def traceability(module_of: Callable[[Path], Any]) -> Any:
    """The module that makes the page, which is a script beside this one."""
    return module_of(SCRIPT)


@pytest.fixture
def mapping(traceability: Any) -> Any:
    return traceability.read_mapping(traceability.MAPPING.read_text(encoding="utf-8"))


def test_the_page_is_what_the_mapping_gives() -> None:
    made = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert made.returncode == 0, made.stderr


def test_each_promise_is_mapped_once_to_what_there_is(traceability: Any, mapping: Any) -> None:
    said = traceability.statements()
    assert len(said) > 90
    assert list(traceability.faults(said, mapping)) == []


def test_each_statement_that_promises_nothing_is_still_said(traceability: Any, mapping: Any) -> None:
    for page, beginnings in mapping.asides.items():
        for words in beginnings:
            assert any(each.page == page and each.words.startswith(words) for each in traceability.statements()), words


def test_a_new_row_fails_until_it_is_mapped(traceability: Any, mapping: Any) -> None:
    said = [*traceability.statements(), traceability.Statement("faults.md", "The machine", "the moon falls down")]
    (fault,) = traceability.faults(said, mapping)
    assert fault == "docs/faults.md says 'the moon falls down', which the mapping has 0 times."


def test_what_is_mapped_and_not_said_any_more_or_twice_is_named(traceability: Any, mapping: Any) -> None:
    gone, *rest = mapping.promises
    (fault,) = traceability.faults([each for each in traceability.statements() if each.words != gone.words], mapping)
    assert fault == f"The mapping has {gone.words!r} of docs/{gone.page}, which doesn't say so (any more)."
    twice = replace(mapping, promises=(gone, gone, *rest))
    (fault,) = traceability.faults(traceability.statements(), twice)
    assert fault.endswith("which the mapping has 2 times.")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ids": ("PUB-999",)}, f"PUB-999, named for .*, is no requirement of revision {catalogue.REVISION}"),
        ({"tests": ("tests/core/test_publish.py::test_nothing",)}, "is no test here"),
        ({"tests": ("tests/core/test_publish.py",)}, "is no test here"),
        ({"tests": ("tests/core/test_gone.py::test_nothing",)}, "is no test here"),
        ({"tests": ("tests/docs/traceability.py::main",)}, "is no test here"),
        ({"ids": (), "tests": (), "open": "some of it"}, "is held by nothing, so all of it is open"),
    ],
)
def test_what_holds_a_promise_and_is_not_there_is_named(
    traceability: Any, mapping: Any, changes: dict[str, Any], says: str
) -> None:
    first, *rest = mapping.promises
    (fault,) = traceability.faults(
        traceability.statements(), replace(mapping, promises=(replace(first, **changes), *rest))
    )
    assert re.search(says, fault), fault


def test_a_field_that_a_promise_does_not_have_is_refused(traceability: Any) -> None:
    with pytest.raises(TypeError, match="test"):
        traceability.read_mapping('[[promise]]\npage = "a.md"\nwords = "b"\ntest = ["c"]')


def test_rows_items_and_sentences_are_statements(traceability: Any) -> None:
    section = """
A sentence. Another one, with `art serve`, and `{"a": True}`. See below:

```python
nothing("here is said.")
```

| fault | what happens |
|---|---|
| `a` | b |
| c, d | e |

- **Bold.** And what of it.
- **A rollout that fails** is tried
  again.
- Neither bold nor
  short.

1. **One.** First.
2. **Two.** Second."""
    text = f"# Page\n\n## Before\n\nNot this.\n\n## Here\n{section}\n\n## After\n\nNor this.\n"
    found = list(traceability.stated(traceability.section_of(text, "Here", "page.md")))
    assert found == [
        "A sentence.", 'Another one, with `art serve`, and `{"a": True}`.', "See below:",
        "`a`", "c, d", "Bold", "A rollout that fails",
        "Neither bold nor short.", "One", "Two",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="0 sections 'Nowhere'"):
        traceability.section_of(text, "Nowhere", "page.md")


def test_a_test_is_a_function_a_class_a_method_or_a_state_machine(traceability: Any) -> None:
    for there in (
        "tests/core/test_publish.py::test_an_older_step_cannot_be_routed",
        "tests/pipeline/test_pipeline_flow.py::TestPipeline",
        "plugins/art-trackio/tests/test_trackio_conformance.py::TestTrackio",
        "plugins/art-backend-local/tests/test_local_sft.py::TestOnTheFakeEngines::test_no_trajectories_are_an_error",
    ):
        assert traceability.is_there(there), there


def test_what_nothing_holds_and_what_holds_nothing_is_listed(traceability: Any, mapping: Any) -> None:
    said = traceability.statements()
    first, *rest = mapping.promises
    page = traceability.page_of(said, replace(mapping, promises=(replace(first, ids=(), tests=(), open=""), *rest)))
    nothing = page.partition("## Held by nothing")[2].partition("## ")[0]
    assert f"- [{first.page}]({first.page}): {first.words}" in nothing
    none = [replace(each, ids=()) for each in mapping.promises]
    unnamed = traceability.page_of(said, replace(mapping, promises=tuple(none))).partition("that no promise names")[2]
    assert all(f"| {id} | " in unnamed for id in traceability.requirements())
