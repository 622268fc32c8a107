"""Table 3 and the front of perplexity against energy, from the rows of the hardware stage.

    table = table3(costs, published.load("table3"), shape="checkpoint")
    write(table, "results/tables", "table3", caption)
    front(costs, "results/figures", "front", shape="checkpoint")

costs: the concatenated cost.csv of one chip sheet and chip. What vanilla costs is compared within each realisation of
the noise; a stand-in's perplexity is not the paper's.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from romer.errors import InputError
from romer.report.style import COLOURS, STYLE, log_ticks, require, save
from romer.statistics import mean_interval

COLUMNS = tuple(
    "model method options selected realisation shape perplexity cells tokens time_s power_w energy_j".split()
)
COLUMNS += ("tile_mvms", "tiles_stored", "batch", "hardware")
MARKERS = "os^DvPX*"  # eight beside seven colours: a pair of its own for every method
# Overheads over vanilla: column of the table -> column of the costs.
OVERHEADS = {
    "extra_mvms_pct": "tile_mvms",
    "latency_pct": "time_s",
    "power_pct": "power_w",
    "energy_pct": "energy_j",
}
PAPER = {  # what the paper prints for vanilla ("noisy") and romer
    "vanilla": {"paper_latency_s": "latency_noisy_s", "paper_power_w": "power_noisy_w", "paper_ppl": "ppl_noisy"},
    "romer": {
        "paper_latency_s": "latency_romer_s",
        "paper_latency_pct": "latency_delta_pct",
        "paper_power_w": "power_romer_w",
        "paper_power_pct": "power_delta_pct",
        "paper_ppl": "ppl_romer",
    },
}
PAPER_COLUMNS = ("paper_latency_s", "paper_latency_pct", "paper_power_w", "paper_power_pct", "paper_ppl")


def _rows(costs: pd.DataFrame, shape: str) -> pd.DataFrame:
    require(costs, "costs", COLUMNS)
    rows = costs[costs["shape"] == shape]
    if rows.empty:
        found = ", ".join(sorted(set(costs["shape"])))
        raise InputError(f"costs: found shapes {found}, expected {shape}")
    for column in ("hardware", "batch"):
        if len(several := sorted(set(rows[column]))) > 1:
            raise InputError(f"costs: found {column} {', '.join(map(str, several))}, expected a single one")
    return rows


def n_of(options: str) -> float:
    """n of a row's options, NaN for methods without."""
    return float(json.loads(options).get("n_replace", np.nan))


def table3(costs: pd.DataFrame, published: pd.DataFrame, shape: str = "own") -> pd.DataFrame:
    """One row per (model, method, options): cells, overheads over vanilla in per cent, latency and energy per token,
    average power, perplexity with its interval; means over realisations. published: `romer.published.load("table3")`,
    whose numbers stand beside vanilla and romer (`selected`: not at another n than the fitted one), and alone where a
    model was not measured.

    Raises InputError for a missing column, a shape without rows, several chip sheets or batches, or a realisation
    without vanilla.
    """
    rows, table = _rows(costs, shape), []
    printed = published.set_index("model").to_dict("index")
    for model in dict.fromkeys([*published["model"], *rows["model"]]):
        here, seen = rows[rows["model"] == model], set()
        vanilla = here[here["method"] == "vanilla"].set_index("realisation")
        order = {m: i for i, m in enumerate(["vanilla", "romer_replacement", "romer_calibration", "romer"])}
        groups = sorted(here.groupby(["method", "options"], sort=False), key=lambda g: (order.get(g[0][0], 9), g[0][0]))
        for (method, options), group in groups:
            if missing := sorted(set(group["realisation"]) - set(vanilla.index)):
                raise InputError(f"costs: {model}, {method}: realisation {missing[0]} has no vanilla row")
            base = vanilla.loc[group["realisation"]].reset_index(drop=True)
            own = group.reset_index(drop=True)
            line = {"model": model, "method": method, "n_replace": n_of(options), "realisations": len(own)}
            line["cells"] = own["cells"].mean()
            line |= {key: 100 * (own[c] / base[c] - 1).mean() for key, c in OVERHEADS.items()}
            line["latency_us_per_token"] = 1e6 * (own["time_s"] / own["tokens"]).mean()
            line["power_w"] = own["power_w"].mean()
            line["energy_uj_per_token"] = 1e6 * (own["energy_j"] / own["tokens"]).mean()
            names = ("perplexity", "perplexity_low", "perplexity_high")
            line |= dict(zip(names, mean_interval(own["perplexity"]), strict=True))
            table.append(line | _paper(printed.get(model, {}), method if own["selected"].all() else ""))
            seen.add(method)
        for method in PAPER:
            if method not in seen and model in printed:
                table.append({"model": model, "method": method} | _paper(printed[model], method))
    columns = ["model", "method", "n_replace", "realisations", "cells", *OVERHEADS]
    columns += ["latency_us_per_token", "power_w", "energy_uj_per_token", "perplexity"]
    columns += ["perplexity_low", "perplexity_high", *PAPER_COLUMNS]
    return pd.DataFrame(table, columns=columns)


