"""What methods take back for what: the table's numbers, its places, and what it refuses."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from romer.chips.pcm import Pcm
from romer.errors import InputError
from romer.noise import CLEAN as NOTHING
from romer.noise import Conductance, NoiseModel, mirror
from romer.report.frontier import picture, places, taken_back
from romer.stages.frontier import Part, later
from romer.statistics import paired

CLEAN, VANILLA = 10.0, 12.0
PLACES = ("home", "pcm/25", "pcm/25/read_seconds=0.01")


def row(method, value, realisation=0, options=None, task="methods", chip="table1", t=80.0):
    return {
        "model": "olmoe",
        "chip": chip,
        "temperature_c": t,
        "method": method,
        "options": json.dumps(options or {}, sort_keys=True),
        "task": f"ppl:{task}",
        "metric": "token_perplexity",
        "realisation": realisation,
        "value": value,
        "tokens": 511,
        "cells": 1.0,
    }


def records():
    rows = [row("clean", CLEAN, -1)]
    for r in range(3):
        rows += [row("vanilla", VANILLA + 0.1 * r, r), row("average", 11 + 0.05 * r, r, {"copies": 2})]
        rows += [row("romer_plus", 10.5, r, {"budget": 0.02})]
        rows += [row("romer", 11.9 + 0.1 * r, r), row("romer_calibration", 11.5 + 0.3 * (r == 1), r)]
        rows += [row("romer_plus", 10.8, r, {"budget": 0.01}, "budget"), row("vanilla", VANILLA, r, task="budget")]
        for scale in (0.9, 1.2):
            rows += [row("vanilla", VANILLA * scale, r, {"scale": scale}, "scaled")]
            rows += [row("romer_plus", 11 * scale, r, {"budget": 0.02, "scale": scale}, "scaled")]
        clean_routing, attention = {"routing": "clean"}, {"noise_in": "attention"}
        rows += [row("vanilla", 11.0, r, clean_routing, "limits")]
        rows += [row("romer_plus", 10.2, r, {"budget": 0.02} | clean_routing, "limits")]
        rows += [row("vanilla", 10.8, r, attention, "limits")]
        rows += [row("romer_plus", 10.4, r, {"budget": 0.02} | attention, "limits")]
        here = {"celsius": 25}
        rows += [row("vanilla", 20.0, r, here, "chips", "pcm", 25.0)]
        rows += [row("romer_plus", 15.0, r, {"budget": 0.02} | here, "chips", "pcm", 25.0)]
        rows += [row("romer_plus", 16.0, r, {"budget": 0.02, "fitted_on": "table1/80"} | here, "chips", "pcm", 25.0)]
    return pd.DataFrame(rows)


def costs():
    """Of every setting where it was measured: energy is 2 of vanilla, 3 of copies, 2.1 of romer_plus, on chips 2.2."""
    rows = records()[lambda r: r["method"] != "clean"].drop_duplicates(["chip", "method", "options"])
    priced = rows[["model", "chip", "method", "options"]].assign(cells=1, digital=0.0, operations=0.0, readbacks=0)
    budget = [json.loads(o).get("budget", 0.0) for o in rows["options"]]
    plus, copies = rows["method"] == "romer_plus", rows["method"] == "average"
    energy = 2 + 0.1 * plus + 0.1 * (plus & (rows["chip"] == "pcm")) + copies
    return priced.assign(cells=1 + copies, side=budget, energy_j=energy)


def test_every_setting_is_held_against_vanilla_at_its_own_place():
    table = taken_back(records(), costs())
    plus = table[table["method"] == "romer_plus"].set_index(["experiment", "where", "setting"])["recovered"]
    losses = [math.log((VANILLA + 0.1 * r) / CLEAN) for r in range(3)]
    gains = [math.log((VANILLA + 0.1 * r) / 10.5) for r in range(3)]
    assert plus["methods", "", "budget=0.02"] == pytest.approx(sum(gains) / sum(losses))
    for scale in (0.9, 1.2):
        share = math.log(VANILLA / 11) / math.log(VANILLA * scale / CLEAN)
        assert plus["scaled", f"{scale:g} x noise", "budget=0.02"] == pytest.approx(share)
    assert plus["chips", "", "budget=0.02"] == pytest.approx(math.log(20 / 15) / math.log(2))
    assert plus["chips", "", "budget=0.02, ranks of table1/80"] == pytest.approx(math.log(20 / 16) / math.log(2))
    gains = [math.log((VANILLA + 0.1 * r) / 10.2) for r in range(3)]  # over vanilla where routing was its own
    assert plus["limits", "", "budget=0.02, clean routing"] == pytest.approx(sum(gains) / sum(losses))
    share = math.log(10.8 / 10.4) / math.log(10.8 / CLEAN)
    assert plus["limits", "noise in attention alone", "budget=0.02"] == pytest.approx(share)
    copies = table[table["method"] == "average"].iloc[0]
    assert copies["cells"] == 2 and copies["energy"] == 1.5 and math.isnan(copies["p_average"])
    on = table[table["method"] == "romer_plus"].groupby("experiment")["energy"].mean()
    assert on["methods"] == pytest.approx(1.05) and on["chips"] == pytest.approx(1.1)  # of its own ranks there
    against = table[(table["method"] == "romer_plus") & (table["experiment"] == "methods")].iloc[0]
    assert against["p_average"] < 0.01
    best = np.log([11.5, 11.8, 11.5])  # of calibration alone, which is better than both together
    assert against["p_paper"] == pytest.approx(paired(np.full(3, math.log(10.5)), best).t_p)
    assert table[table["method"].isin(("romer", "romer_calibration"))]["p_paper"].isna().sum() == 1


def test_an_antithetic_pair_counts_as_one_realisation():
    """Of the mean ln(ppl), at the operating point, which alone has pairs."""
    rows = records()
    own = rows["task"].isin(["ppl:methods", "ppl:limits"]) & (rows["realisation"] != -1)
    images = rows[own].assign(realisation=mirror(rows["realisation"]), value=rows["value"] * 1.1)
    rows.loc[own, "value"] /= 1.1
    paired_up, single = taken_back(pd.concat([rows, images]), costs()), taken_back(records(), costs())
    pd.testing.assert_frame_equal(paired_up, single, rtol=1e-9)
    with pytest.raises(InputError, match="romer_plus .*realisation 1 is there without its mirror image"):
        taken_back(
            pd.concat([rows, images[(images["method"] != "romer_plus") | (images["realisation"] != mirror(1))]]),
            costs(),
        )


def test_a_place_without_loss_has_nothing_to_take_back():
    rows = records()
    rows.loc[(rows["method"] == "vanilla") & (rows["task"] == "ppl:chips") & (rows["realisation"] == 1), "value"] = 9.9
    table = taken_back(rows, costs())
    assert table[table["experiment"] == "chips"]["recovered"].isna().all()
    assert table[table["experiment"] == "methods"]["recovered"].notna().all()


@pytest.mark.parametrize(
    ("drop", "what"),
    [(("method", "clean"), "no clean or no vanilla"), (("options", '{"scale": 0.9}'), "no clean or no vanilla")],
)
def test_what_there_is_nothing_to_hold_against_is_an_error(drop, what):
    column, value = drop
    found = records()
    with pytest.raises(InputError, match=what):
        taken_back(found[found[column] != value], costs())
    with pytest.raises(InputError, match="costs: olmoe, romer_plus .* was not priced"):
        taken_back(records(), costs()[lambda c: c["method"] != "romer_plus"])
    with pytest.raises(InputError, match="costs: olmoe, vanilla on pcm .* was not priced"):
        taken_back(records(), costs()[lambda c: (c["method"] != "vanilla") | (c["chip"] != "pcm")])


def test_the_picture_is_written_twice_the_same(tmp_path):
    table = taken_back(records(), costs())
    table.loc[table["method"] == "romer", "recovered"] = -5.0  # is named, and does not flatten the rest
    first = [path.read_bytes() for path in picture(table, tmp_path, "a")]
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.svg"}
    assert first[0] == picture(table, tmp_path, "b")[0].read_bytes() and b"<svg" in first[1]
    with pytest.raises(InputError, match="frontier: found no rows"):
        picture(table.iloc[:0], tmp_path)
    assert picture(table.assign(recovered=math.nan), tmp_path, "empty")[0].stat().st_size  # noise that took nothing


def test_places_have_a_picture_of_their_own(tmp_path):
    table = taken_back(records(), costs())
    first = places(table, tmp_path, "a")[0].read_bytes()
    assert first == places(table, tmp_path, "b")[0].read_bytes()
    moved = table.assign(recovered=table["recovered"].where(table["experiment"] != "chips", 0.1))
    assert first != places(moved, tmp_path, "c")[0].read_bytes()
    assert places(table[table["experiment"] == "methods"], tmp_path, "d") is None


def test_a_chip_later_on_is_the_same_but_for_its_drift():
    noise = NoiseModel(0.0, 3, (Conductance(Pcm(3600.0), 0.0, 25.0, "column", True),))
    aged = later(noise, 86400.0)
    assert aged.errors[0].cells == Pcm(86400.0) and aged.errors[0].scaling == "column" and aged.seed == 3
    with pytest.raises(InputError, match="drift is not known"):
        later(NoiseModel(0.1), 86400.0)


def test_a_part_has_what_it_names_and_no_more():
    part = Part.of({"places": ["home", "pcm/25"], "experiments": ["methods"], "realisations": [0, 2]}, PLACES)
    assert part.at("home") and not part.at("pcm/25/read_seconds=0.01") and not part.whole
    assert part.has("methods", 2) and not part.has("methods", 1) and not part.has("chips", 2)
    assert (
        part.has("methods", NOTHING) and Part.of(dict.fromkeys(("places", "experiments", "realisations")), PLACES).whole
    )
    everything = Part()
    assert everything.at("anywhere") and everything.has("drift", 7)


@pytest.mark.parametrize(
    ("only", "what"),
    [
        ({"places": ["rram_a/25"]}, "places: found 'rram_a/25', expected one of home, pcm/25"),
        ({"experiments": ["choices"]}, "experiments: found 'choices', expected one of choice, methods"),
        ({"realisations": ["1"]}, "realisations: found '1', expected whole numbers"),
        ({"places": "home"}, "places: found 'home', expected a list"),
        ({"chips": ["pcm"]}, "found 'chips'; it has lists places, experiments, realisations"),
    ],
)
def test_a_part_that_there_is_not_is_refused(only, what):
    with pytest.raises(InputError, match=f"profile.frontier.only.*{what}"):
        Part.of(only, PLACES)
