"""Names of metrics that MLflow takes. Knows its rules, and not what a metric is.

MLflow refuses a whole row for one name: for a character that it doesn't know, for more than 250 characters, and for a
name that would be another as a path, such as `a//b`.
"""

import hashlib
import re


def allowed(name: str) -> str:
    """The name itself where MLflow takes it. Else one that it takes: what may stay of its first 200 characters, and a
    digest that keeps it apart from all others.
    """
    parts = (re.sub(r"[^\w\-. :]", "_", part) for part in name.split("/") if part.strip("."))
    kept, digest = "/".join(parts).lstrip(".")[:250], hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return name if name and kept == name else f"{kept[:200]}-{digest[:8]}"
