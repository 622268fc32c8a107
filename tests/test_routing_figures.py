"""Figure 3, its causes and table 4's map: numbers worked out by hand, and figures that show them."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from romer import published
from romer.errors import InputError
from romer.report.printing import write
from romer.report.routing_figures import fig3, fig3_causes, map4
from romer.report.routing_tables import causes, perturbation
from romer.report.tables import table4, table4_map


def record(method, task, realisation, loss, model="olmoe", chip="table1", temperature_c=80.0, **options):
    row = dict(model=model, chip=chip, temperature_c=temperature_c, method=method, options=json.dumps(options))
    row |= dict(task=task, metric="token_perplexity", realisation=realisation, value=10 * math.exp(loss))
    return row | {"tokens": 1022, "cells": 1.0, "run_id": ""}


def probes(model, parts):
    rows = [record("clean", "ppl:perturbed", -1, 0.0, model, perturbed=0.0)]
    for r in range(2):
        for share in (0.0, 0.5):
            if share:
                rows.append(record("clean", "ppl:perturbed", r, 0.3 + 0.01 * r, model, perturbed=share))
            rows.append(record("vanilla", "ppl:perturbed", r, 0.4 + share + 0.1 * r, model, perturbed=share))
            rows.append(record("kb_calibration", "ppl:perturbed", r, 0.3 + share + 0.1 * r, model, perturbed=share))
        rows.append(record("vanilla", "ppl:routing", r, 0.1 + 0.02 * r, model, routing="noisy", weights="clean"))
        rows.append(record("vanilla", "ppl:routing", r, 0.2 + 0.02 * r, model, routing="clean", weights="noisy"))
        for i, part in enumerate(parts):
            rows.append(record("vanilla", "ppl:parts", r, -0.01 + 0.05 * i + 0.02 * r, model, noise_in=part))
    return rows


PROBES = pd.DataFrame(
    probes("qwen3", ("router", "attention")) + probes("deepseek", ("router", "attention", "shared expert"))
)
LOAD = {c: np.random.default_rng(i).gamma(2.0, size=(4, 8)) for i, c in enumerate(("clean", "noisy"))}


def ablation(realisation, loss, n=0, strength=0.0, method=None, replacement="split", **at):
    options = {"n_replace": n, "replacement": replacement} if n else {}
    options |= {"strength": strength, "calibration": "iqr"} if strength else {}
    method = method or {(0, 0): "vanilla", (1, 0): "romer_replacement", (0, 1): "romer_calibration"}.get(
        (int(n > 0), int(strength > 0)), "romer"
    )
    place = {"model": "qwen3", "chip": "table4", "temperature_c": 85.0} | at
    return record(method, "ppl:ablation", realisation, loss, **place, **options)


def grid():
    rows = [ablation(-1, 0.0, method="clean")]
    for r in range(3):
        for n in (0, 2, 4):
            for strength in (0.0, 0.4):
                if not (n and strength and r == 2):  # both together: two realisations, as a profile may ask for
                    rows.append(ablation(r, 0.4 + 0.1 * n - strength + 0.1 * r, n, strength))
        rows.append(ablation(r, 0.4, temperature_c=25.0))  # the axes alone
        rows.append(ablation(r, 0.5, 2, temperature_c=25.0))
    return rows


ABLATION = pd.DataFrame(grid())


@pytest.fixture(scope="module")
def joint():
    return table4_map(ABLATION, published.load("table4"))


def pick(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_perturbation_is_perplexity_by_share_and_method():
    table = perturbation(PROBES)
    assert len(table) == 2 * 2 * 3
    clean = pick(table, model="qwen3", perturbed=0.0, method="clean")
    assert clean["mean"] == 10 and clean["realisations"] == 0 and math.isnan(clean["low"])
    noisy = pick(table, model="qwen3", perturbed=0.5, method="vanilla")
    assert noisy["mean"] == pytest.approx(5 * (math.exp(0.9) + math.exp(1.0))) and noisy["realisations"] == 2
    assert (noisy["low"], noisy["high"]) == pytest.approx((10 * math.exp(0.9), 10 * math.exp(1.0)))
    assert pick(table, model="qwen3", perturbed=0.5, method="clean")["realisations"] == 2


def test_what_section_3_1_states_stands_beside_the_selection_that_is_left_alone():
    table = perturbation(PROBES)
    assert table[table["model"] == "deepseek"]["published"].isna().all()
    table = perturbation(PROBES.assign(model=PROBES["model"].replace("deepseek", "olmoe")))
    stated = table[table["perturbed"] == 0].set_index(["model", "method"])["published"]
    assert (
        stated["olmoe", "clean"] == 12 and stated["qwen3", "vanilla"] == 32 and stated["qwen3", "kb_calibration"] == 27
    )
    assert table[table["perturbed"] > 0]["published"].isna().all()


def test_causes_are_log_ratios_to_the_unperturbed_clean_model():
    table = causes(PROBES)
    found = {r.cause: r.log_ratio for r in table[table["model"] == "deepseek"].itertuples()}
    expected = {"noise everywhere": 0.45, "routing alone": 0.11, "weights alone": 0.21, "router": 0.0}
    assert found == pytest.approx(expected | {"attention": 0.05, "shared experts": 0.10}, abs=1e-12)
    assert "shared experts" not in set(table.loc[table["model"] == "qwen3", "cause"])
    routing = pick(table, model="qwen3", cause="routing alone")
    assert (routing["log_ratio_low"], routing["log_ratio_high"]) == pytest.approx((0.10, 0.12))
    assert routing["realisations"] == 2 and routing["tokens"] == 1022


@pytest.mark.parametrize("build", [perturbation, causes])
def test_probes_of_other_tasks_change_nothing_and_several_operating_points_are_refused(build):
    noise = PROBES.assign(task="ppl:heldout", value=1.0)
    pd.testing.assert_frame_equal(build(pd.concat([noise, PROBES])), build(PROBES))
    with pytest.raises(InputError, match="qwen3 was probed at several operating points"):
        build(pd.concat([PROBES, PROBES.assign(temperature_c=25.0)]))
    assert build(PROBES.head(0)).empty


def test_rows_that_cannot_be_read_are_refused():
    with pytest.raises(InputError, match="found 0 clean rows of qwen3"):
        causes(PROBES[PROBES["method"] != "clean"])
    with pytest.raises(InputError, match="options of qwen3 in ppl:perturbed lack perturbed"):
        perturbation(PROBES.assign(options="{}"))
    with pytest.raises(InputError, match="is not JSON"):
        causes(PROBES.assign(options="{"))
    with pytest.raises(InputError, match="qwen3, routing alone has realisation 0 more than once"):
        causes(pd.concat([PROBES, PROBES[PROBES["task"] == "ppl:routing"]]))


def test_the_maps_cells_are_means_over_the_same_realisations(joint):
    assert len(joint) == 6 and (joint["realisations"] == 2).all() and (joint["temperature_c"] == 85).all()
    for row in joint.itertuples():
        losses = [0.4 + 0.1 * row.n_replace - row.strength + 0.1 * r for r in range(2)]
        assert row.mean == pytest.approx(10 * np.exp(losses).mean())
        assert row.log_ratio == pytest.approx(np.mean(losses))
    assert pick(joint, n_replace=0, strength=0.0)["recovered"] == 0
    assert pick(joint, n_replace=0, strength=0.4)["recovered"] == pytest.approx(0.8 / 0.9)


def test_the_paper_stands_on_the_maps_axes_alone(joint):
    assert pick(joint, n_replace=0, strength=0.0)["published"] == 24.87
    assert pick(joint, n_replace=4, strength=0.0)["published"] == 14.64
    assert pick(joint, n_replace=0, strength=0.4)["published"] == 20.80
    assert joint.loc[(joint["n_replace"] > 0) & (joint["strength"] > 0), "published"].isna().all()


def test_the_map_is_of_one_variant_and_of_the_components_own_rows(joint):
    literal = [ablation(r, 3.0, 2, 0.4, replacement="literal") for r in range(2)]
    literal += [ablation(r, 3.0, 2, replacement="literal") for r in range(2)]
    zeros = [ablation(r, 3.0, method="romer") for r in range(2)]
    zeros = [row | {"options": '{"n_replace": 2, "strength": 0.0, "replacement": "split"}'} for row in zeros]
    elsewhere = [ablation(r, 3.0, 2, 0.4, model="olmoe") for r in range(2)]
    more = pd.concat([ABLATION, pd.DataFrame(literal + zeros + elsewhere)])
    pd.testing.assert_frame_equal(table4_map(more, published.load("table4")), joint)
    other = table4_map(more, published.load("table4"), ("literal", "iqr"))
    assert pick(other, n_replace=2, strength=0.4)["mean"] == pytest.approx(10 * math.exp(3))


def test_a_map_needs_points_with_both_components_and_a_shared_realisation():
    together = ABLATION["method"] == "romer"
    assert table4_map(ABLATION[~together], published.load("table4")).empty
    shifted = ABLATION.assign(realisation=ABLATION["realisation"].mask(together, ABLATION["realisation"] + 7))
    with pytest.raises(InputError, match="at 85 C share no realisation"):
        table4_map(shifted, published.load("table4"))


def test_table4_itself_does_not_see_the_joint_points():
    paper = published.load("table4")
    pd.testing.assert_frame_equal(table4(ABLATION[ABLATION["method"] != "romer"], paper), table4(ABLATION, paper))


def test_the_written_map_is_readable(tmp_path, joint):
    csv, md, tex = write(joint, tmp_path, "table4_map", "n and λ.")
    assert pd.read_csv(csv)["mean"].tolist() == joint["mean"].tolist()
    assert f"| 85 | 4 | 0.4 | {pick(joint, n_replace=4, strength=0.4)['mean']:.2f} [" in md.read_text()
    assert "λ" not in tex.read_text() and r"\ensuremath{\lambda}" in tex.read_text()


def draw_fig3(folder, table=None, load=LOAD):
    return fig3(perturbation(PROBES) if table is None else table, load, folder, title="olmoe")


def draw_causes(folder, table=None):
    return fig3_causes(causes(PROBES) if table is None else table, folder)


def draw_map(folder, table=None):
    return map4(table4_map(ABLATION, published.load("table4")) if table is None else table, folder)


@pytest.mark.parametrize("draw", [draw_fig3, draw_causes, draw_map])
def test_the_same_figure_twice_is_the_same_bytes(tmp_path, draw):
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() and one.stat().st_size > 5_000
    assert first[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in first[1].read_bytes()


def test_fig3_shows_means_intervals_and_loads(tmp_path):
    table = perturbation(PROBES)
    at = (table["model"] == "qwen3") & (table["method"] == "vanilla") & (table["perturbed"] == 0.5)
    higher, wider = (table.assign(**{c: table[c].mask(at, table[c] * 1.02)}) for c in ("mean", "high"))
    decade = table.assign(mean=table["mean"].mask(at, 400.0))
    drawn = [draw_fig3(tmp_path, t)[1].read_bytes() for t in (table, higher, wider, decade)]
    assert len(set(drawn)) == len(drawn)
    assert draw_fig3(tmp_path, load=LOAD | {"noisy": LOAD["clean"]})[1].read_bytes() != drawn[0]


def test_causes_and_map_show_every_number(tmp_path, joint):
    table = causes(PROBES)
    at = (table["model"] == "qwen3") & (table["cause"] == "router")
    columns = ("log_ratio", "log_ratio_low", "log_ratio_high")
    changed = [table.assign(**{c: table[c].mask(at, table[c] - 0.03)}) for c in columns]
    drawn = [draw_causes(tmp_path, t)[1].read_bytes() for t in (table, table[~at], *changed)]
    assert len(set(drawn)) == len(drawn)
    at = (joint["n_replace"] == 4) & (joint["strength"] == 0)
    changed = [joint.assign(**{c: joint[c].mask(at, joint[c] + 1)}) for c in ("mean", "published")]
    drawn = [draw_map(tmp_path, t)[1].read_bytes() for t in (joint, joint[~at], *changed)]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    "load, message",
    [
        ({"clean": LOAD["clean"]}, "found clean, expected clean, noisy"),
        (LOAD | {"noisy": np.ones((4, 9))}, r"expected one \[layers, experts\]"),
        (LOAD | {"noisy": np.zeros((4, 8))}, "noisy has shape"),
    ],
)
def test_fig3_refuses_loads_that_cannot_be_drawn(tmp_path, load, message):
    with pytest.raises(InputError, match=message):
        draw_fig3(tmp_path, load=load)
    assert not list(tmp_path.iterdir())


def test_figures_refuse_tables_that_cannot_be_drawn(tmp_path, joint):
    for draw, name in ((draw_fig3, "perturbation"), (draw_causes, "causes"), (draw_map, "table 4's map")):
        with pytest.raises(InputError, match=f"{name}: column"):
            draw(tmp_path, pd.DataFrame())
    with pytest.raises(InputError, match="perturbation: found no rows"):
        draw_fig3(tmp_path, perturbation(PROBES.head(0)))
    with pytest.raises(InputError, match="found 0 cells with n = 0 and λ = 0 at 85 C"):
        draw_map(tmp_path, joint[joint["n_replace"] > 0])
    assert not list(tmp_path.iterdir())
