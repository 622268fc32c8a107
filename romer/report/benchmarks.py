"""Table 2 (benchmarks of DeepSeek-MoE, measured beside published) and figure 1 (continuations), from what stages wrote.

    table = table2(records, published.load("table2"))
    write_table2(table, "results/tables", caption2(records, "models: stand-ins"))
    figure1(rows, "results/figures", "Figure 1. ...")

`records` has the columns of `romer.report.tables.RECORD` and, of every score, stderr (over items), items, items_total,
task_version, task_hash, few_shot and lm_eval. Accuracies are shown in percent, as the paper's are here, too.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from romer.errors import InputError
from romer.report import tables
from romer.statistics import CONFIDENCE, mean_interval
from romer.store import write_atomic


@dataclass(frozen=True)
class Measure:
    """A column of table 2: heading, lm-eval's task and metric, factor to the unit shown, the paper's own column."""

    heading: str
    task: str
    metric: str
    scale: float
    published: str


MEASURES = (
    Measure("WikiText word ppl", "lm_eval:wikitext", "word_perplexity", 1, "wikitext2_ppl"),
    Measure("Wikipedia leads word ppl", "lm_eval:wikipedia_leads", "word_perplexity", 1, "wikitext2_ppl"),
    Measure("PIQA %", "lm_eval:piqa", "acc", 100, "piqa_acc"),
    Measure("ARC-C %", "lm_eval:arc_challenge", "acc", 100, "arc_challenge_acc"),
    Measure("ARC-E %", "lm_eval:arc_easy", "acc", 100, "arc_easy_acc"),
    Measure("LAMBADA ppl", "lm_eval:lambada_openai", "perplexity", 1, "lambada_ppl"),
)
QUANTITIES = ("mean", "low", "high", "realisations", "item_stderr", "difference", "difference_low", "difference_high")
NEEDED = (*tables.RECORD, "stderr", "items", "items_total", "task_version", "task_hash", "few_shot", "lm_eval")


def _rows(records: pd.DataFrame, model: str, chip: str) -> pd.DataFrame:
    """The rows of the table, checked."""
    if missing := [column for column in NEEDED if column not in records.columns]:
        raise InputError(f"records: column {missing[0]} is missing, expected {', '.join(NEEDED)}")
    names = [(m.task, m.metric) for m in MEASURES]
    shown = pd.Series(list(zip(records["task"], records["metric"], strict=True)), index=records.index).isin(names)
    rows = records[(records["model"] == model) & (records["chip"] == chip) & shown]
    if len(bad := rows[~np.isfinite(rows["value"].astype(float))]):
        where = "{task} {metric}, {method} at {temperature_c} C".format(**bad.iloc[0])
        raise InputError(f"records: {where} is {bad['value'].iloc[0]}, expected a finite number")
    for name, group in rows.groupby(["task", "metric", "temperature_c", "method"]):
        if group["realisation"].duplicated().any():
            raise InputError(f"records: {name} has a realisation more than once, expected one row each")
        if len(group["options"].unique()) != 1:
            raise InputError(f"records: {name} has options {', '.join(group['options'].unique())}, expected one set")
    for name, group in rows.groupby(["task", "metric"]):
        for column in ("task_hash", "task_version", "few_shot", "lm_eval", "items"):
            if len(values := group[column].unique()) != 1:
                raise InputError(f"records: {name} has {column} {', '.join(map(str, values))}, expected a single one")
    return rows


def _measured(rows: pd.DataFrame, vanilla: pd.DataFrame, scale: float) -> dict:
    """Mean and interval over realisations, standard error over items, and the difference to vanilla within each."""
    cell = dict.fromkeys(QUANTITIES, np.nan)
    if rows.empty:
        return cell
    values = rows.set_index("realisation")["value"].astype(float) * scale
    cell["mean"], cell["low"], cell["high"] = mean_interval(values)
    noisy = values.index.min() >= 0
    cell["realisations"] = len(values) if noisy else 0
    cell["item_stderr"] = rows["stderr"].astype(float).mean() * scale
    pairs = values.align(vanilla.set_index("realisation")["value"].astype(float) * scale, join="inner")
    if noisy and len(pairs[0]) and rows["method"].iloc[0] != "vanilla":
        differences = mean_interval(pairs[0] - pairs[1])
        cell |= dict(zip(("difference", "difference_low", "difference_high"), differences, strict=True))
    return cell


def table2(
    records: pd.DataFrame, published: pd.DataFrame, model: str = "deepseek", chip: str = "table2"
) -> pd.DataFrame:
    """One row per (temperature_c, method), in the paper's order and with the methods that only we measured after it.

    published: `romer.published.load("table2")`. Two column levels: ("", temperature_c | method | cells), then per
    measure `mean`, `low`, `high` over realisations, `realisations`, `item_stderr` (standard error over items, mean over
    realisations), `difference` to vanilla (paired, with `_low` and `_high`) and `published`. Measures that nobody
    measured are left out. Raises InputError for records that mix items, options, versions, or repeat a realisation.
    """
    rows = _rows(records, model, chip)
    measures = [m for m in MEASURES if ((rows["task"] == m.task) & (rows["metric"] == m.metric)).any()]
    if not measures:
        raise InputError(f"records: no benchmark of {model} on chip {chip}")
    printed = published.set_index(["temperature", "method"])
    methods = list(dict.fromkeys([*published["method"], *sorted(set(rows["method"]))]))
    lines = []
    for t in sorted(set(published["temperature"].astype(float)) | set(rows["temperature_c"].astype(float))):
        for method in methods:
            here = rows[(rows["temperature_c"] == t) & (rows["method"] == method)]
            paper = printed.loc[(t, method)] if (t, method) in printed.index else None
            if here.empty and paper is None:
                continue
            cells = float(here["cells"].iloc[0]) if len(here) else np.nan
            line = {("", "temperature_c"): t, ("", "method"): method, ("", "cells"): cells}
            for m in measures:
                of = rows[(rows["task"] == m.task) & (rows["metric"] == m.metric) & (rows["temperature_c"] == t)]
                vanilla = of[of["method"] == "vanilla"]
                cell = _measured(of[of["method"] == method], vanilla, m.scale)
                cell["published"] = np.nan if paper is None else round(float(paper[m.published]) * m.scale, 6)
                line |= {(m.heading, key): value for key, value in cell.items()}
            lines.append(line)
    return pd.DataFrame(lines, columns=pd.MultiIndex.from_tuples(lines[0]))


def caption2(records: pd.DataFrame, checkpoint: str, model: str = "deepseek", chip: str = "table2") -> str:
    """What table 2 shows: tasks with versions and items, shots, lm-eval's version, realisations, and the brackets."""
    rows = _rows(records, model, chip)
    used = rows.drop_duplicates("task").set_index("task")
    sets = []
    for m in MEASURES:
        if m.task in used.index:
            row = used.loc[m.task]
            number, total = int(row["items"]), int(row["items_total"])
            many = f"all {total} items" if number == total else f"the first {number} of {total} items"
            sets.append(f"{m.task.removeprefix('lm_eval:')} v{row['task_version']}, {m.metric}, {many}")
    draws = rows[rows["realisation"] >= 0].groupby(["task", "temperature_c", "method"])["realisation"].nunique()
    drawn = "no" if draws.empty else "/".join(map(str, sorted(draws.unique())))
    leads = (
        " The paper's perplexity beside the leads is WikiText-2's." if "lm_eval:wikipedia_leads" in used.index else ""
    )
    return (
        f"Table 2. Benchmarks of {model} through lm-eval {rows['lm_eval'].iloc[0]}, {rows['few_shot'].iloc[0]}-shot;"
        f" {checkpoint}. {'; '.join(sets)}. {drawn} realisations of the noise; brackets: {100 * CONFIDENCE:g} %"
        " percentile bootstrap interval of the mean over realisations; ±: standard error over items, which all methods"
        f" share.{leads} Empty: not measured, or not in the paper."
    )


