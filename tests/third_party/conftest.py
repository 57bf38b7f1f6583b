"""Plugins of third parties; `tests/packaging/test_third_party.py` runs their suites from wheels."""

collect_ignore_glob = ["*"]
