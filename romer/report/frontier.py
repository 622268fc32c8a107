"""What methods take back for which cells, digital numbers and energy: a table and the picture that a designer needs.

    table = taken_back(records, costs)
    write(table, "results/tables", "frontier", CAPTION)
    picture(table, "results/figures", "frontier")

`records` and `costs` are those of the frontier stage, `costs` with a column `model`.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from romer.errors import InputError
from romer.noise import CLEAN, mirror
from romer.report.style import COLOURS, STYLE, require, save
from romer.report.tables import RECORD, measured, options_of, perplexities
from romer.statistics import paired

EXPERIMENTS = ("methods", "budget", "read", "scaled", "limits", "chips", "drift")
CONDITIONS = ("scale", "celsius", "seconds", "noise_in")  # of a record's options: where it was measured, not what
ORIGINS = {"fitted_on": "ranks of {}", "routing": "{} routing"}  # of a record's options: what was not its own
LOWEST, HIGHEST = -1.0, 1.5  # recovered fractions that the picture shows; what lies below is named
PAPER = ("romer", "romer_replacement", "romer_calibration")  # the paper's own methods
CAPTION = (
    "Recovered: share of the noise's ln(ppl) that a method takes back, with its interval over realisations. side:"
    " digital numbers beside the arrays, as a share of the analog weights; cells and energy as multiples of vanilla's;"
    " p: two-sided paired t-tests of ln(ppl), not corrected, against the average of two copies and against the best of"
    " the paper's methods at that place. Empty where the interval of the noise's harm reaches zero."
)
COLUMNS = "experiment model chip temperature_c where method setting mean low high realisations recovered recovered_low"
COLUMNS = f"{COLUMNS} recovered_high cells side digital operations readbacks energy p_average p_paper tokens".split()
LOOK = {
    "vanilla": ("vanilla", COLOURS[6], "x"),
    "average": ("average of copies", COLOURS[1], "s"),
    "weight_remapping": ("weight remapping", COLOURS[5], "D"),
    "romer": ("ROMER", COLOURS[3], "v"),
    "romer_replacement": ("ROMER: replacement alone", COLOURS[3], "<"),
    "romer_calibration": ("ROMER: calibration alone", COLOURS[3], ">"),
    "bit_slicing": ("bit slicing", COLOURS[6], "H"),
    "kb_calibration": ("k-b calibration", COLOURS[4], "d"),
    "digital_router": ("digital router", COLOURS[5], "p"),
    "digital_experts": ("digital experts", COLOURS[2], "X"),
    "channel_affine": ("channel affine", COLOURS[4], "^"),
    "compensated_programming": ("compensated programming", COLOURS[2], "P"),
    "low_rank": ("low-rank paths", "#56606b", "o"),
    "projection": ("projection", "#7f3c8d", "h"),
    "outliers": ("outliers", "#b07aa1", "8"),
    "romer_plus": ("romer_plus", COLOURS[0], "*"),
}


def _split(options: dict) -> tuple[dict, dict]:
    """(where, what) of a record's options."""
    return {k: v for k, v in options.items() if k in CONDITIONS}, {
        k: v for k, v in options.items() if k not in (*CONDITIONS, *ORIGINS)
    }


def _words(where: dict) -> str:
    found = [f"{where['scale']:g} x noise"] if "scale" in where else []
    found += [f"{where['seconds']:g} s after programming"] if "seconds" in where else []
    return ", ".join(found + ([f"noise in {where['noise_in']} alone"] if "noise_in" in where else []))


def _origin(options: dict) -> str:
    """Whose ranks, and whose routing, where they are not the model's own at that place."""
    return ", ".join(words.format(options[key]) for key, words in ORIGINS.items() if key in options)