def _number(value: float, decimals: int = 2) -> str:
    """As in print; perplexities of broken models in three digits."""
    return "" if pd.isna(value) else f"{value:.{decimals}f}" if abs(value) < 1e4 else f"{value:.3g}"


def _cell(row: pd.Series) -> str:
    """mean [low, high] ± standard error over items."""
    if pd.isna(row["mean"]):
        return ""
    interval = "" if pd.isna(row["low"]) else f" [{_number(row['low'])}, {_number(row['high'])}]"
    return (
        _number(row["mean"]) + interval + ("" if pd.isna(row["item_stderr"]) else f" ± {_number(row['item_stderr'])}")
    )


def write_table2(table: pd.DataFrame, folder: str | Path, caption: str) -> list[Path]:
    """table2.csv (full precision, columns `measure.quantity`), table2.md and table2.tex; returns their paths."""
    shown = pd.DataFrame(
        {
            "temperature_c": [f"{t:g}" for t in table["", "temperature_c"]],
            "method": table["", "method"],
            "cells": [_number(c) for c in table["", "cells"]],
        }
    )
    for m in (m for m in MEASURES if m.heading in table.columns):
        shown[m.heading] = [_cell(row) for _, row in table[m.heading].iterrows()]
        paper = "WikiText-2 ppl" if m.published == "wikitext2_ppl" else m.heading
        shown[f"paper {paper}"] = [_number(v, 1 if m.scale == 100 else 2) for v in table[m.heading, "published"]]
    paths = tables.write(shown, folder, "table2", caption)
    flat = table.set_axis([f"{a}.{b}" if a else b for a, b in table.columns], axis=1)
    write_atomic(Path(folder) / "table2.csv", flat.to_csv(index=False))
    return paths


