"""Figures 2 and 5 as PNG and SVG: the calibration's KL curves and layer errors, and heatmaps of the experts' load.

    fig2_kl(curves, fits, layers, "results/figures")
    fig5_heatmaps({"clean": a, "vanilla": b, "romer": c}, cold, "results/figures", title="olmoe, table1 at 80 C")

`relative_loads` and `draw_loads` are figure 5's heatmaps for other figures.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from romer.errors import InputError
from romer.report.style import BOXED, COLOURS, STYLE, log_ticks, require, save
from romer.statistics import mean_interval

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
TINTS = (-0.45, 0.5)  # coldest, hottest: the share of white (-) or black (+) mixed into a colour
LINES = {  # of the layers, by source
    "noise model": {},
    "chip": {"lw": 0.9, "color": "black", "linestyle": ":", "markersize": 3.5, "markeredgewidth": 0.6, "zorder": 3},
}
FIG2_OMITS = "The paper's left half, a schematic of two architectures,\nis omitted: it shows no measured quantity."
CHIPS_A_ROW = 3
MARKERS_A_LINE = 10
CONDITIONS = ("clean", "vanilla", "romer")
COLD_MARK = "#2166ac"  # blue stands out on every shade of YlOrRd


def fig2_kl(
    curves: pd.DataFrame, fits: pd.DataFrame, layers: pd.DataFrame, folder: str | Path, name: str = "fig2"
) -> tuple[Path, Path]:
    """KL(clean ‖ noisy) in nats per token against sigma_dev for each chip, and beneath it the error of each layer.

    curves: columns model, chip, temperature_c, sigma_dev, realisation, kl; a line per model, log-log, the band is the
    bootstrap interval of the mean over realisations. The noise is common to all temperatures, so a model has one curve.
    Rows with sigma_dev = 0 have no logarithm and are left out. fits: columns model, chip, temperature_c, sigma_dev,
    kl_target, sigma_low, sigma_high; a marker per temperature where the curve meets the target, its bar the range of
    sigma_dev over realisations (NaN: no bar).

    layers: columns chip, model, temperature_c, layer, realisation, source ('noise model' | 'chip'), relative_error (of
    the layer's output, a ratio); mean and interval as above (one realisation: no band), at all temperatures of one
    model a chip: the first in `layers` with rows of source 'chip', else the first. The axis is logarithmic where the
    means span more than a decade; a layer without error then lies below it. If `fits` has a column kl_chip_model, nats
    per token, its range over that model's temperatures stands under the chip's name; what is not finite is left out.

    Writes `name`.png and `name`.svg in `folder`, returns their paths. Raises InputError for a missing column, an empty
    frame, a chip without layers, another source, or a relative error that is negative or not finite.
    """
    require(curves, "curves", ("model", "chip", "temperature_c", "sigma_dev", "realisation", "kl"))
    require(fits, "fits", ("model", "chip", "temperature_c", "sigma_dev", "kl_target", "sigma_low", "sigma_high"))
    require(layers, "layers", tuple("chip model temperature_c layer realisation source relative_error".split()))
    if unknown := sorted(set(layers["source"]) - set(LINES)):
        raise InputError(f"layers: found source {unknown[0]}, expected {' or '.join(LINES)}")
    if not layers["relative_error"].between(0, np.inf, inclusive="left").all():
        raise InputError("layers: found a relative error below 0 or not finite, expected finite numbers >= 0")
    chips, models = (sorted(set(curves[c]) | set(fits[c]) | set(layers[c])) for c in ("chip", "model"))
    shown = {chip: _shown(layers[layers["chip"] == chip], chip) for chip in chips}
    layers = layers[layers["model"] == layers["chip"].map(shown)]
    temperatures = sorted(set(fits["temperature_c"]) | set(layers["temperature_c"]))
    colour = {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(models)}
    marker = {t: MARKERS[i % len(MARKERS)] for i, t in enumerate(temperatures)}
    tint = dict(zip(temperatures, np.linspace(*TINTS, len(temperatures)), strict=True))
    if len(temperatures) == 1:
        tint = {temperatures[0]: 0.0}
    notes = [_across(fits[fits["chip"] == chip], model) for chip, model in shown.items()]
    high = math.ceil(len(chips) / CHIPS_A_ROW)
    wide = math.ceil(len(chips) / high)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * wide + 1.7, 5.2 * high), layout="constrained")
        grid = figure.add_gridspec(3 * high, wide, height_ratios=[1, 0.75, 0.05] * high)  # the third row is a gap
        first = None
        for i, (chip, model) in enumerate(shown.items()):
            row, column = divmod(i, wide)
            upper = figure.add_subplot(grid[3 * row, column], sharex=first, sharey=first)
            lower = figure.add_subplot(grid[3 * row + 1, column])
            first = first or upper
            curve, fit, errors = (frame[frame["chip"] == chip] for frame in (curves, fits, layers))
            _kl_panel(upper, curve, fit, colour, marker, tint)
            _layer_panel(lower, errors, colour[model], marker, tint)
            upper.set_title(chip, fontsize=11, pad=17 if any(notes) else 6)
            upper.text(0.5, 1.03, notes[i], fontsize=7.5, ha="center", transform=upper.transAxes)
            lower.set_title(f"layers of {model}", fontsize=8.5)
            if column == 0:
                upper.set_ylabel("KL(clean ‖ noisy), nats per token")
                lower.set_ylabel("relative error of output")
        log_ticks(first.xaxis)
        log_ticks(first.yaxis)
        figure.supxlabel(FIG2_OMITS, fontsize=7.5)
        _fig2_legend(figure, colour, marker, tint, [s for s in LINES if (layers["source"] == s).any()])
        return save(figure, folder, name)


def _fig2_legend(figure: Figure, colour: dict, marker: dict, tint: dict, sources: list[str]) -> None:
    keys = [Line2D([], [], color=c, label=model) for model, c in colour.items()]
    for t in marker:
        look = {"marker": marker[t], "markeredgecolor": "black", "linestyle": ""}
        keys.append(Line2D([], [], color=_tinted("grey", tint[t]), label=f"{t:g} °C", **look))
    keys += [Line2D([], [], **({"color": "grey", "lw": 1.4} | LINES[s]), label=s) for s in sources]
    titles = {0: "model", len(colour): "fit and layers at", len(colour) + len(marker): "layers of"}
    for at, title in reversed(titles.items()):
        keys.insert(at, Line2D([], [], linestyle="", label=title))
    legend = figure.legend(handles=keys, loc="outside right upper", frameon=False)
    for text in legend.get_texts():
        if text.get_text() in titles.values():
            text.set_weight("bold")


def _shown(layers: pd.DataFrame, chip: str) -> str:
    """The one model whose layers are drawn for a chip."""
    if layers.empty:
        raise InputError(f"layers: found no rows of chip {chip}, expected its layers")
    of_chip = layers[layers["source"] == "chip"]
    return (layers if of_chip.empty else of_chip)["model"].iloc[0]


def _across(fits: pd.DataFrame, model: str) -> str:
    """How far the fitted noise model is from the chip, in words; empty where that is unknown."""
    if "kl_chip_model" not in fits:
        return ""
    kl = fits.loc[fits["model"] == model, "kl_chip_model"].astype(float)
    kl = kl[np.isfinite(kl)]
    if kl.empty:
        return ""
    ends = dict.fromkeys(f"{end:#.2g}".rstrip(".") for end in (kl.min(), kl.max()))  # one where both print alike
    return f"{model}: KL(chip ‖ noise model) {'–'.join(ends)} nats"


def _tinted(colour: str, tint: float) -> tuple[float, ...]:
    """The colour mixed with white (tint < 0) or black (tint > 0)."""
    other = 1.0 if tint < 0 else 0.0
    return tuple(c + abs(tint) * (other - c) for c in to_rgb(colour))


def _kl_panel(panel: Axes, curves: pd.DataFrame, fits: pd.DataFrame, colour: dict, marker: dict, tint: dict) -> None:
    for model in colour:
        rows = curves[(curves["model"] == model) & (curves["sigma_dev"] > 0)]
        # A sigma that was tried for two temperatures is the same noise twice, not two realisations.
        _mean_line(panel, rows.groupby(["sigma_dev", "realisation"])["kl"].mean(), colour[model])
    for fit in fits.itertuples():
        at, target = fit.sigma_dev, fit.kl_target
        look = {"color": _tinted(colour[fit.model], tint[fit.temperature_c]), "markeredgecolor": "black"}
        panel.plot(at, target, marker[fit.temperature_c], markersize=4.5, zorder=4, **look)
        bar = [[max(at - fit.sigma_low, 0)], [max(fit.sigma_high - at, 0)]]  # NaN draws nothing
        panel.errorbar(at, target, xerr=bar, ecolor="black", elinewidth=0.9, capsize=2.5, zorder=3)
    panel.set(xlabel=r"device noise $\sigma_\mathrm{dev}$ (relative)", xscale="log", yscale="log")
    panel.grid(alpha=0.25, lw=0.5)


def _layer_panel(panel: Axes, layers: pd.DataFrame, colour: str, marker: dict, tint: dict) -> None:
    turns = sorted(set(layers["temperature_c"]))
    for (source, t), rows in layers.groupby(["source", "temperature_c"]):
        shade = _tinted(colour, tint[t])
        look = LINES[source]
        if source == "chip":  # markers of the temperatures take turns, so that they hide neither each other nor a line
            step = math.ceil(rows["layer"].nunique() / MARKERS_A_LINE)
            look = look | {"marker": marker[t], "markerfacecolor": shade, "markevery": (turns.index(t) % step, step)}
        _mean_line(panel, rows.groupby(["layer", "realisation"])["relative_error"].mean(), shade, **look)
    means = np.concatenate([line.get_ydata() for line in panel.lines])
    means = means[means > 0]
    if means.size and means.max() > 10 * means.min():
        panel.set_yscale("log")
        log_ticks(panel.yaxis)
    else:
        panel.set_ylim(bottom=0)
    panel.set_xlabel("layer index")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.25, lw=0.5)


def _mean_line(panel: Axes, values: pd.Series, shade: str | tuple[float, ...], **look) -> None:
    """The mean over realisations at each x, with its interval; values: by (x, realisation)."""
    if values.empty:
        return
    x = values.index.get_level_values(0).unique()
    mean, low, high = np.array([mean_interval(values[at]) for at in x]).T
    panel.plot(x, mean, **{"color": shade, "lw": 1.4} | look)
    panel.fill_between(x, low, high, color=shade, alpha=0.2, lw=0)


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
    shares = relative_loads(activation, CONDITIONS)
    layers, experts = shares["clean"].shape
    cold = np.asarray(cold)
    if {s.shape for s in shares.values()} != {(layers, experts)} or cold.ndim != 2 or len(cold) != layers:
        found = ", ".join(f"{c} {list(s.shape)}" for c, s in shares.items())
        raise InputError(
            f"activation: found {found}, cold {list(cold.shape)}; expected one [layers, experts], [layers, n]"
        )
    with matplotlib.rc_context(BOXED):
        figure = Figure(figsize=(11, 1.3 + 2.2 * min(1.6, max(0.8, layers / 16))), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        draw_loads(figure, panels, shares, "{}: busiest expert {:.1f}× on average")
        if cold.size:
            panels[2].scatter(cold.ravel(), np.repeat(np.arange(layers), cold.shape[1]), s=5, color=COLD_MARK, lw=0)
            panels[2].set_xlabel("expert (dot: replaced, the slot holds a copy)")
        figure.suptitle(title, fontsize=10)
        return save(figure, folder, name)


def draw_loads(figure: Figure, panels: Sequence[Axes], loads: dict[str, np.ndarray], title: str) -> None:
    """Heatmaps of relative loads on one scale, pale yellow to dark red, with its colour bar.

    title: a format of (condition, load of the busiest expert, mean over layers). The panels share their y axis.
    """
    # A few extreme experts must not wash out the rest: the scale ends at a high quantile and its tip says so.
    everything = np.concatenate([load.ravel() for load in loads.values()])
    top = max(2.0, float(np.quantile(everything, 0.995)))
    for panel, (condition, load) in zip(panels, loads.items(), strict=True):
        image = panel.imshow(load, cmap="YlOrRd", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        panel.set(title=title.format(condition, load.max(axis=1).mean()), xlabel="expert")
    panels[0].set_ylabel("MoE layer")
    panels[0].yaxis.get_major_locator().set_params(integer=True)
    ends = "max" if everything.max() > top else "neither"
    figure.colorbar(image, ax=panels, label="load (1 = balanced)", extend=ends, pad=0.01)


def relative_loads(activation: dict[str, np.ndarray], conditions: Sequence[str]) -> dict[str, np.ndarray]:
    """A_{l,i} of eq. 6 relative to a balanced layer, for each condition: float64 [layers, experts], layer means 1.

    Raises InputError for a missing condition, negative or non-finite values, or a layer without any activation.
    """
    loads = {}
    for condition in conditions:
        if condition not in activation:
            raise InputError(f"activation: found {', '.join(activation)}, expected {', '.join(conditions)}")
        a = np.asarray(activation[condition], dtype=np.float64)
        if a.ndim != 2 or not np.isfinite(a).all() or (a < 0).any() or (a.sum(axis=1) <= 0).any():
            raise InputError(
                f"activation: {condition} has shape {list(a.shape)}; expected [layers, experts] of finite numbers >= 0,"
                " not all zero in any layer"
            )
        loads[condition] = a * a.shape[1] / a.sum(axis=1, keepdims=True)
    return loads
