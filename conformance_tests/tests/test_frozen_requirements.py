"""The code is held against the frozen set of its revision: an id keeps its meaning for ever."""

from __future__ import annotations

from art_conformance.catalogue import REVISION, as_json, frozen


def test_the_code_has_exactly_the_frozen_requirements_of_its_revision() -> None:
    now, then = as_json(), frozen()
    for suite in now["suites"].keys() | then["suites"].keys():
        listed = {entry["id"]: entry for entry in now["suites"].get(suite, [])}
        known = {entry["id"]: entry for entry in then["suites"].get(suite, [])}
        assert listed == known, (
            f"{suite} differs from frozen/{REVISION}.json. A published revision never changes: raise REVISION and write"
            " the new set with `art-conformance list --json`"
        )


def test_no_requirement_of_an_older_revision_was_given_another_meaning() -> None:
    now = {entry["id"]: entry["requirement"] for listed in as_json()["suites"].values() for entry in listed}
    for revision in range(1, REVISION):
        for listed in frozen(revision)["suites"].values():
            for entry in listed:
                assert now.get(entry["id"], entry["requirement"]) == entry["requirement"], entry["id"]
