"""Figure 3 (does routing break under noise?), what causes the harm, and table 4 as a map, as PNG and SVG.

    fig3(perturbation(records), {"clean": a, "noisy": b}, "results/figures", title="olmoe, table1 at 80 °C")
    fig3_causes(causes(records), "results/figures")
    map4(tables.table4_map(records, published.load("table4")), "results/figures")

`perturbation` and `causes` are those of `romer.report.routing_tables`.
"""

import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from romer.errors import InputError
from romer.report.figures import draw_loads, relative_loads
from romer.report.routing_tables import CAUSES
from romer.report.style import BOXED, COLOURS, STYLE, log_ticks, require, save
from romer.report.tables import only
from romer.statistics import CONFIDENCE

METHODS = {  # of the perturbation bars: the paper's words, and colours
    "clean": ("clean", COLOURS[4]),
    "vanilla": ("noisy", COLOURS[1]),
    "kb_calibration": ("naive compensation (k-b calibration)", COLOURS[5]),
}
CONDITIONS = ("clean", "noisy")
GROUPS = {"noise everywhere": COLOURS[6], "routing alone": COLOURS[0], "weights alone": COLOURS[0]}
PART = COLOURS[2]  # a cause that is in none of GROUPS: one part of the model
GAP = 0.5  # between groups of bars, in bars
MAP_LIMIT = 0.02  # of the map's colours, at least: smaller differences look alike
LINE = 40  # characters of a caption for each panel beside another
SLOT = 5.5  # at least for a model's bars, in bars: room for its name


def _draws(table: pd.DataFrame) -> str:
    """How many realisations the drawn means are over."""
    counts = sorted({int(n) for n in table["realisations"] if n})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "no"


def _bar(low: float, mean: float, high: float) -> list[list[float]]:
    """An error bar's two lengths; NaN draws nothing."""
    return [[max(mean - low, 0)], [max(high - mean, 0)]]


def fig3(
    table: pd.DataFrame, activation: dict[str, np.ndarray], folder: str | Path, name: str = "fig3", title: str = ""
) -> tuple[Path, Path]:
    """Bars of perplexity by perturbation, and the load of every expert, clean and noisy, on one colour scale.

    table: of `perturbation`; error bars are its intervals; the axis is logarithmic where the means span more than a
    decade. activation: `clean`, `noisy` -> A_{l,i} of eq. 6, [layers, experts], drawn relative to a balanced layer;
    title: which model and operating point they are of. Writes `name`.png and `name`.svg in `folder`, returns their
    paths. Raises InputError for a table without rows, a missing condition, or maps that differ in shape.
    """
    require(
        table, "perturbation", tuple("model chip temperature_c perturbed method mean low high realisations".split())
    )
    loads = relative_loads(activation, CONDITIONS)
    if len(shapes := {load.shape for load in loads.values()}) != 1:
        raise InputError(f"activation: found shapes {sorted(shapes)}, expected one [layers, experts]")
    with matplotlib.rc_context(BOXED):
        figure = Figure(figsize=(11, 3.9), layout="constrained")
        left, *maps = figure.subplots(1, 3, width_ratios=(2.1, 1, 1))
        left.spines[["top", "right"]].set_visible(False)
        _perturbation_bars(left, table)
        draw_loads(figure, maps, loads, "{}: busiest {:.1f}×")
        maps[1].sharey(maps[0])
        maps[1].tick_params(labelleft=False)
        maps[0].text(0, 1.12, title, transform=maps[0].transAxes)
        return save(figure, folder, name)


