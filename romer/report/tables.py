"""Tables 1 and 4 from long-format result rows, measured beside published, as CSV, Markdown and LaTeX.

    table = table1(records, published.load("table1"))
    write(table, "results/tables", "table1", caption("Table 1.", records, "table1", "the held-out Wikipedia text"))

A stand-in's perplexity is not the paper's, so every row also gives what can be compared: ln(ppl / ppl_clean) and the
recovered fraction. What was not measured stays empty. `records` is a DataFrame with the columns of RECORD; clean rows
have realisation -1 and hold for every temperature.
"""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from romer.errors import InputError
from romer.statistics import CONFIDENCE, RESAMPLES, mean_interval, recovered_fraction
from romer.store import write_atomic

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
SPREAD = {q: (f"{q}_low", f"{q}_high") for q in ("log_ratio", "recovered")} | {"mean": ("low", "high")}
NOTHING = dict.fromkeys(("mean", *SPREAD["mean"]), np.nan) | {"realisations": 0}
NOTHING |= dict.fromkeys(("log_ratio", *SPREAD["log_ratio"], "recovered", *SPREAD["recovered"]), np.nan) | {"pairs": 0}
PAPER = ("published", "published_log_ratio", "published_recovered")
HEADING = {
    "temperature_c": "T (C)",
    "mean": "measured",
    "realisations": "draws",
    "log_ratio": "ln(ppl/clean)",
    "published": "paper",
    "published_log_ratio": "paper ln(ppl/clean)",
    "published_recovered": "paper recovered",
}
DECIMALS = {"mean": 2, "published": 2}  # as the paper prints perplexity; everything else in three
WHOLE = ("realisations", "pairs", "tokens")
SHORTEST = ("temperature_c", "value", "cells")


def _rows(records: pd.DataFrame, chip: str) -> pd.DataFrame:
    """The perplexity rows of one table, checked."""
    missing = [c for c in RECORD if c not in records.columns]
    if missing:
        raise InputError(f"records: column {missing[0]} is missing, expected {', '.join(RECORD)}")
    rows = records[(records["chip"] == chip) & (records["task"] == TASK[chip]) & (records["metric"] == METRIC)]
    bad = rows[~(np.isfinite(rows["value"].astype(float)) & (rows["value"] > 0))]
    if len(bad):
        where = "{model}, {method} at {temperature_c} C, realisation {realisation}".format(**bad.iloc[0])
        raise InputError(f"records: perplexity of {where} is {bad['value'].iloc[0]}, expected a finite positive number")
    return rows


def _only(rows: pd.DataFrame, column: str, what: str):
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


def _measured(rows: pd.DataFrame, vanilla: pd.DataFrame, clean: pd.DataFrame, what: str) -> dict:
    """One cell group: mean and interval of perplexity, of ln(ppl/clean) and of the recovered fraction.

    The recovered fraction is formed within each realisation that vanilla has too (`pairs` of them), then averaged.
    """
    cell = dict(NOTHING) | {"tokens": None, "cells": np.nan}
    if rows.empty:
        return cell
    if rows["realisation"].duplicated().any():
        twice = rows.loc[rows["realisation"].duplicated(), "realisation"].iloc[0]
        raise InputError(f"records: {what} has realisation {twice} more than once, expected one row each")
    _only(rows, "options", what)
    cell["tokens"], cell["cells"] = int(_only(rows, "tokens", what)), float(_only(rows, "cells", what))
    cell["mean"], cell["low"], cell["high"] = mean_interval(rows["value"])
    noisy = rows["method"].iloc[0] != "clean"
    cell["realisations"] = len(rows) if noisy else 0
    if clean.empty:
        return cell
    _only(pd.concat([rows, clean]), "tokens", f"{what}, with its clean row,")
    base = clean["value"].iloc[0]
    cell["log_ratio"], cell["log_ratio_low"], cell["log_ratio_high"] = mean_interval(np.log(rows["value"] / base))
    pairs = rows.merge(vanilla, on="realisation", suffixes=("", "_vanilla"))
    fractions = recovered_fraction(base, pairs["value_vanilla"], pairs["value"])
    if noisy and len(pairs) and np.isfinite(fractions).all():
        cell["recovered"], cell["recovered_low"], cell["recovered_high"] = mean_interval(fractions)
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
    rows = _rows(records, "table1")
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
                cell = _measured(chosen, here[here["method"] == "vanilla"], clean, what)
                cell |= _printed(*(printed.get((t, m), {}).get(model) for m in ("clean", "vanilla", method)))
                line |= {(model, key): value for key, value in cell.items()}
            if any(pd.notna(line[m, c]) for m in models for c in ("mean", "published")):
                table.append(line)
    frame = pd.DataFrame(table, columns=pd.MultiIndex.from_tuples(table[0]))
    return frame.astype({(m, "tokens"): "Int64" for m in models})


def _ablated(row) -> tuple[str, str, float] | None:
    """(component, variant, value) of one record of a method, or None where both components act at once."""
    try:
        options = json.loads(row.options or "{}")
    except ValueError:
        raise InputError(f"records: options {row.options!r} of {row.method} is not JSON") from None
    for key in COMPONENTS[row.method]:
        if key not in options:
            raise InputError(f"records: options {row.options!r} of {row.method} lacks {key}")
    acts = {key: round(float(options[key]), 6) for key in COMPONENTS[row.method]}  # others have no effect there
    n, strength = acts.get("n_replace", 0.0), acts.get("strength", 0.0)
    if n and strength:
        return None
    if strength:
        return "calibration_lambda", str(options.get("calibration", "")), strength
    return ("replacement_n", str(options.get("replacement", "")), n) if n else NO_OPERATION


