"""Figures 2 and 5 as PNG and SVG: the calibration's KL curves, and heatmaps of the experts' load.

    fig2_kl(curves, fits, "results/figures")
    fig5_heatmaps({"clean": a, "vanilla": b, "romer": c}, cold, "results/figures", title="olmoe, table1 at 80 C")

Equal input gives equal bytes: the SVG's ids come from a fixed salt and neither file holds a date.
"""

import io
import math
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from romer.errors import InputError
from romer.statistics import mean_interval
from romer.store import write_atomic

DPI = 160
STYLE = {"svg.hashsalt": "romer", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito 2008
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
CONDITIONS = ("clean", "vanilla", "romer")
COLD_MARK = "#2166ac"  # blue stands out on every shade of YlOrRd


def _save(figure: Figure, folder: str | Path, name: str) -> tuple[Path, Path]:
    FigureCanvasAgg(figure)
    paths = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:], dpi=DPI, metadata=metadata)
        write_atomic(path, buffer.getvalue())
    return paths


def _require(frame: pd.DataFrame, name: str, columns: tuple[str, ...]) -> None:
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise InputError(f"{name}: column {missing[0]} is missing, expected {', '.join(columns)}")
    if frame.empty:
        raise InputError(f"{name}: found no rows, expected at least one")


def fig2_kl(curves: pd.DataFrame, fits: pd.DataFrame, folder: str | Path, name: str = "fig2_kl") -> tuple[Path, Path]:
    """KL(clean || noisy) in nats per token against sigma_dev, one panel per chip, one line per model; log-log.

    curves: columns model, chip, temperature_c, sigma_dev, realisation, kl; the band is the bootstrap interval of the
    mean over realisations. The noise is common to all temperatures, so a model has one curve. fits: columns model,
    chip, temperature_c, sigma_dev, kl_target, sigma_low, sigma_high; a marker per temperature where the curve meets the
    target, its bar the range of sigma_dev over realisations (NaN: no bar). Writes `name`.png and `name`.svg in
    `folder`, returns their paths. Raises InputError for a missing column or an empty frame. Rows with sigma_dev = 0
    have no logarithm and are left out.
    """
    _require(curves, "curves", ("model", "chip", "temperature_c", "sigma_dev", "realisation", "kl"))
    _require(fits, "fits", ("model", "chip", "temperature_c", "sigma_dev", "kl_target", "sigma_low", "sigma_high"))
    chips, models = (sorted(set(curves[c]) | set(fits[c])) for c in ("chip", "model"))
    temperatures = sorted(set(fits["temperature_c"]))
    colour = {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(models)}
    marker = {t: MARKERS[i % len(MARKERS)] for i, t in enumerate(temperatures)}
    wide = min(2, len(chips))
    high = math.ceil(len(chips) / wide)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9 * wide + 1.5, 3.1 * high + 0.3), layout="constrained")
        grid = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False)
        for panel, chip in zip(grid.flat, chips, strict=False):
            for model in models:
                _curve(panel, curves[(curves["chip"] == chip) & (curves["model"] == model)], colour[model])
                for fit in fits[(fits["chip"] == chip) & (fits["model"] == model)].itertuples():
                    at, target = fit.sigma_dev, fit.kl_target
                    look = {"color": colour[model], "markeredgecolor": "black", "markersize": 4.5, "zorder": 4}
                    panel.plot(at, target, marker[fit.temperature_c], **look)
                    bar = [[max(at - fit.sigma_low, 0)], [max(fit.sigma_high - at, 0)]]  # NaN draws nothing
                    panel.errorbar(at, target, xerr=bar, ecolor="black", elinewidth=0.9, capsize=2.5, zorder=3)
            panel.set(title=chip, xscale="log", yscale="log")
            panel.grid(alpha=0.25, lw=0.5)
        for panel in grid.flat[len(chips) :]:
            panel.set_visible(False)
        figure.supxlabel(r"device noise $\sigma_\mathrm{dev}$ (relative)", fontsize=10)
        figure.supylabel("KL(clean || noisy), nats per token", fontsize=10)
        keys = [Line2D([], [], color=colour[m], label=m) for m in models]
        look = {"color": "lightgrey", "markeredgecolor": "black", "linestyle": ""}
        keys += [Line2D([], [], marker=marker[t], label=f"fit at {t:g} °C", **look) for t in temperatures]
        figure.legend(handles=keys, loc="outside right upper", frameon=False)
        return _save(figure, folder, name)