def taken_back(records: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """One row per experiment, place, method and setting: perplexity, recovered fraction, what it costs.

    records: rows of the tasks `ppl:<experiment>`; costs: model, chip, method and options as of records, cells, side,
    digital, operations, readbacks, energy_j. Raises InputError for a model without its clean row, a place without
    vanilla, or a setting that was not priced.
    """
    priced = {(r.model, r.chip, r.method, r.options): r for r in costs.itertuples()}
    table, methods = [], folded(perplexities(records, "ppl:methods"))
    for experiment in EXPERIMENTS:
        rows = folded(perplexities(records, f"ppl:{experiment}"))
        rows = rows[rows["method"] != "clean"]
        if rows.empty:
            continue
        parts = [_split(options_of(row)) for row in rows.itertuples()]
        rows = rows.assign(
            where=[json.dumps(where, sort_keys=True) for where, _ in parts],
            what=[json.dumps(what, sort_keys=True) for _, what in parts],
            origin=[_origin(options_of(row)) for row in rows.itertuples()],
        )
        for (model, chip, t, where), here in rows.groupby(["model", "chip", "temperature_c", "where"], sort=False):
            clean = methods[(methods["model"] == model) & (methods["method"] == "clean")].head(1)
            vanilla = here[(here["method"] == "vanilla") & (here["origin"] == "")]
            if vanilla.empty and experiment in ("read", "limits") and where == "{}":
                at = (methods["model"] == model) & (methods["chip"] == chip) & (methods["temperature_c"] == t)
                vanilla = methods[at & (methods["method"] == "vanilla")]
            if clean.empty or vanilla.empty:
                raise InputError(f"records: {model}, ppl:{experiment} on {chip} {where} has no clean or no vanilla row")
            if (plain := priced.get((model, chip, "vanilla", vanilla["options"].iat[0]))) is None:
                raise InputError(f"costs: {model}, vanilla on {chip} {where} was not priced")
            others = {"p_average": here[(here["method"] == "average") & (here["what"] == '{"copies": 2}')]}
            papers = here[here["method"].isin(PAPER)]
            best = papers.groupby("method")["value"].mean().idxmin() if len(papers) else None
            others["p_paper"] = papers[papers["method"] == best]
            for (method, what, origin), group in here.groupby(["method", "what", "origin"], sort=False):
                if (cost := priced.get((model, chip, method, group["options"].iat[0]))) is None:
                    raise InputError(f"costs: {model}, {method} {what} on {chip} {where} was not priced")
                cell = measured(group, vanilla, clean, f"{model}, {method} {what} on {chip} {where}")
                line = {"experiment": experiment, "model": model, "chip": chip, "temperature_c": t}
                line |= {"where": _words(json.loads(where)), "method": method}
                line["setting"] = _setting(json.loads(what), origin)
                line |= {key: cell[key] for key in COLUMNS if key in cell}
                line |= {key: getattr(cost, key) for key in ("cells", "side", "digital", "operations", "readbacks")}
                line["energy"] = cost.energy_j / plain.energy_j
                for column, other in others.items():
                    both = group.merge(other, on="realisation", suffixes=("", "_other"))
                    tested = len(both) > 1 and method not in set(other["method"])
                    own, against = np.log(both["value"]), np.log(both["value_other"])
                    line[column] = paired(own, against).t_p if tested else np.nan
                table.append(line)
    return pd.DataFrame(table, columns=COLUMNS)


def folded(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with each antithetic pair, a realisation and its mirror image, as one: that of its mean ln(ppl). Raises
    InputError for a row whose counterpart is missing, where there are pairs."""
    if not (rows["realisation"] < CLEAN).any():
        return rows
    pair = rows["realisation"].where(rows["realisation"] >= CLEAN, mirror(rows["realisation"]))
    groups = rows.assign(realisation=pair, value=np.log(rows["value"])).groupby(
        [column for column in RECORD if column != "value"], sort=False, dropna=False
    )
    found = groups["value"].agg(["mean", "size"]).reset_index()
    if len(alone := found[(found["size"] != 2) & (found["realisation"] != CLEAN)]):
        where = "{model}, {method} {options} on {chip}, realisation {realisation}".format(**alone.iloc[0])
        raise InputError(f"records: {where} is there without its mirror image, or twice")
    return found.assign(value=np.exp(found["mean"]))[list(RECORD)]


def _setting(what: dict, origin: str) -> str:
    return ", ".join([f"{key}={value}" for key, value in what.items()] + ([origin] if origin else []))


def picture(table: pd.DataFrame, folder: str | Path, name: str = "frontier") -> tuple[Path, Path]:
    """Recovered fraction against digital numbers, cells and energy, a column a model that lost anything.

    table: of `taken_back`. Writes `name`.png and `name`.svg in `folder`, returns their paths. Raises InputError for a
    table without rows.
    """
    require(table, "frontier", ("experiment", "model", "method", "recovered", "side", "cells", "energy"))
    shown = table[table["experiment"].isin(("methods", "budget")) & table["recovered"].notna()]
    models = list(dict.fromkeys((shown if len(shown) else table)["model"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.8 + 2.9 * len(models), 7.2), layout="constrained")
        panels = figure.subplots(3, len(models), sharey="col", squeeze=False)
        for column, model in zip(panels.T, models, strict=True):
            rows = shown[shown["model"] == model]
            _budget(column[0], rows[rows["experiment"] == "budget"])
            for panel, key in ((column[1], "cells"), (column[2], "energy")):
                for method, group in rows.groupby("method", sort=False):
                    _, colour, marker = LOOK.get(method, (method, "grey", "o"))
                    _points(panel, group[key], group, colour, marker)
                hidden = rows[rows["recovered"] < LOWEST].sort_values("recovered")
                for line, row in enumerate(hidden.itertuples()):
                    whose, colour, _ = LOOK.get(row.method, (row.method, "grey", "o"))
                    at, place = (0.98, 0.02 + 0.07 * line), {"xycoords": "axes fraction", "ha": "right"}
                    panel.annotate(f"{whose} {row.recovered:.1f}, below", at, fontsize=7, color=colour, **place)
            column[0].set_title(model, weight="bold", fontsize=9)
            for panel, label in zip(
                column, ("digital share (%)", "cells (× vanilla)", "energy (× vanilla)"), strict=True
            ):
                panel.set_xlabel(label)
                panel.axhline(0, color="black", lw=0.8)
                panel.axhline(1, color="grey", lw=0.8, ls=":")
                panel.grid(alpha=0.25, lw=0.5)
                low, high = panel.get_ylim()
                panel.set_ylim(max(LOWEST, low), min(HIGHEST, high))
        for panel in panels[:, 0]:
            panel.set_ylabel("recovered fraction")
        present = [m for m in LOOK if (table["method"] == m).any()]
        keys = [Line2D([], [], color=LOOK[m][1], marker=LOOK[m][2], ls="", label=LOOK[m][0]) for m in present]
        figure.legend(handles=keys, loc="outside right upper", frameon=False)
        return save(figure, folder, name)


def places(table: pd.DataFrame, folder: str | Path, name: str = "frontier_chips") -> tuple[Path, Path] | None:
    """Recovered fraction of every method at every place, a panel a model: the operating point, chips with errors of
    their own, and these later on; hollow where ranks are those of the operating point.

    table: of `taken_back`. Writes `name`.png and `name`.svg in `folder`, returns their paths; None where there is no
    place but the operating point.
    """
    shown = table[table["experiment"].isin(("methods", "chips", "drift")) & table["recovered"].notna()]
    shown = shown[(shown["method"] != "vanilla") & ~shown["setting"].str.contains("refit=False")]
    chips = table.loc[table["experiment"].isin(("chips", "drift")), "method"]
    shown = shown[shown["method"].isin(chips)]
    if not len(chips):
        return None
    where = shown["chip"] + "\n" + shown["temperature_c"].map("{:g} °C".format)
    shown = shown.assign(place=where + shown["where"].map(lambda words: f"\n{words}" if words else ""))
    at, methods = list(dict.fromkeys(shown["place"])), [m for m in LOOK if (shown["method"] == m).any()]
    with matplotlib.rc_context(STYLE):
        models = list(dict.fromkeys(shown["model"]))
        figure = Figure(figsize=(9.5, 0.8 + 1.7 * len(models)), layout="constrained")
        for panel, model in zip(figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0], models, strict=True):
            rows = shown[shown["model"] == model]
            for offset, method in enumerate(methods):
                _, colour, marker = LOOK[method]
                for moved, group in rows[rows["method"] == method].groupby(rows["setting"].str.contains("ranks of")):
                    x = (
                        group["place"].map(at.index)
                        + 0.13 * (offset - len(methods) / 2)
                        + 0.13 * moved * len(methods) / 2
                    )
                    _points(panel, x, group, colour, marker, "none" if moved else colour)
            panel.set_title(model, weight="bold", fontsize=9)
            panel.set_ylabel("recovered")
            panel.set_ylim(max(LOWEST, panel.get_ylim()[0]), 1.1)
            panel.axhline(0, color="black", lw=0.8)
            panel.axhline(1, color="grey", lw=0.8, ls=":")
            panel.grid(alpha=0.25, lw=0.5, axis="y")
        panel.set_xticks(range(len(at)), at)
        keys = [Line2D([], [], color=LOOK[m][1], marker=LOOK[m][2], ls="", label=LOOK[m][0]) for m in methods]
        figure.legend(handles=keys, loc="outside right upper", frameon=False)
        return save(figure, folder, name)


def _budget(panel: Axes, rows: pd.DataFrame) -> None:
    """Curves over digital share; copies as level lines."""
    for method in ("low_rank", "projection", "romer_plus"):
        group = rows[rows["method"] == method].sort_values("side")
        if len(group):
            _, colour, marker = LOOK[method]
            panel.plot(100 * group["side"], group["recovered"], color=colour, lw=1)
            _points(panel, 100 * group["side"], group, colour, marker)
    for number, row in enumerate(rows[rows["method"] == "average"].itertuples()):
        panel.axhline(row.recovered, color=LOOK["average"][1], lw=1, ls="--")
        at = (1 - 0.22 * number, row.recovered)  # side by side, as levels may be close
        panel.annotate(f"{row.cells:g}× cells", at, (-2, 2), xycoords=panel.get_yaxis_transform(), ha="right",
                       fontsize=7, color=LOOK["average"][1], textcoords="offset points")  # fmt: skip


def _points(panel: Axes, x: pd.Series, rows: pd.DataFrame, colour: str, marker: str, face: str | None = None) -> None:
    low, high = (
        (rows[c].fillna(rows["recovered"]) - rows["recovered"]).abs() for c in ("recovered_low", "recovered_high")
    )
    panel.errorbar(x, rows["recovered"], yerr=[low, high], fmt=marker, color=colour, mfc=face or colour, ms=5,
                   elinewidth=0.8, capsize=2)  # fmt: skip
