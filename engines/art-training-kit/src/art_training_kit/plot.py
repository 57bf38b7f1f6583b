"""A picture of a packed step, for looking at what is trained on. Needs matplotlib; knows packed rows and one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .packing import PackedRow


def plot_rows(
    rows: Sequence[PackedRow], advantages: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], path: Path
) -> None:
    """Save a PNG with one band a packed row: token ids, depth, sequences trained at each token, old logprob,
    advantage, weight.

    Raises ImportError naming the pip line when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_tensors=True needs matplotlib: pip install "art-training-kit[plot]"') from error
    width = max(map(len, rows))
    figure = Figure(figsize=(14, 18), layout="constrained")
    FigureCanvasAgg(figure)
    titles = ("token id", "depth in its tree", "sequences trained here", "old logprob", "Σ advantage", "Σ weight")
    layers = {title: np.full((len(rows), width), np.nan) for title in titles}
    for r, row in enumerate(rows):
        # What is trained at a position is the prediction it makes of the next token.
        at = row.parents[row.target_parent[row.entry_target]]
        known = ~np.isnan(row.old_logprobs)
        count = np.bincount(at, minlength=len(row))
        values = (
            row.token_ids,
            row.position_ids,
            count,
            np.bincount(at[known], row.old_logprobs[known], minlength=len(row)) / np.maximum(count, 1),
            np.bincount(at, advantages[row.entry_trajectory], minlength=len(row)),
            np.bincount(at, weights[row.entry_trajectory], minlength=len(row)),
        )
        for layer, value in zip(layers.values(), values, strict=True):
            layer[r, : len(row)] = value
    for axes, (title, layer) in zip(figure.subplots(len(layers), 1), layers.items(), strict=True):
        image = axes.imshow(layer, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set(title=title, ylabel="packed row")
        figure.colorbar(image, ax=axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
