"""Tables 1 and 4 from long-format result rows, measured beside published.

    table = table1(records, published.load("table1"))
    write(table, "results/tables", "table1", caption(records, "Table 1.", "table1", "the held-out Wikipedia text"))

A stand-in's perplexity is not the paper's, so every row also gives what can be compared: ln(ppl / ppl_clean) and the
recovered fraction. What was not measured stays empty. `records` is a DataFrame with the columns of RECORD; clean rows
have realisation -1 and hold for every temperature.
"""

import json
from itertools import product

import numpy as np
import pandas as pd

from romer.errors import InputError
from romer.report.printing import BOUNDS, write
from romer.statistics import CONFIDENCE, RESAMPLES, mean_interval, recovered_fraction, recovered_interval

__all__ = ["caption", "measured", "only", "options_of", "perplexities", "table1", "table4", "table4_map", "write"]

RECORD = tuple("model chip temperature_c method options task metric realisation value tokens cells".split())
# The methods of the ablation, and the options that each must state.
COMPONENTS = {
    "romer_replacement": ("n_replace",),
    "romer_calibration": ("strength",),
    "romer": ("n_replace", "strength"),
}
NO_OPERATION = ("replacement_n", "", 0.0)
METRIC = "token_perplexity"
TASK = {"table1": "ppl:heldout", "table4": "ppl:ablation"}
STAND_IN = "the models are embedded stand-ins of the same architecture, not the paper's checkpoints"
NOTHING = dict.fromkeys(("mean", *BOUNDS["mean"]), np.nan) | {"realisations": 0}
NOTHING |= dict.fromkeys(("log_ratio", *BOUNDS["log_ratio"], "recovered", *BOUNDS["recovered"]), np.nan) | {"pairs": 0}
PAPER = ("published", "published_log_ratio", "published_recovered")


def perplexities(records: pd.DataFrame, task: str, chip: str | None = None) -> pd.DataFrame:
    """The perplexity rows of a task, on one chip or on all. Raises InputError for a missing column or a bad value."""
    missing = [c for c in RECORD if c not in records.columns]
    if missing:
        raise InputError(f"records: column {missing[0]} is missing, expected {', '.join(RECORD)}")
    rows = records[(records["task"] == task) & (records["metric"] == METRIC)]
    rows = rows if chip is None else rows[rows["chip"] == chip]
    bad = rows[~(np.isfinite(rows["value"].astype(float)) & (rows["value"] > 0))]
    if len(bad):
        where = "{model}, {method} at {temperature_c} C, realisation {realisation}".format(**bad.iloc[0])
        raise InputError(f"records: perplexity of {where} is {bad['value'].iloc[0]}, expected a finite positive number")
    return rows.reset_index(drop=True)


def only(rows: pd.DataFrame, column: str, what: str):
    """The one value that a column has; a mean over different texts, layouts or settings would mean nothing."""
    if len(values := rows[column].unique()) != 1:
        raise InputError(f"records: {what} has {column} {', '.join(map(str, values))}, expected a single one")
    return values[0]