def _perturbation_bars(panel: Axes, table: pd.DataFrame) -> None:
    """Groups of bars, one per model and share; the models' names under their groups."""
    at, ticks, labels = 0.0, [], []
    methods = [m for m in METHODS if (table["method"] == m).any()]
    for model, of_model in table.groupby("model", sort=False):
        groups = list(of_model.groupby("perturbed"))
        width = len(groups) * (len(methods) + GAP) - GAP
        slot = max(width, SLOT)
        left = at + (slot - width) / 2
        for share, group in groups:
            for i, method in enumerate(methods):
                for row in group[group["method"] == method].itertuples():
                    panel.bar(left + i, row.mean, width=0.9, color=METHODS[method][1])
                    bar = _bar(row.low, row.mean, row.high)
                    panel.errorbar(left + i, row.mean, yerr=bar, ecolor="black", elinewidth=0.8, capsize=2)
            ticks.append(left + (len(methods) - 1) / 2)
            labels.append(f"{100 * share:g}")
            left += len(methods) + GAP
        look = {"ha": "center", "va": "top", "weight": "bold", "textcoords": "offset points"}
        middle = at + (slot - 1) / 2
        panel.annotate(model, (middle, 0), (0, -18), xycoords=panel.get_xaxis_transform(), **look)
        at += slot + 4 * GAP
    panel.set_xticks(ticks, labels)
    panel.tick_params(axis="x", length=0)
    chip, t = (only(table, column, "figure 3") for column in ("chip", "temperature_c"))
    panel.set_xlabel(
        "share of every token's experts drawn at random (%), by model\n"
        f"mean of {_draws(table)} realisations with {100 * CONFIDENCE:g} % interval; chip {chip} at {t:g} °C",
        labelpad=20,
    )
    panel.set_ylabel("perplexity")
    if table["mean"].max() > 10 * table["mean"].min():
        panel.set_yscale("log")
        log_ticks(panel.yaxis)
    keys = [Rectangle((0, 0), 1, 1, color=METHODS[m][1], label=METHODS[m][0]) for m in methods]
    panel.legend(handles=keys, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(keys), frameon=False)


def fig3_causes(table: pd.DataFrame, folder: str | Path, name: str = "fig3_causes") -> tuple[Path, Path]:
    """Horizontal bars of ln(ppl / ppl_clean) by cause, a panel per model, each on a scale of its own.

    table: of `causes`. Writes `name`.png and `name`.svg in `folder`, returns their paths. Raises InputError for a table
    without rows or columns, or with several operating points.
    """
    kept = ("log_ratio", "log_ratio_low", "log_ratio_high", "realisations")
    require(table, "causes", ("model", "chip", "temperature_c", "cause", *kept))
    shown = [cause for cause in CAUSES if (table["cause"] == cause).any()]
    # A gap sets the three that say where noise acts on routing apart from the parts.
    place = {cause: i + GAP * (cause not in GROUPS) for i, cause in enumerate(shown)}
    models = list(dict.fromkeys(table["model"]))
    wide = min(4, len(models))
    high = math.ceil(len(models) / wide)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 2.35 * wide, 0.9 + (0.6 + 0.24 * len(shown)) * high), layout="constrained")
        panels = figure.subplots(high, wide, sharey=True, squeeze=False)
        for panel, model in zip(panels.flat, models, strict=False):
            _cause_bars(panel, table[table["model"] == model], place)
            panel.set_title(model, weight="bold", fontsize=9)
        for panel in panels.flat[len(models) :]:
            panel.set_visible(False)
        chip, t = (only(table, column, "causes") for column in ("chip", "temperature_c"))
        words = f"ln(ppl / ppl clean); mean of {_draws(table)} realisations with {100 * CONFIDENCE:g} % interval;"
        words += f" chip {chip} at {t:g} °C; every model on a scale of its own"
        figure.supxlabel("\n".join(textwrap.wrap(words, LINE * panels.shape[1])), fontsize=9)
        return save(figure, folder, name)


def _cause_bars(panel: Axes, table: pd.DataFrame, place: dict[str, float]) -> None:
    panel.axvline(0, color="black", lw=0.8)
    largest = table["log_ratio"].abs().max()
    decimals = max(0, 1 - math.floor(math.log10(largest))) if largest > 0 else 1  # two digits of the largest
    for cause, y in place.items():
        rows = table[table["cause"] == cause]
        if rows.empty:
            words = "not measured" if cause in GROUPS else "absent or digital"
            look = {"color": "grey", "fontsize": 8, "va": "center", "textcoords": "offset points"}
            panel.annotate(words, (0, y), (4, 0), **look)
            continue
        mean, low, high = rows.iloc[0][["log_ratio", "log_ratio_low", "log_ratio_high"]]
        panel.barh(y, mean, height=0.75, color=GROUPS.get(cause, PART))
        panel.errorbar(mean, y, xerr=_bar(low, mean, high), ecolor="grey", elinewidth=1.2, capsize=2.5)
        text = f"{round(mean, decimals) + 0.0:.{decimals}f}"  # + 0.0: no -0.000
        panel.text(1.02, y, text, va="center", fontsize=8, transform=panel.get_yaxis_transform())
    panel.set_yticks(list(place.values()), list(place))
    panel.set_ylim(max(place.values()) + 0.6, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=4)
    panel.grid(axis="x", alpha=0.25, lw=0.5)


