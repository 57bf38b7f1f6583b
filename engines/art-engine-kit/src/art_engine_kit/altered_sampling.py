"""Choices that were drawn from other probabilities than the policy's own: how they are marked, counted and told of.

Knows a choice's extra field and a metric by name. What marks them is the gateway's, what counts them the training
kit's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

#: The extra of a choice: names of the request's fields that altered what was drawn, as a list.
FIELD: Final = "altered_sampling"
ALTERED: Final = "data/step_num_choices_altered_sampling"


def altered_by(choice: Any) -> str:
    """The names of the fields that altered what was drawn for this choice, with commas; empty where none did."""
    names = getattr(choice, FIELD, None)
    text = ", ".join(map(str, names)) if isinstance(names, list | tuple) else ""
    return text.encode("ascii", "backslashreplace").decode()


def sampled_otherwise(metrics: Mapping[str, float]) -> str:
    """What to tell of a step that trained on such choices; empty where there is nothing to."""
    altered = metrics.get(ALTERED, 0.0)
    if not altered:
        return ""
    return (
        f"{altered:.0f} trained choices were drawn from other probabilities than the policy's own, which their logprobs"
        " are (a temperature other than 1, top_p, top_k, min_p, a penalty or a bias, a structure; `altered_sampling` of"
        " each choice names it). The step weighs them as if the policy itself had drawn them. Sample with temperature=1"
        " and no filter for the exact gradient, or refuse such choices with train(altered_sampling='refuse')."
    )
