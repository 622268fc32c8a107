"""A table as CSV, Markdown and LaTeX: full precision in the CSV, readable cells in the other two.

write(table1(records, published.load("table1")), "results/tables", "table1", "Table 1. ...")
"""

import re
from pathlib import Path

import pandas as pd

from romer.store import write_atomic

# The columns that hold a number's interval; printed, they stand in brackets behind it.
BOUNDS = {q: (f"{q}_low", f"{q}_high") for q in ("log_ratio", "recovered", "difference")} | {"mean": ("low", "high")}
HEADING = {
    "temperature_c": "T (C)",
    "mean": "measured",
    "realisations": "draws",
    "log_ratio": "ln(ppl/clean)",
    "published": "paper",
    "published_log_ratio": "paper ln(ppl/clean)",
    "published_recovered": "paper recovered",
    "n_replace": "n",
    "strength": "λ",
    "difference": "difference of ln(ppl)",
    "t_p": "t-test p",
    "t_p_holm": "t-test p, Holm",
    "wilcoxon_p": "Wilcoxon p",
    "wilcoxon_p_holm": "Wilcoxon p, Holm",
    "cells_against": "cells of the other",
}
DECIMALS = {"mean": 2, "published": 2}  # as the paper prints perplexity; everything else in three
WHOLE = ("realisations", "pairs", "tokens", "window", "evaluations", "n_replace", "adc_bits", "parameters")
WHOLE += ("piqa_items",)
SHORTEST = ("temperature_c", "value", "strength", "perturbed", "cells", "cells_against")
P_VALUES = ("t_p", "t_p_holm", "wilcoxon_p", "wilcoxon_p_holm")
SIGNIFICANT = ("sigma_dev", "sigma_low", "sigma_high", *P_VALUES)  # in three digits: they span decades
# Of each model's columns, those that are printed; the CSV has all.
PRINTED = ("mean", *BOUNDS["mean"], "realisations", "recovered", *BOUNDS["recovered"])
PRINTED += ("published", "published_recovered", "cells")


def _text(value, key: str) -> str:
    """A value as the printed tables show it."""
    if pd.isna(value):
        return ""
    if isinstance(value, str):
        return value
    if key in WHOLE:
        return str(int(value))
    if key in SIGNIFICANT:
        return f"{value:.3g}"
    decimals = DECIMALS.get(key, 3)
    return f"{value:g}" if key in SHORTEST else f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no -0.000


def _printable(table: pd.DataFrame) -> list[list[str]]:
    """Header and lines of text: intervals join their number in brackets, headings are the printed ones."""
    hidden = {bound for bounds in BOUNDS.values() for bound in bounds}
    keys = [c for c in table.columns if c not in hidden]
    lines = [[HEADING.get(key, key) for key in keys]]
    for _, row in table.iterrows():
        line = []
        for key in keys:
            cell = _text(row[key], key)
            if key in BOUNDS and pd.notna(row[BOUNDS[key][0]]):
                cell += " [{}, {}]".format(*(_text(row[bound], key) for bound in BOUNDS[key]))
            line.append(cell)
        lines.append(line)
    return lines


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"λ": r"\ensuremath{\lambda}", "σ": r"\ensuremath{\sigma}", "°": r"\textdegree{}"}
    return re.sub(r"[\\~^&%$#_{}λσ°]", lambda m: special.get(m[0], "\\" + m[0]), text)


def _latex(lines: list[list[str]], caption: str, label: str) -> str:
    """A booktabs table, scaled to the page's width (packages booktabs and graphicx)."""
    body = [" & ".join(map(_escape, line)) + r" \\" for line in lines]
    top = [r"\begin{table}", r"\centering", rf"\caption{{{_escape(caption)}}}", rf"\label{{tab:{label}}}"]
    top += [r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{{'l' * len(lines[0])}}}", r"\toprule", body[0]]
    return "\n".join([*top, r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""])


def write(table: pd.DataFrame, folder: str | Path, name: str, caption: str) -> list[Path]:
    """Write `name`.csv (full precision), `name`.md and `name`.tex, each atomically; returns their paths.

    A table with two column levels becomes one CSV with columns `model.quantity`, and one printed table per model with
    the columns PRINTED: perplexity, number of realisations, recovered fraction, the paper's two numbers, cells.
    """
    if table.columns.nlevels == 2:
        flat = table.set_axis([f"{a}.{b}" if a else b for a, b in table.columns], axis=1)
        models = [m for m in table.columns.get_level_values(0).unique() if m]
        keys = [q for a, q in table.columns if not a]
        blocks = {m: table[["", m]].droplevel(0, axis=1)[[*keys, *PRINTED]] for m in models}
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
