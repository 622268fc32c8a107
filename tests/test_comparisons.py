"""Comparisons of methods against differences and corrections worked out by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from romer.errors import InputError
from romer.report.comparisons import BETTER, NO_DIFFERENCE, WORSE, caption, comparisons, verdict
from romer.report.printing import write
from romer.statistics import holm, mean_interval, paired

NOISE = (0.30, 0.34, 0.27, 0.31, 0.25)  # ln(ppl / 10) of vanilla, by realisation
JITTER = (0.001, -0.002, 0.0005, 0.0, 0.001)
SHIFTS = {"average": -0.1, "bit_slicing": 0.05, "romer": -0.05, "weight_remapping": 0.0}


def record(method, realisation, loss, temperature_c=25.0, model="olmoe", chip="table1", cells=1.0, **options):
    row = dict(model=model, chip=chip, temperature_c=temperature_c, method=method, options=json.dumps(options))
    row |= dict(task="ppl:heldout", metric="token_perplexity", realisation=realisation, value=10 * math.exp(loss))
    return row | {"tokens": 4096, "cells": cells, "run_id": f"{method}-{realisation}"}


def operating_point(**at):
    rows = [record("clean", -1, 0.0, **at)] + [record("vanilla", r, loss, **at) for r, loss in enumerate(NOISE)]
    for method, shift in SHIFTS.items():
        jitter = JITTER if shift else (0,) * 5
        losses = [loss + shift + j for loss, j in zip(NOISE, jitter, strict=True)]
        cells = {"average": 2.0, "bit_slicing": 8.0}.get(method, 1.0)
        rows += [record(method, r, loss, cells=cells, **at) for r, loss in enumerate(losses)]
    return rows


RECORDS = pd.DataFrame(operating_point() + operating_point(temperature_c=80.0))


@pytest.fixture(scope="module")
def table():
    return comparisons(RECORDS)


def pick(table, method, against="vanilla", temperature_c=25.0):
    at = (table["method"] == method) & (table["against"] == against) & (table["temperature_c"] == temperature_c)
    assert at.sum() == 1
    return table[at].iloc[0]


def test_differences_are_of_log_perplexity_within_realisations(table):
    for method, shift in SHIFTS.items():
        row = pick(table, method)
        differences = [shift + j for j in JITTER] if shift else [0.0] * 5
        expected = mean_interval(differences)
        found = row[["difference", "difference_low", "difference_high"]].astype(float)
        assert np.allclose(found, expected, atol=1e-12) and row["pairs"] == 5
    assert pick(table, "average")["cells"] == 2 and pick(table, "average")["cells_against"] == 1


def test_every_method_meets_vanilla_and_romer_meets_every_other(table):
    at = table[table["temperature_c"] == 80]
    pairs = set(zip(at["method"], at["against"], strict=True))
    others = ("average", "bit_slicing", "weight_remapping")
    assert pairs == {(m, "vanilla") for m in SHIFTS} | {("romer", m) for m in others} and len(at) == len(pairs)
    assert pick(table, "romer", "average")["difference"] == pytest.approx(0.05, abs=1e-12)
    assert pick(table, "romer", "bit_slicing")["cells_against"] == 8


def test_verdicts_say_which_is_better(table):
    expected = {"average": BETTER, "bit_slicing": WORSE, "romer": BETTER, "weight_remapping": NO_DIFFERENCE}
    assert {m: pick(table, m)["verdict"] for m in SHIFTS} == expected
    assert pick(table, "romer", "average")["verdict"] == WORSE
    same = pick(table, "weight_remapping")
    assert same["t_p_holm"] == same["wilcoxon_p_holm"] == 1 and same["difference"] == 0


@pytest.mark.parametrize(
    "low, high, p, word",
    [
        (-0.2, -0.1, 0.01, BETTER),
        (0.1, 0.2, 0.01, WORSE),
        (-0.2, -0.1, 0.06, NO_DIFFERENCE),  # the interval alone is not enough
        (-0.2, 0.1, 0.01, NO_DIFFERENCE),  # nor is the test
        (-0.2, 0.0, 0.01, NO_DIFFERENCE),
        (math.nan, math.nan, 0.01, NO_DIFFERENCE),
    ],
)
def test_a_verdict_needs_the_interval_and_the_corrected_test(low, high, p, word):
    assert verdict(low, high, p) == word


def test_p_values_are_corrected_over_all_rows_of_one_chip(table):
    for family in (table[table["against"] == "vanilla"], table[table["against"] != "vanilla"]):
        for name in ("t_p", "wilcoxon_p"):
            assert np.allclose(family[f"{name}_holm"], holm(family[name]))
    assert (table["t_p_holm"] > table["t_p"]).any()
    alone = comparisons(RECORDS[RECORDS["temperature_c"] == 25])
    assert pick(alone, "romer")["t_p_holm"] < pick(table, "romer")["t_p_holm"]
    two_chips = comparisons(pd.concat([RECORDS, RECORDS.assign(chip="rram_a")]))
    pd.testing.assert_frame_equal(two_chips[two_chips["chip"] == "table1"].reset_index(drop=True), table)


def test_only_shared_realisations_are_compared():
    left = RECORDS[~((RECORDS["method"] == "average") & (RECORDS["realisation"] == 1))]
    row = pick(comparisons(left), "average")
    kept = [-0.1 + j for r, j in enumerate(JITTER) if r != 1]
    assert row["pairs"] == 4 and row["difference"] == pytest.approx(np.mean(kept), abs=1e-12)
    assert row["t_p"] == pytest.approx(paired(kept, [0.0] * 4).t_p, rel=1e-6)


def test_one_realisation_shows_nothing():
    table = comparisons(RECORDS[RECORDS["realisation"] <= 0])
    assert (table["pairs"] == 1).all() and (table["verdict"] == NO_DIFFERENCE).all()


def test_order_clean_rows_and_other_tasks_change_nothing(table):
    other = pd.concat([RECORDS[RECORDS["method"] != "clean"], RECORDS.assign(task="ppl:ablation", value=1.0)])
    for records in (other, RECORDS.sample(frac=1, random_state=1)):
        found = comparisons(records)
        keys = ["temperature_c", "against", "method"]
        pd.testing.assert_frame_equal(
            found.sort_values(keys, ignore_index=True), table.sort_values(keys, ignore_index=True)
        )


def test_nothing_to_compare_is_an_empty_table():
    assert comparisons(RECORDS.head(0)).empty
    assert comparisons(RECORDS[RECORDS["method"].isin(("clean", "average"))]).empty


@pytest.mark.parametrize(
    "extra, message",
    [
        (record("romer", 5, 0.2, n_replace=4), "olmoe, romer at 25 C has options"),
        (record("romer", 0, 0.2), "olmoe, romer at 25 C has realisation 0 more than once"),
        (record("average", 5, 0.2), "olmoe, average at 25 C has cells 2.0, 1.0"),
        (record("digital_router", 9, 0.2), "olmoe, digital_router and vanilla at 25 C share no realisation"),
        (record("digital_router", 0, 0.2) | {"tokens": 1}, "olmoe, digital_router and vanilla at 25 C has tokens"),
        (record("vanilla", 9, math.inf), "perplexity of olmoe, vanilla at 25.0 C, realisation 9 is inf"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(extra, message):
    with pytest.raises(InputError, match=message):
        comparisons(pd.concat([RECORDS, pd.DataFrame([extra])]))


def test_the_written_table_is_readable(tmp_path, table):
    words = caption(table, "some text")
    for part in ("some text, 4096 tokens", "the 5 realisations", "6 and 8 tests", "p < 0.05"):
        assert part in words
    csv, md, tex = write(table, tmp_path, "comparisons", words)
    assert pd.read_csv(csv)["verdict"].tolist() == table["verdict"].tolist()
    row = pick(table, "average")
    assert f"| 25 | average | vanilla | -0.100 [-0.101, -0.099] | better | 5 | {row['t_p']:.3g} |" in md.read_text()
    assert r"difference of ln(ppl) & verdict & pairs & t-test p & t-test p, Holm" in tex.read_text()
