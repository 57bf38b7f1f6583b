"""What needs the package verifiers, which wants another openai than the rest of the development environment: these run
in an environment of their own, by `make test-verifiers`, and are left out elsewhere.
"""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("verifiers") else ["test_*.py"]
