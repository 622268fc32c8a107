"""The numbers that the ROMER paper prints, as tables, and the noise level that each of its vanilla rows implies.

    load("table1")                          # the table as it is printed, a DataFrame
    kl_target("table1", "olmoe", 80)        # ln(13.13 / 10.48) nats per token
    temperatures("table4", "qwen3")         # (25.0, 45.0, 65.0, 85.0)

The tables disagree about the noise at one temperature by up to ten times, so each is a chip of its own.
"""

import math
from importlib.resources import files

import pandas as pd

from romer.errors import InputError

TABLES = ("table1", "table2", "table3", "table4")


def load(table: str) -> pd.DataFrame:
    """The published table, one row a printed row, columns named as in its CSV file.

    table1: temperature, method and a WikiText-103 perplexity per model. table2: DeepSeek-MoE's benchmarks. table3: cost
    and perplexity at 85 C. table4: Qwen3's ablation on WikiText-2; its clean row has the word `clean` for a
    temperature, so that column is text. figure3: the rounded perplexities that section 3.1 states for figure 3, left:
    clean, noisy, with naive compensation. Raises InputError for an unknown table.
    """
    if table not in (known := (*TABLES, "figure3")):
        raise InputError(f"published table {table!r} does not exist, expected one of {', '.join(known)}")
    with (files(__name__) / f"{table}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def _baselines(table: str) -> dict[str, dict[float, tuple[float, float]]]:
    """Clean and vanilla perplexity by model and temperature in C."""
    rows = load(table)
    if table in ("table1", "table2"):
        by_model = {m: m for m in rows.columns[2:]} if table == "table1" else {"deepseek": "wikitext2_ppl"}
        points = rows.set_index(["temperature", "method"])
        return {
            model: {
                float(t): (float(points.at[(t, "clean"), column]), float(points.at[(t, "vanilla"), column]))
                for t in sorted(set(rows["temperature"]))
            }
            for model, column in by_model.items()
        }
    if table == "table3":
        clean = load("table1").query("method == 'clean'").iloc[0]
        return {r.model: {float(r.temperature): (float(clean[r.model]), float(r.ppl_noisy))} for r in rows.itertuples()}
    clean = float(rows.loc[rows["component"] == "clean", "wikitext2_ppl"].iloc[0])
    vanilla = rows[(rows["component"] == "replacement_n") & (rows["value"] == 0)]
    return {"qwen3": {float(r.temperature): (clean, float(r.wikitext2_ppl)) for r in vanilla.itertuples()}}


def _points(table: str, model: str) -> dict[float, tuple[float, float]]:
    models = _baselines(table)
    if model not in models:
        raise InputError(f"published {table} has no model {model!r}, expected one of {', '.join(models)}")
    return models[model]


def temperatures(table: str, model: str) -> tuple[float, ...]:
    """The temperatures in C at which the table prints a vanilla perplexity of the model, ascending.

    Raises InputError for an unknown table or model.
    """
    return tuple(sorted(_points(table, model)))


def baselines(table: str, model: str, temperature_c: float) -> tuple[float, float]:
    """The published (clean, vanilla) perplexity that `kl_target` is the log ratio of. Raises InputError as it does."""
    points = _points(table, model)
    if temperature_c not in points:
        known = ", ".join(f"{t:g}" for t in sorted(points))
        raise InputError(f"published {table} has no {temperature_c} C for model {model}, expected one of {known}")
    return points[temperature_c]


def kl_target(table: str, model: str, temperature_c: float) -> float:
    """KL(clean || noisy) in nats per token that the vanilla row implies: ln(ppl_vanilla / ppl_clean).

    table1 (WikiText-103) and table2 (deepseek on WikiText-2) print both numbers. table4 prints one clean number for
    all temperatures (qwen3 on WikiText-2); its vanilla is the row without replacement. table3 prints no clean number:
    the model's clean perplexity of table1 stands in for it, so that target assumes that both tables use the same text.
    Raises InputError, naming what exists, for an unknown table, model or temperature.
    """
    clean, vanilla = baselines(table, model, temperature_c)
    return math.log(vanilla / clean)