def _clean(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """The model's clean row (or none). It may be repeated, say for every temperature, if its number is the same."""
    clean = rows[(rows["model"] == model) & (rows["method"] == "clean")]
    if len(clean) and not np.allclose(clean["value"], clean["value"].iloc[0], rtol=1e-3, atol=0):
        raise InputError(f"records: clean {model} has perplexities {clean['value'].unique()}, expected a single one")
    return clean.head(1)


def measured(rows: pd.DataFrame, vanilla: pd.DataFrame, clean: pd.DataFrame, what: str) -> dict:
    """One cell group: mean and interval of perplexity, of ln(ppl/clean) and of the recovered fraction.

    rows: one setting, a row per realisation; vanilla: the rows that the recovered fraction refers to; clean: a row or
    none; what: names the cell in errors. The recovered fraction is that of the mean losses over the realisations that
    vanilla has too (`pairs` of them), empty where the interval of the noise's harm reaches 0 (`recovered_interval`).
    Raises InputError for a realisation that is there twice, or several options, token counts or cells.
    """
    cell = dict(NOTHING) | {"tokens": None, "cells": np.nan}
    if rows.empty:
        return cell
    if rows["realisation"].duplicated().any():
        twice = rows.loc[rows["realisation"].duplicated(), "realisation"].iloc[0]
        raise InputError(f"records: {what} has realisation {twice} more than once, expected one row each")
    only(rows, "options", what)
    cell["tokens"], cell["cells"] = int(only(rows, "tokens", what)), float(only(rows, "cells", what))
    cell["mean"], cell["low"], cell["high"] = mean_interval(rows["value"])
    cell["realisations"] = int((rows["realisation"] >= 0).sum())
    if clean.empty:
        return cell
    only(pd.concat([rows, clean]), "tokens", f"{what}, with its clean row,")
    base = clean["value"].iloc[0]
    cell["log_ratio"], cell["log_ratio_low"], cell["log_ratio_high"] = mean_interval(np.log(rows["value"] / base))
    pairs = rows.merge(vanilla, on="realisation", suffixes=("", "_vanilla"))
    if cell["realisations"] and len(pairs):
        found = recovered_interval(base, pairs["value_vanilla"], pairs["value"])
        if not np.isnan(found[0]):
            cell["recovered"], cell["recovered_low"], cell["recovered_high"] = found
            cell["pairs"] = len(pairs)
    return cell


def _printed(clean: float | None, vanilla: float | None, method: float | None) -> dict:
    """What the paper prints for a row, and the two comparable numbers that follow from it."""
    if clean is None or method is None:
        return dict.fromkeys(PAPER, np.nan)
    recovered = np.nan if vanilla is None or method == clean else recovered_fraction(clean, vanilla, method)
    return dict(zip(PAPER, (float(method), float(np.log(method / clean)), recovered), strict=True))


def table1(records: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Perplexity per temperature, method and model: one row per (temperature_c, method), one column group per model.

    records: rows of chip table1 and task ppl:heldout are used. published: `romer.published.load("table1")`. Returns a
    frame with two column levels: ("", temperature_c | method), then per model `mean`, `low`, `high` (perplexity),
    `realisations`, `log_ratio`, `recovered` (each with `_low` and `_high`), `pairs`, `tokens`, `cells`, `published`,
    `published_log_ratio`, `published_recovered`. A pair that only one side has is empty on the other. Raises InputError
    when a cell has several settings (options), token counts, or two rows for a realisation.
    """
    rows = perplexities(records, TASK["table1"], "table1")
    models = [c for c in published.columns if c not in ("temperature", "method")]
    models += sorted(set(rows["model"]) - set(models))
    printed = published.set_index(["temperature", "method"]).to_dict("index")
    methods = list(dict.fromkeys(["clean", "vanilla", *published["method"], *sorted(set(rows["method"]))]))
    noisy = rows[rows["method"] != "clean"]
    table = []
    for t in sorted(set(published["temperature"].astype(float)) | set(noisy["temperature_c"].astype(float))):
        at = noisy[noisy["temperature_c"] == t]
        for method in methods:
            line = {("", "temperature_c"): t, ("", "method"): method}
            for model in models:
                clean, here = _clean(rows, model), at[at["model"] == model]
                chosen = clean if method == "clean" else here[here["method"] == method]
                what = f"{model}, {method} at {t:g} C"
                cell = measured(chosen, here[here["method"] == "vanilla"], clean, what)
                cell |= _printed(*(printed.get((t, m), {}).get(model) for m in ("clean", "vanilla", method)))
                line |= {(model, key): value for key, value in cell.items()}
            if any(pd.notna(line[m, c]) for m in models for c in ("mean", "published")):
                table.append(line)
    frame = pd.DataFrame(table, columns=pd.MultiIndex.from_tuples(table[0]))
    return frame.astype({(m, "tokens"): "Int64" for m in models})


def options_of(row) -> dict:
    """The options of a record. Raises InputError where they are not JSON."""
    try:
        return json.loads(row.options or "{}")
    except ValueError:
        raise InputError(f"records: options {row.options!r} of {row.method} is not JSON") from None


def _settings(row) -> tuple[float, float, str, str]:
    """(n, strength, replacement, calibration) of one record of a method of the ablation: 0 and "" where not used."""
    options = options_of(row)
    for key in COMPONENTS[row.method]:
        if key not in options:
            raise InputError(f"records: options {row.options!r} of {row.method} lacks {key}")
    acts = {key: round(float(options[key]), 6) for key in COMPONENTS[row.method]}  # others have no effect there
    n, strength = acts.get("n_replace", 0.0), acts.get("strength", 0.0)
    variants = (str(options.get(key, "")) if on else "" for key, on in (("replacement", n), ("calibration", strength)))
    return n, strength, *variants


def _ablated(row) -> tuple[str, str, float] | None:
    """(component, variant, value) of one record of a method, or None where both components act at once."""
    n, strength, replacement, calibration = _settings(row)
    if n and strength:
        return None
    if strength:
        return "calibration_lambda", calibration, strength
    return ("replacement_n", replacement, n) if n else NO_OPERATION


def table4(records: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """The ablation of qwen3: each component on its own at each setting, beside the published number.

    records: rows of model qwen3, chip table4, task ppl:ablation; `options` holds n_replace and strength, and
    replacement (split | literal) and calibration (iqr | shrink), which become the column `variant`. Rows at zero are
    the vanilla rows or, without any, a component's own rows at zero. published: `romer.published.load("table4")`.
    Returns one row per (temperature_c, component, variant, value) and the clean one, with the columns that `table1` has
    per model. Raises InputError as `table1` does, and for options that cannot be read.
    """
    rows = perplexities(records, TASK["table4"], "table4")
    rows = rows[(rows["model"] == "qwen3") & rows["method"].isin(("clean", "vanilla", *COMPONENTS))]
    clean = _clean(rows, "qwen3")
    noisy = rows[rows["method"].isin(COMPONENTS)]
    points = pd.Series([_ablated(r) for r in noisy.itertuples()], index=noisy.index, dtype=object)
    paper = {(r.temperature, r.component, r.value): r.wikitext2_ppl for r in published.itertuples()}
    paper_clean = published.loc[published["component"] == "clean", "wikitext2_ppl"].iloc[0]
    table = [
        {"temperature_c": np.nan, "component": "clean", "variant": "", "value": np.nan}
        | measured(clean, clean.head(0), clean, "clean qwen3")
        | _printed(paper_clean, None, paper_clean)
    ]
    grid = {(r.component, float(r.value)) for r in published.itertuples() if r.component != "clean"}
    found = set(points.dropna()) - {NO_OPERATION}
    temperatures = set(published.loc[published["component"] != "clean", "temperature"].astype(float))
    for t in sorted(temperatures | set(rows.loc[rows["method"] != "clean", "temperature_c"].astype(float))):
        at = rows["temperature_c"] == t
        vanilla = rows[at & (rows["method"] == "vanilla")]
        if vanilla.empty:
            vanilla = noisy[at[noisy.index] & points.isin([NO_OPERATION])]
        for component in ("replacement_n", "calibration_lambda"):
            variants = sorted({v for c, v, _ in found if c == component}, reverse=True) or [""]  # split before literal
            values = sorted({v for c, v in grid if c == component} | {v for c, _, v in found if c == component})
            for variant, value in product(variants, values):
                point = (component, variant, value)
                chosen = noisy[at[noisy.index] & points.isin([point])] if value else vanilla
                printed = (paper_clean, *(paper.get((f"{t:g}", component, v)) for v in (0, value)))
                line = {"temperature_c": t, "component": component, "variant": variant, "value": value}
                what = f"qwen3, {component} {value:g} at {t:g} C"
                table.append(line | measured(chosen, vanilla, clean, what) | _printed(*printed))
    return pd.DataFrame(table).astype({"tokens": "Int64"})


def table4_map(
    records: pd.DataFrame, published: pd.DataFrame, variants: tuple[str, str] = ("split", "iqr")
) -> pd.DataFrame:
    """Perplexity of qwen3 over n and λ together: what the paper's table 4 shows along its two axes only.

    records, published: as `table4` has them. variants: the replacement and the calibration that act. Cells with n = 0
    or λ = 0 are the components' own rows, that with both is vanilla. Returns one row per (temperature_c, n_replace,
    strength) at the temperatures where both were measured together, with the columns that `table1` has per model;
    all its cells are means over the same realisations, those that every cell of the temperature has. Empty where
    nothing was measured jointly. Raises InputError as `table4` does, and where the cells share no realisation.
    """
    rows = perplexities(records, TASK["table4"], "table4")
    rows = rows[rows["model"] == "qwen3"]
    clean, rows = _clean(rows, "qwen3"), rows[rows["method"].isin(("vanilla", *COMPONENTS))]
    cells: dict[tuple, list] = {}
    for index, row in zip(rows.index, rows.itertuples(), strict=True):
        n, strength, *used = (0.0, 0.0, "", "") if row.method == "vanilla" else _settings(row)
        alone = row.method == "vanilla" or (n and strength) or (row.method != "romer" and (n or strength))
        if alone and all(a in ("", b) for a, b in zip(used, variants, strict=True)):
            cells.setdefault((float(row.temperature_c), n, strength), []).append(index)
    paper = {(r.temperature, r.component, r.value): r.wikitext2_ppl for r in published.itertuples()}
    paper_clean = published.loc[published["component"] == "clean", "wikitext2_ppl"].iloc[0]
    table = []
    for t in sorted({t for t, n, strength in cells if n and strength}):
        at = {point: rows.loc[index] for point, index in sorted(cells.items()) if point[0] == t}
        shared = set.intersection(*(set(here["realisation"]) for here in at.values()))
        if not shared:
            raise InputError(
                f"records: the cells of qwen3's n and λ at {t:g} C share no realisation, expected at least one"
            )
        at = {point: here[here["realisation"].isin(shared)] for point, here in at.items()}
        vanilla = at.get((t, 0.0, 0.0), rows.head(0))
        for (_, n, strength), here in at.items():
            axis = ("replacement_n", n) if not strength else ("calibration_lambda", strength)
            printed = None if n and strength else paper.get((f"{t:g}", *axis))
            line = {"temperature_c": t, "n_replace": n, "strength": strength}
            line |= measured(here, vanilla, clean, f"qwen3, n {n:g} and λ {strength:g} at {t:g} C")
            table.append(line | _printed(paper_clean, paper.get((f"{t:g}", "replacement_n", 0)), printed))
    columns = ["temperature_c", "n_replace", "strength", *NOTHING, "tokens", "cells", *PAPER]
    return pd.DataFrame(table, columns=columns).astype({"tokens": "Int64"})


def caption(records: pd.DataFrame, title: str, chip: str, text: str, checkpoint: str = STAND_IN) -> str:
    """The caption of a table: what was measured, on how much text, how often, and what the brackets are.

    chip: table1 or table4; text: the name of the evaluation text; checkpoint: a clause that says what the models are.
    """
    rows = perplexities(records, TASK[chip], chip)
    drawn = rows[rows["method"] != "clean"]
    draws = drawn.groupby(["model", "temperature_c", "method", "options"])["realisation"].nunique()
    return (
        f"{title} Token perplexity on {text}, {_span(rows['tokens'])} tokens; {checkpoint}. {_span(draws)} realisations"
        f" of the noise; brackets: {100 * CONFIDENCE:g} % percentile bootstrap interval of the mean over realisations"
        f" ({RESAMPLES} resamples). Recovered: share of the mean ln(ppl vanilla / ppl clean) undone, empty where the"
        " interval of that mean reaches zero. Empty: not measured, or not in the paper."
    )


def _span(counts: pd.Series) -> str:
    if counts.empty:
        return "no"
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"
