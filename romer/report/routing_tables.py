"""What routing has to do with the harm of noise, from the probes' records: the numbers of figure 3 and of its causes.

    perturbation(records)         # figure 3, left: perplexity by the share of experts drawn at random
    causes(records)               # ln(ppl / ppl_clean) of noisy routing alone, noisy weights alone, each part alone

The paper's section 3.1 infers that routing is what breaks; `causes` separates it. `records`: rows of ppl:perturbed,
ppl:routing and ppl:parts, with the columns of `romer.report.tables.RECORD`.
"""

import numpy as np
import pandas as pd

from romer.errors import InputError
from romer.published import load
from romer.report.tables import measured, options_of, perplexities

COMPARED = ("clean", "vanilla", "kb_calibration")
PRINTED = dict(zip(COMPARED, ("clean_ppl", "noisy_ppl", "naive_ppl"), strict=True))  # in section 3.1, of figure 3
CAUSES = {  # cause: (task, options) of its vanilla rows
    "noise everywhere": ("ppl:perturbed", {"perturbed": 0}),
    "routing alone": ("ppl:routing", {"routing": "noisy", "weights": "clean"}),
    "weights alone": ("ppl:routing", {"routing": "clean", "weights": "noisy"}),
    "attention": ("ppl:parts", {"noise_in": "attention"}),
    "dense MLP": ("ppl:parts", {"noise_in": "dense mlp"}),
    "shared experts": ("ppl:parts", {"noise_in": "shared expert"}),
    "routed experts": ("ppl:parts", {"noise_in": "routed expert"}),
    "router": ("ppl:parts", {"noise_in": "router"}),
}


def _probed(records: pd.DataFrame, task: str) -> pd.DataFrame:
    """A task's rows, `options` read."""
    rows = perplexities(records, task)
    return rows.assign(read=[options_of(row) for row in rows.itertuples()])


def _with(rows: pd.DataFrame, method: str, options: dict) -> pd.DataFrame:
    """The rows of a method with exactly these options."""
    return rows[(rows["method"] == method) & np.array([read == options for read in rows["read"]], dtype=bool)]


def _places(rows: pd.DataFrame) -> list[tuple]:
    """The operating points, one a model: (model, chip, temperature_c), in the order of the records."""
    found = list(rows[["model", "chip", "temperature_c"]].drop_duplicates().itertuples(index=False, name=None))
    for model in (models := [model for model, *_ in found]):
        if models.count(model) > 1:
            raise InputError(f"records: {model} was probed at several operating points, expected a single one")
    return found


def perturbation(records: pd.DataFrame) -> pd.DataFrame:
    """Perplexity by the share of each token's experts that is drawn at random: figure 3, left.

    Rows of ppl:perturbed are used. Returns one row per (model, perturbed, method): model, chip, temperature_c,
    perturbed, method (clean | vanilla | kb_calibration), mean, low, high, realisations (0: nothing was drawn), tokens,
    published (of an unperturbed selection: what section 3.1 states, rounded, under its own noise).
    Raises InputError for a model at several operating points, or rows that cannot share a cell.
    """
    rows = _probed(records, "ppl:perturbed")
    table, printed = [], load("figure3").set_index("model")
    for model, chip, t in _places(rows):
        here = rows[rows["model"] == model]
        shares = {read.get("perturbed") for read in here["read"]}
        if None in shares:
            raise InputError(f"records: options of {model} in ppl:perturbed lack perturbed, expected a share")
        for share in sorted(shares):
            for method in COMPARED:
                chosen = _with(here, method, {"perturbed": share})
                if len(chosen):
                    cell = measured(chosen, chosen.head(0), chosen.head(0), f"{model}, {method}, perturbed {share:g}")
                    line = {"model": model, "chip": chip, "temperature_c": float(t), "perturbed": float(share)}
                    line |= {key: cell[key] for key in ("mean", "low", "high", "realisations", "tokens")}
                    stated = model in printed.index and not share
                    line["published"] = float(printed.at[model, PRINTED[method]]) if stated else np.nan
                    table.append(line | {"method": method})
    columns = "model chip temperature_c perturbed method mean low high realisations tokens published".split()
    return pd.DataFrame(table, columns=columns)


def causes(records: pd.DataFrame) -> pd.DataFrame:
    """ln(ppl / ppl_clean) of noise everywhere, of noisy routing or noisy weights alone, and of noise in one part alone.

    Rows of ppl:perturbed (nothing perturbed: clean, and noise everywhere), ppl:routing and ppl:parts are used. Returns
    one row per (model, cause) that was measured: model, chip, temperature_c, cause (of CAUSES), log_ratio with _low and
    _high, realisations, tokens. Raises InputError for a model at several operating points or without a clean row, or
    rows that cannot share a cell.
    """
    rows = pd.concat([_probed(records, task) for task in dict.fromkeys(task for task, _ in CAUSES.values())])
    table = []
    for model, chip, t in _places(rows):
        here = rows[rows["model"] == model]
        clean = _with(here[here["task"] == "ppl:perturbed"], "clean", {"perturbed": 0})
        if len(clean) != 1:
            raise InputError(
                f"records: found {len(clean)} clean rows of {model} with perturbed 0, expected a single one"
            )
        for cause, (task, options) in CAUSES.items():
            chosen = _with(here[here["task"] == task], "vanilla", options)
            if len(chosen):
                cell = measured(chosen, chosen.head(0), clean, f"{model}, {cause}")
                line = {"model": model, "chip": chip, "temperature_c": float(t), "cause": cause}
                kept = ("log_ratio", "log_ratio_low", "log_ratio_high", "realisations", "tokens")
                table.append(line | {key: cell[key] for key in kept})
    columns = "model chip temperature_c cause log_ratio log_ratio_low log_ratio_high realisations tokens".split()
    return pd.DataFrame(table, columns=columns)