def map4(table: pd.DataFrame, folder: str | Path, name: str = "table4_map", title: str = "") -> tuple[Path, Path]:
    """Perplexity over n and λ, a panel per temperature; outlined: the two axes that the paper's table 4 prints.

    table: of `romer.report.tables.table4_map`. A cell shows its mean and, on the axes, the paper's number in brackets;
    its colour is ln(ppl / ppl_vanilla), blue where the cell is better. Writes `name`.png and `name`.svg in `folder`,
    returns their paths. Raises InputError for a table without rows, or without the vanilla cell of a temperature.
    """
    require(table, "table 4's map", ("temperature_c", "n_replace", "strength", "mean", "realisations", "published"))
    groups = list(table.groupby("temperature_c"))
    n, strength = (sorted(set(table[column])) for column in ("n_replace", "strength"))
    with matplotlib.rc_context(BOXED):
        size = (1.6 + 0.85 * len(strength) * len(groups), 1.5 + 0.5 * len(n))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        ratios = [_ratios(cells, n, strength) for _, cells in groups]
        everything = np.abs(np.concatenate([r[np.isfinite(r)] for r in ratios]))
        # A few extreme cells must not wash out the rest.
        limit = max(MAP_LIMIT, float(np.quantile(everything, 0.75)))
        for panel, (t, cells), ratio in zip(panels, groups, ratios, strict=True):
            colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            image = panel.imshow(ratio, aspect="auto", interpolation="nearest", **colours)
            _map_text(panel, cells, n, strength, np.abs(ratio) > 0.6 * limit)
            panel.set_title(f"{t:g} °C, mean of the same {_draws(cells)} realisations", fontsize=9)
        panels[0].set_ylabel("experts replaced per layer, n")
        ends = "both" if everything.max() > limit else "neither"
        figure.colorbar(image, ax=panels, label="ln(ppl / ppl vanilla)", extend=ends, pad=0.02)
        figure.suptitle(title, fontsize=10)
        return save(figure, folder, name)


def _ratios(cells: pd.DataFrame, n: list, strength: list) -> np.ndarray:
    """ln(ppl / ppl_vanilla) by n and λ, NaN where not measured: float64 [len(n), len(strength)]."""
    vanilla = cells[(cells["n_replace"] == 0) & (cells["strength"] == 0)]
    if len(vanilla) != 1:
        t = cells["temperature_c"].iloc[0]
        raise InputError(f"table 4's map: found {len(vanilla)} cells with n = 0 and λ = 0 at {t:g} C, expected one")
    grid = np.full((len(n), len(strength)), np.nan)
    for row in cells.itertuples():
        grid[n.index(row.n_replace), strength.index(row.strength)] = math.log(row.mean / vanilla["mean"].iloc[0])
    return grid


def _map_text(panel: Axes, cells: pd.DataFrame, n: list, strength: list, dark: np.ndarray) -> None:
    for row in cells.itertuples():
        x, y = strength.index(row.strength), n.index(row.n_replace)
        look = {"ha": "center", "va": "center", "color": "white" if dark[y, x] else "black"}
        printed = pd.notna(row.published)
        panel.text(x, y - 0.15 * printed, f"{row.mean:.2f}", **look)
        if printed:
            panel.text(x, y + 0.22, f"({row.published:.2f})", fontsize=7, **look)
    panel.set_facecolor("lightgrey")  # not measured
    outline = {"fill": False, "edgecolor": "black", "lw": 1.8, "clip_on": False, "zorder": 4}
    panel.add_patch(Rectangle((-0.5, -0.5), len(strength), 1, **outline))
    panel.add_patch(Rectangle((-0.5, -0.5), 1, len(n), **outline))
    panel.set_xticks(range(len(strength)), [f"{s:g}" for s in strength])
    panel.set_yticks(range(len(n)), [f"{i:g}" for i in n])
    panel.set_xlabel("strength of the router calibration, λ\n(outlined: the paper's two axes, its numbers in brackets)")