STYLE = (
    "body{font:14px/1.45 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #bbb;padding:.4em .6em;text-align:left;vertical-align:top}.prompt{color:#666}"
)


def figure1(rows: Sequence[dict], folder: str | Path, caption: str) -> list[Path]:
    """fig1.html and fig1.md: a prompt a block, in it a line per noise level and method; returns their paths.

    rows: method, factor (of the operating point's σ_dev; 0: clean), sigma_dev, prompt and text, as `romer generate`
    writes them. Texts are shown as they are, escaped; line breaks as ⏎. Raises InputError for no rows.
    """
    if not rows:
        raise InputError("figure 1: no continuations")
    markdown, page = [caption, ""], []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        markdown += [f"### {_inline(prompt)} …", "", "| noise | method | continuation |", "| --- | --- | --- |"]
        page += [f"<h2>{html.escape(prompt)} …</h2>", "<table>", "<tr><th>noise<th>method<th>continuation"]
        for row in (r for r in rows if r["prompt"] == prompt):
            level = f"σ = {row['sigma_dev']:.3g} ({row['factor']:g}x)" if row["factor"] else "none"
            shown = row["text"].replace("\n", "⏎")
            markdown.append(f"| {level} | {row['method']} | {_inline(shown)} |")
            cells = f"<td>{level}<td>{html.escape(row['method'])}"
            page.append(f"<tr>{cells}<td><span class=prompt>{html.escape(prompt)}</span>{html.escape(shown)}")
        markdown.append("")
        page.append("</table>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Figure 1</title><style>{STYLE}</style>"
    texts = {"html": "\n".join([head, f"<p>{html.escape(caption)}</p>", *page, ""]), "md": "\n".join(markdown)}
    for kind, text in texts.items():
        write_atomic(Path(folder) / f"fig1.{kind}", text)
    return [Path(folder) / f"fig1.{kind}" for kind in texts]


def _inline(text: str) -> str:
    """Text that Markdown shows as it is, within one cell of a table."""
    printable = "".join(c if c.isprintable() else "�" for c in text)
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~$&" else c for c in printable)
