"""Table 3 and the Pareto front: overheads within realisations, the paper's numbers beside, and bad input."""

import numpy as np
import pandas as pd
import pytest

from romer import InputError, published
from romer.report.hardware import front, pareto, table3
from romer.report.tables import write
from romer.stages.report import overheads


@pytest.fixture
def costs() -> pd.DataFrame:
    """olmoe: romer takes 10 % more products, 5 % more time and power than vanilla, in both realisations."""
    rows = []
    for realisation in (0, 1):
        common = {"model": "olmoe", "realisation": realisation, "shape": "own", "tokens": 1000, "cells": 1.0}
        common |= {"batch": 32, "hardware": "hermes", "tiles_stored": 10}
        time = 1e-3 * (1 + realisation)
        for method, options, ppl, extra, slower in (
            ("vanilla", "{}", 30.0, 1.0, 1.0),
            ("romer", '{"n_replace": 4}', 20.0, 1.1, 1.05),
            ("romer", '{"n_replace": 8}', 25.0, 1.2, 1.1),
        ):
            own = {
                "method": method,
                "options": options,
                "selected": "8" not in options,
                "perplexity": ppl + realisation,
                "tile_mvms": 1e6 * extra,
            }
            own |= {"time_s": time * slower, "power_w": 10 * slower, "energy_j": 10 * time * slower**2}
            rows.append(common | own)
    return pd.DataFrame(rows)


def test_overheads_are_formed_within_realisations_and_the_paper_stands_beside(costs, tmp_path):
    table = table3(costs, published.load("table3"))
    row = table[(table.model == "olmoe") & (table.n_replace == 4)].iloc[0]
    overheads = row[["extra_mvms_pct", "latency_pct", "power_pct", "energy_pct"]].tolist()
    assert overheads == pytest.approx([10, 5, 5, 10.25])
    assert row.latency_us_per_token == pytest.approx(1.05 * 1.5) and row.perplexity == 20.5
    assert (row.paper_latency_pct, row.paper_power_pct, row.paper_ppl) == (6.5, 6.1, 14.2)
    vanilla = table[(table.model == "olmoe") & (table.method == "vanilla")].iloc[0]
    assert (vanilla.paper_latency_s, vanilla.paper_power_w) == (234.6, 152.3) and np.isnan(vanilla.paper_latency_pct)
    assert np.isnan(table[table.n_replace == 8].iloc[0].paper_latency_pct)  # not the setting of the paper's row
    unmeasured = table[table.model == "qwen3"]
    assert set(unmeasured.method) == {"vanilla", "romer"} and unmeasured.power_w.isna().all()
    assert {path.suffix for path in write(table, tmp_path, "table3", "Table 3.")} == {".csv", ".md", ".tex"}


def test_the_front_has_what_nothing_beats():
    energy, perplexity = np.array([1.0, 2.0, 3.0, 2.0, 1.0]), np.array([5.0, 4.0, 4.0, 6.0, 5.0])
    assert pareto(energy, perplexity).tolist() == [True, True, False, False, True]


def test_the_figure_is_written_twice_the_same(costs, tmp_path):
    first = [path.read_bytes() for path in front(costs, tmp_path, "front", title="table3 at 85 °C")]
    assert [path.read_bytes() for path in front(costs, tmp_path, "front", title="table3 at 85 °C")] == first
    assert first != [path.read_bytes() for path in front(costs, tmp_path, "other", title="table3 at 25 °C")]


def test_overheads_of_the_ledger_are_at_one_n_where_all_models_have_it(costs):
    with_chosen = costs.assign(selected=costs["method"].eq("vanilla") | costs["options"].str.contains("8"))
    assert overheads(with_chosen).set_index("method").at["romer", "n_replace"] == 4
    other = with_chosen[~costs["options"].str.contains("4")].assign(model="qwen3")
    found = overheads(pd.concat([with_chosen, other])).set_index(["model", "method"])
    assert found.loc[("olmoe", "romer"), "n_replace"] == found.loc[("qwen3", "romer"), "n_replace"] == 8
    assert found.loc[("olmoe", "romer"), "extra_products"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c.drop(columns="power_w"), "costs: column power_w is missing"),
        (lambda c: c.assign(shape="checkpoint"), "costs: found shapes checkpoint, expected own"),
        (lambda c: c.assign(batch=range(len(c))), "costs: found batch 0, 1"),
        (lambda c: c.drop(index=0), "costs: olmoe, romer: realisation 0 has no vanilla row"),
    ],
)
def test_bad_costs_are_named(costs, spoil, message):
    with pytest.raises(InputError, match=message):
        table3(spoil(costs), published.load("table3"))
