"""Histograms of codes as a picture."""

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fp8jax.checkpoint import Reader


def plot_codes(reader: Reader, histograms: Mapping[str, np.ndarray], path: str) -> None:
    """Writes a PNG: how often each magnitude occurs, a line for each FP8 weight.

    Raises:
        ValueError: If there is no FP8 weight.
        OSError: If the file cannot be written.
    """
    if not histograms:
        raise ValueError(f"{reader.path} has no FP8 weight to plot.")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # No display is needed.
    axes = figure.add_subplot()
    for name, counts in histograms.items():
        codes = np.arange(128, dtype=np.uint8).view(reader[name].stored.dtype)
        values = codes.astype(np.float32)
        shown = np.isfinite(values) & (values > 0)
        both = counts[:128] + counts[128:]  # Of either sign.
        share = both[shown] / max(1, counts.sum())
        few = len(histograms) <= 10
        axes.plot(values[shown], share, lw=1, alpha=0.7, label=name if few else None)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("magnitude of the code")
    axes.set_ylabel("share of the codes")
    axes.set_title(f"{len(histograms)} FP8 weights")
    if len(histograms) <= 10:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, format="png")