def table4(records: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """The ablation of qwen3: each component on its own at each setting, beside the published number.

    records: rows of model qwen3, chip table4, task ppl:ablation; `options` holds n_replace and strength, and
    replacement (split | literal) and calibration (iqr | shrink), which become the column `variant`. Rows at zero are
    the vanilla rows or, without any, a component's own rows at zero. published: `romer.published.load("table4")`.
    Returns one row per (temperature_c, component, variant, value) and the clean one, with the columns that `table1` has
    per model. Raises InputError as `table1` does, and for options that cannot be read.
    """
    rows = _rows(records, "table4")
    rows = rows[(rows["model"] == "qwen3") & rows["method"].isin(("clean", "vanilla", *COMPONENTS))]
    clean = _clean(rows, "qwen3")
    noisy = rows[rows["method"].isin(COMPONENTS)]
    points = pd.Series([_ablated(r) for r in noisy.itertuples()], index=noisy.index, dtype=object)
    paper = {(r.temperature, r.component, r.value): r.wikitext2_ppl for r in published.itertuples()}
    paper_clean = published.loc[published["component"] == "clean", "wikitext2_ppl"].iloc[0]
    table = [
        {"temperature_c": np.nan, "component": "clean", "variant": "", "value": np.nan}
        | _measured(clean, clean.head(0), clean, "clean qwen3")
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
                table.append(line | _measured(chosen, vanilla, clean, what) | _printed(*printed))
    return pd.DataFrame(table).astype({"tokens": "Int64"})


def caption(records: pd.DataFrame, title: str, chip: str, text: str, checkpoint: str = STAND_IN) -> str:
    """The caption of a table: what was measured, on how much text, how often, and what the brackets are.

    chip: table1 or table4; text: the name of the evaluation text; checkpoint: a clause that says what the models are.
    """
    rows = _rows(records, chip)
    drawn = rows[rows["method"] != "clean"]
    draws = drawn.groupby(["model", "temperature_c", "method", "options"])["realisation"].nunique()
    return (
        f"{title} Token perplexity on {text}, {_span(rows['tokens'])} tokens; {checkpoint}. {_span(draws)} realisations"
        f" of the noise; brackets: {100 * CONFIDENCE:g} % percentile bootstrap interval of the mean over realisations"
        f" ({RESAMPLES} resamples). Recovered: share of ln(ppl vanilla / ppl clean) undone, within each realisation."
        " Empty: not measured, or not in the paper."
    )


def _span(counts: pd.Series) -> str:
    if counts.empty:
        return "no"
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _text(value, key: str) -> str:
    """A value as the printed tables show it."""
    if pd.isna(value):
        return ""
    if isinstance(value, str):
        return value
    if key in WHOLE:
        return str(int(value))
    decimals = DECIMALS.get(key, 3)
    return f"{value:g}" if key in SHORTEST else f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no -0.000


def _printable(table: pd.DataFrame) -> list[list[str]]:
    """Header and lines of text: intervals join their number in brackets, headings are the printed ones."""
    hidden = {bound for bounds in SPREAD.values() for bound in bounds}
    keys = [c for c in table.columns if c not in hidden]
    lines = [[HEADING.get(key, key) for key in keys]]
    for _, row in table.iterrows():
        line = []
        for key in keys:
            cell = _text(row[key], key)
            if key in SPREAD and pd.notna(row[SPREAD[key][0]]):
                cell += " [{}, {}]".format(*(_text(row[bound], key) for bound in SPREAD[key]))
            line.append(cell)
        lines.append(line)
    return lines


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda m: special.get(m[0], "\\" + m[0]), text)


def _latex(lines: list[list[str]], caption: str, label: str) -> str:
    """A booktabs table, scaled to the page's width (packages booktabs and graphicx)."""
    body = [" & ".join(map(_escape, line)) + r" \\" for line in lines]
    top = [r"\begin{table}", r"\centering", rf"\caption{{{_escape(caption)}}}", rf"\label{{tab:{label}}}"]
    top += [r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{{'l' * len(lines[0])}}}", r"\toprule", body[0]]
    return "\n".join([*top, r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""])


def write(table: pd.DataFrame, folder: str | Path, name: str, caption: str) -> list[Path]:
    """Write `name`.csv (full precision), `name`.md and `name`.tex, each atomically; returns their paths.

    A table with two column levels becomes one CSV with columns `model.quantity`, and one printed table per model.
    """
    if table.columns.nlevels == 2:
        flat = table.set_axis([f"{a}.{b}" if a else b for a, b in table.columns], axis=1)
        models = [m for m in table.columns.get_level_values(0).unique() if m]
        blocks = {m: table[["", m]].droplevel(0, axis=1) for m in models}
    else:
        flat, blocks = table, {"": table}
    markdown, latex = [f"{caption}\n"], []
    for model, block in blocks.items():
        lines = _printable(block)
        if model:
            markdown.append(f"### {model}\n")
        markdown += ["| " + " | ".join(lines[0]) + " |", "| --- " * len(lines[0]) + "|"]
        markdown += ["| " + " | ".join(line) + " |" for line in lines[1:]] + [""]
        title = f"{caption} Model: {model}." if model else caption
        latex.append(_latex(lines, title, f"{name}-{model}" if model else name))
    texts = {"csv": flat.to_csv(index=False), "md": "\n".join(markdown), "tex": "\n".join(latex)}
    for kind, text in texts.items():
        write_atomic(Path(folder) / f"{name}.{kind}", text)
    return [Path(folder) / f"{name}.{kind}" for kind in texts]
