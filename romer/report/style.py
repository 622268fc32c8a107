"""How every figure looks and how it is written: PNG and SVG, equal input gives equal bytes.

with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(5, 3), layout="constrained")
    ...
    return save(figure, "results/figures", "fig3")
"""

import io
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from romer.errors import InputError
from romer.store import write_atomic

DPI = 160
STYLE = {"svg.hashsalt": "romer", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
BOXED = STYLE | {"axes.spines.top": True, "axes.spines.right": True}  # for maps
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito 2008


def save(figure: Figure, folder: str | Path, name: str) -> tuple[Path, Path]:
    """Lay the figure out and write it as `name`.png and `name`.svg in `folder`; returns their paths.

    The SVG's ids come from the fixed salt of STYLE, neither file holds a date.
    """
    FigureCanvasAgg(figure)
    figure.dpi = DPI
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    for panel in figure.axes:  # the solver of the layout repeats to about 1e-15 only
        panel.set_position(np.round(panel.get_position(original=True).bounds, 6))
    paths = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:], dpi=DPI, metadata=metadata)
        write_atomic(path, buffer.getvalue())
    return paths


def require(frame: pd.DataFrame, name: str, columns: tuple[str, ...]) -> None:
    """Raises InputError where a frame that is to be drawn lacks a column or has no rows."""
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise InputError(f"{name}: column {missing[0]} is missing, expected {', '.join(columns)}")
    if frame.empty:
        raise InputError(f"{name}: found no rows, expected at least one")


def log_ticks(axis: Axis) -> None:
    """Ticks at 1, 2, 5 times a power of ten, or at the powers alone where that would be too many."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high < 1000 * low else LogLocator(numticks=5))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
