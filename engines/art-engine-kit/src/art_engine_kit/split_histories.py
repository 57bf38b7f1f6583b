"""How often conversations of several turns fell apart into several rows: the names of the counts, and when to warn.

Knows metrics by name. What counts them is the training kit's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SEVERAL_TURNS: Final = "data/step_num_histories_several_turns"
SPLIT: Final = "data/step_num_histories_split"
# A sampled text is now and then tokenized otherwise when it comes back; more than this has a cause that one can find.
OFTEN: Final = 0.1


def often_split(metrics: Mapping[str, float]) -> str:
    """What to tell of a step of which many conversations were split; empty where there is nothing to."""
    split, several = metrics.get(SPLIT, 0.0), metrics.get(SEVERAL_TURNS, 0.0)
    if not split > OFTEN * several:
        return ""
    return (
        f"{split:.0f} of {several:.0f} conversations of several turns were trained in pieces, because a later prompt"
        " doesn't begin with the tokens of an earlier one and its answer. Each token is trained on as it was sampled,"
        " but every piece computes anew what comes after the first difference. The chat template drops or rewrites"
        " earlier turns (thinking that it strips, arguments of tool calls that it writes in its own way), or the"
        " rollout sends them back changed. Where that isn't meant, send back each message as it came, or give the model"
        " a template that keeps them: InternalModelConfig(chat_template=..., chat_template_kwargs=...)."
    )