def _curve(panel, rows: pd.DataFrame, colour: str) -> None:
    """The mean over realisations at each sigma_dev, with its interval."""
    rows = rows[rows["sigma_dev"] > 0]
    if rows.empty:
        return
    # A sigma that was tried for two temperatures is the same noise twice, not two realisations.
    rows = rows.groupby(["sigma_dev", "realisation"])["kl"].mean()
    sigma = rows.index.get_level_values("sigma_dev").unique()
    mean, low, high = np.array([mean_interval(rows[s]) for s in sigma]).T
    panel.plot(sigma, mean, color=colour, lw=1.4)
    panel.fill_between(sigma, low, high, color=colour, alpha=0.2, lw=0)


def fig5_heatmaps(
    activation: dict[str, np.ndarray],
    cold: np.ndarray,
    folder: str | Path,
    name: str = "fig5_heatmaps",
    title: str = "",
) -> tuple[Path, Path]:
    """Each expert's load in each layer for clean, vanilla and romer side by side, on one colour scale.

    activation: `clean`, `vanilla`, `romer` -> A_{l,i} of eq. 6, [layers, experts], as gate mass or as counts; what is
    drawn is A_{l,i} * experts / sum_i A_{l,i}, so 1 is a balanced expert. cold: int [layers, n], the experts that romer
    replaced: in its panel those slots hold copies of hot experts and carry a dot (n = 0: none). Writes `name`.png and
    `name`.svg in `folder`, returns their paths. Raises InputError for a missing condition, other shapes, negative or
    non-finite values, or a layer without any activation.
    """
    shares = {c: _share(activation, c) for c in CONDITIONS}
    layers, experts = shares["clean"].shape
    cold = np.asarray(cold)
    if {s.shape for s in shares.values()} != {(layers, experts)} or cold.ndim != 2 or len(cold) != layers:
        found = ", ".join(f"{c} {list(s.shape)}" for c, s in shares.items())
        raise InputError(
            f"activation: found {found}, cold {list(cold.shape)}; expected one [layers, experts], [layers, n]"
        )
    # A few extreme experts must not wash out the rest: the scale ends at a high quantile and its tip says so.
    everything = np.concatenate([s.ravel() for s in shares.values()])
    top = max(2.0, float(np.quantile(everything, 0.995)))
    with matplotlib.rc_context(STYLE | {"axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(11, 1.3 + 2.2 * min(1.6, max(0.8, layers / 16))), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for panel, (condition, share) in zip(panels, shares.items(), strict=True):
            image = panel.imshow(share, cmap="YlOrRd", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
            busiest = share.max(axis=1).mean()
            panel.set(title=f"{condition}: busiest expert {busiest:.1f}× on average", xlabel="expert")
        panels[0].set_ylabel("MoE layer")
        panels[0].yaxis.get_major_locator().set_params(integer=True)
        if cold.size:
            panels[2].scatter(cold.ravel(), np.repeat(np.arange(layers), cold.shape[1]), s=5, color=COLD_MARK, lw=0)
            panels[2].set_xlabel("expert (dot: replaced, the slot holds a copy)")
        ends = "max" if everything.max() > top else "neither"
        figure.colorbar(image, ax=panels, label="load (1 = balanced)", extend=ends, pad=0.01)
        figure.suptitle(title, fontsize=10)
        return _save(figure, folder, name)


def _share(activation: dict[str, np.ndarray], condition: str) -> np.ndarray:
    """A_{l,i} relative to a balanced layer: float64 [layers, experts]."""
    if condition not in activation:
        raise InputError(f"activation: found {', '.join(activation)}, expected {', '.join(CONDITIONS)}")
    a = np.asarray(activation[condition], dtype=np.float64)
    if a.ndim != 2 or not np.isfinite(a).all() or (a < 0).any() or (a.sum(axis=1) <= 0).any():
        raise InputError(
            f"activation: {condition} has shape {list(a.shape)}; expected [layers, experts] of finite numbers >= 0,"
            " not all zero in any layer"
        )
    return a * a.shape[1] / a.sum(axis=1, keepdims=True)