def _paper(printed: dict, method: str) -> dict:
    return {key: printed.get(column, np.nan) for key, column in PAPER.get(method, {}).items()}


def pareto(energy: np.ndarray, perplexity: np.ndarray) -> np.ndarray:
    """bool: points that no other point beats in one of the two without losing in the other (equal points all stay)."""
    less = (energy[:, None] <= energy) & (perplexity[:, None] <= perplexity)  # [i, j]: i is nowhere worse than j
    better = (energy[:, None] < energy) | (perplexity[:, None] < perplexity)
    return ~(less & better).any(0)


def front(
    costs: pd.DataFrame, folder: str | Path, name: str = "front", shape: str = "own", title: str = ""
) -> tuple[Path, Path]:
    """Perplexity against energy per token of every method and n, a panel a model; the line joins the Pareto front.

    Points are means over realisations, thin lines the range of perplexity. Writes `name`.png and `name`.svg in
    `folder`, returns their paths. Raises InputError as `table3` does.
    """
    rows = _rows(costs, shape).assign(uj=lambda r: 1e6 * r["energy_j"] / r["tokens"])
    models, listed = sorted(set(rows["model"])), sorted(set(rows["method"]))
    look = {m: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(listed)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(models) + 1.8, 3.2), layout="constrained")
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for panel, model in zip(panels, models, strict=True):
            points = rows[rows["model"] == model].groupby(["method", "options"], as_index=False)
            points = points.agg(
                uj=("uj", "mean"),
                least=("perplexity", "min"),
                most=("perplexity", "max"),
                perplexity=("perplexity", "mean"),
            )
            best = points[pareto(points["uj"].to_numpy(), points["perplexity"].to_numpy())].sort_values("uj")
            panel.plot(best["uj"], best["perplexity"], color="grey", lw=1, zorder=1, drawstyle="steps-post")
            for point in points.itertuples():
                colour, marker = look[point.method]
                panel.plot([point.uj] * 2, [point.least, point.most], color=colour, lw=0.8, zorder=1)
                panel.plot(point.uj, point.perplexity, marker, color=colour, markeredgecolor="black", markersize=5)
                if np.isfinite(n := n_of(point.options)):
                    panel.annotate(
                        f"{n:g}", (point.uj, point.perplexity), xytext=(4, 3), fontsize=7, textcoords="offset points"
                    )
            panel.set(title=f"{model} on {rows['hardware'].iloc[0]}", xlabel="energy per token (µJ)", xscale="log")
            log_ticks(panel.xaxis)
            panel.grid(alpha=0.25, lw=0.5)
        panels[0].set_ylabel("token perplexity")
        keys = [
            Line2D([], [], color=c, marker=m, linestyle="", markeredgecolor="black", label=k)
            for k, (c, m) in look.items()
        ]
        keys.append(Line2D([], [], color="grey", lw=1, label="Pareto front"))
        figure.legend(handles=keys, loc="outside right upper", frameon=False, title="method (number: n)")
        figure.suptitle(title, fontsize=10)
        return save(figure, folder, name)
