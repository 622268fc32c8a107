"""Tables against numbers worked out by hand, and figures that repeat to the byte."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from romer import published
from romer.errors import InputError
from romer.report.figures import fig2_kl, fig5_heatmaps
from romer.report.tables import caption, table1, table4, write


def record(method, realisation, value, temperature_c=25.0, model="olmoe", chip="table1", cells=1.0, **options):
    task = "ppl:heldout" if chip == "table1" else "ppl:ablation"
    row = dict(model=model, chip=chip, temperature_c=temperature_c, method=method, options=json.dumps(options))
    row |= dict(task=task, metric="token_perplexity", realisation=realisation, value=value, tokens=4096, cells=cells)
    return row | {"run_id": f"{method}-{realisation}"}


HEADLINE = [record("clean", -1, 10.0)]
HEADLINE += [record("vanilla", 0, 20.0), record("vanilla", 1, 40.0), record("vanilla", 2, 20.0)]
HEADLINE += [record("romer", 0, 10.0, n_replace=4), record("romer", 1, 20.0, n_replace=4)]
HEADLINE += [record("romer_calibration", 0, 40.0, strength=0.4), record("bit_slicing", 0, 20.0, cells=8.0)]
HEADLINE += [record("vanilla", 0, 99.0) | {"task": "ppl:calibration"}, record("vanilla", 0, 0.5) | {"metric": "kl"}]
HEADLINE += [record("vanilla", 0, 99.0) | {"chip": "rram_a"}]

ABLATION = [record("clean", -1, 10.0, model="qwen3", chip="table4"), record("vanilla", 0, 99.0, chip="table4")]
for r, harm in enumerate((20.0, 40.0)):
    at = {"realisation": r, "model": "qwen3", "chip": "table4"}
    ABLATION += [record("vanilla", value=harm, **at)]
    for kind, share in (("split", 0.5), ("literal", 0.25)):
        options = {"n_replace": 4, "replacement": kind, "strength": 0.4}  # strength means nothing to replacement alone
        ABLATION += [record("romer_replacement", value=harm * 0.5**share, **at, **options)]
    ABLATION += [record("romer_calibration", value=harm / 2, **at, strength=0.4, calibration="iqr")]
    ABLATION += [record("romer", value=1.0 + r, **at, n_replace=4, strength=0.4, calibration="iqr")]


def frame(*groups):
    return pd.DataFrame([row for group in groups for row in group])


@pytest.fixture
def headline():
    return table1(frame(HEADLINE, ABLATION), published.load("table1"))


@pytest.fixture
def ablation():
    return table4(frame(HEADLINE, ABLATION), published.load("table4"))


def pick(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def one(table, model, method, temperature_c=25):
    row = table[(table["", "method"] == method) & (table["", "temperature_c"] == temperature_c)]
    assert len(row) == 1
    return row.iloc[0][model]


def test_table1_means_are_over_realisations_and_fractions_over_pairs_of_them(headline):
    vanilla, romer = one(headline, "olmoe", "vanilla"), one(headline, "olmoe", "romer")
    assert vanilla["mean"] == pytest.approx(80 / 3) and vanilla["realisations"] == 3
    assert vanilla["recovered"] == 0 and vanilla["log_ratio"] == pytest.approx((2 * math.log(2) + math.log(4)) / 3)
    # Realisation 0: all of ln 2 undone; realisation 1: ln 2 of ln 4: 2 of 3 together. The third has no romer row.
    assert romer["mean"] == 15 and romer["recovered"] == pytest.approx(2 / 3)
    assert (romer["realisations"], romer["pairs"], romer["tokens"], romer["cells"]) == (2, 2, 4096, 1)
    assert (romer["recovered_low"], romer["recovered_high"]) == pytest.approx((0.5, 1.0))
    assert (romer["low"], romer["high"]) == (10, 20)
    assert one(headline, "olmoe", "romer_calibration")["recovered"] == pytest.approx(-1)
    assert one(headline, "olmoe", "bit_slicing")["cells"] == 8


def test_table1_stands_beside_the_published_numbers(headline):
    row = one(headline, "olmoe", "romer", 80)
    assert row["published"] == 11.43 and row["published_log_ratio"] == pytest.approx(math.log(11.43 / 10.48))
    assert row["published_recovered"] == pytest.approx(math.log(13.13 / 11.43) / math.log(13.13 / 10.48))
    assert one(headline, "qwen3", "clean")["published"] == 14.87


def test_what_was_not_measured_or_not_published_is_empty(headline):
    for model, method, t in (("olmoe", "average", 25), ("qwen3", "romer", 25), ("olmoe", "vanilla", 80)):
        row = one(headline, model, method, t)
        measured = row.drop(["published", "published_log_ratio", "published_recovered", "realisations", "pairs"])
        assert measured.isna().all() and row["realisations"] == 0 and row["published"] > 0
    ours = one(headline, "olmoe", "romer_calibration")
    assert ours["mean"] == 40 and math.isnan(ours["published"]) and math.isnan(ours["low"])


def test_the_clean_row_serves_every_temperature_and_has_no_realisations(headline):
    for t in (25, 80):
        clean = one(headline, "olmoe", "clean", t)
        assert clean["mean"] == 10 and clean["realisations"] == 0 and clean["log_ratio"] == 0


def test_tables_of_no_records_hold_the_published_side_alone():
    empty = frame(HEADLINE).head(0)
    assert table1(empty, published.load("table1"))["olmoe", "mean"].isna().all()
    table = table4(empty, published.load("table4"))
    assert table["mean"].isna().all() and table["published"].notna().all()
    assert len(table) == 1 + 4 * 6 * 2


def test_order_of_the_records_changes_nothing(headline, ablation):
    shuffled = frame(HEADLINE, ABLATION).sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(table1(shuffled, published.load("table1")), headline)
    pd.testing.assert_frame_equal(table4(shuffled, published.load("table4")), ablation)


def test_table4_gives_each_component_alone_and_vanilla_at_zero(ablation):
    at = {"temperature_c": 25.0, "component": "replacement_n"}
    split, literal = (pick(ablation, variant=v, value=4, **at) for v in ("split", "literal"))
    assert split["mean"] == pytest.approx(30 / math.sqrt(2)) and split["published"] == 11.01
    assert split["recovered"] == pytest.approx(2 * 0.5 / 3)  # of ln 2 and ln 4
    assert literal["recovered"] == pytest.approx(2 * 0.25 / 3)
    assert pick(ablation, variant="split", value=0, **at)["mean"] == 30
    assert math.isnan(pick(ablation, variant="split", value=8, **at)["mean"])
    at = {"temperature_c": 25.0, "component": "calibration_lambda", "variant": "iqr"}
    assert pick(ablation, value=0.0, **at)["mean"] == 30 and pick(ablation, value=0.4, **at)["mean"] == 15
    row = pick(ablation, value=0.4, **at)
    assert row["published"] == 10.40 and row["published_recovered"] > 1  # the paper's number lies below its clean
    assert ablation.iloc[0]["component"] == "clean" and ablation.iloc[0]["published"] == 10.83


def test_table4_takes_a_component_at_zero_where_vanilla_is_absent():
    rows = [row for row in ABLATION if row["method"] != "vanilla"]
    rows += [record("romer_replacement", r, 50.0, model="qwen3", chip="table4", n_replace=0) for r in (0, 1)]
    table = table4(frame(rows), published.load("table4"))
    assert pick(table, temperature_c=25.0, component="replacement_n", variant="split", value=0)["mean"] == 50


@pytest.mark.parametrize(
    "extra, message",
    [
        (record("romer", 5, 12.0, n_replace=8), "olmoe, romer at 25 C has options"),
        (record("vanilla", 0, 21.0), "olmoe, vanilla at 25 C has realisation 0 more than once"),
        (record("vanilla", 9, 21.0) | {"tokens": 8192}, "olmoe, vanilla at 25 C has tokens 4096, 8192"),
        (record("average", 0, 21.0) | {"tokens": 8192}, "olmoe, average at 25 C, with its clean row"),
        (record("vanilla", 9, math.nan), "perplexity of olmoe, vanilla at 25.0 C, realisation 9 is nan"),
        (record("clean", -1, 11.0), "clean olmoe has perplexities"),
    ],
)
def test_rows_that_cannot_share_a_cell_are_refused(extra, message):
    with pytest.raises(InputError, match=message):
        table1(frame(HEADLINE, [extra]), published.load("table1"))


@pytest.mark.parametrize("options, message", [("{", "is not JSON"), ('{"strength": 0.2}', "lacks n_replace")])
def test_ablation_options_must_be_readable(options, message):
    row = record("romer_replacement", 0, 12.0, model="qwen3", chip="table4") | {"options": options}
    with pytest.raises(InputError, match=message):
        table4(frame(ABLATION, [row]), published.load("table4"))


def test_a_missing_column_is_named():
    with pytest.raises(InputError, match="column tokens is missing"):
        table1(frame(HEADLINE).drop(columns="tokens"), published.load("table1"))


def test_written_tables_hold_full_precision_and_readable_cells(tmp_path, headline, ablation):
    csv, md, tex = write(headline, tmp_path / "new", "table1", "Table 1.")
    read = pd.read_csv(csv)
    row = read[(read["method"] == "vanilla") & (read["temperature_c"] == 25)].iloc[0]
    assert row["olmoe.mean"] == 80 / 3 and math.isnan(row["qwen3.mean"])
    assert "| 25 | romer | 15.00 [10.00, 20.00] | 2 |" in md.read_text()
    assert "| 25 | average |  | 0 |  |" in md.read_text()
    assert tex.read_text().count(r"\begin{table}") == 4
    csv, md, tex = write(ablation, tmp_path, "table4", "Table 4.")
    assert pd.read_csv(csv)["published"].tolist() == ablation["published"].tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "table4.csv", "table4.md", "table4.tex"]


def test_table1_is_printed_narrow_and_kept_whole(tmp_path, headline):
    csv, md, tex = write(headline, tmp_path, "table1", "Table 1.")
    assert {f"{m}.{c}" if m else c for m, c in headline.columns} == set(pd.read_csv(csv).columns)
    heading = ["T (C)", "method", "measured", "draws", "recovered", "paper", "paper recovered", "cells"]
    assert md.read_text().count("| " + " | ".join(heading) + " |\n") == 4
    assert "| 25 | bit_slicing | 20.00 | 1 | 0.000 | 10.86 | 0.598 | 8 |" in md.read_text()
    assert tex.read_text().count(" & ".join(heading)) == 4


def test_nothing_is_printed_as_minus_zero(tmp_path):
    tiny = pd.DataFrame({"log_ratio": [-1e-5], "log_ratio_low": [-2e-3], "log_ratio_high": [-0.0]})
    assert "| 0.000 [-0.002, 0.000] |" in write(tiny, tmp_path, "tiny", "Tiny.")[1].read_text()


def test_latex_is_well_formed(tmp_path, headline, ablation):
    text = caption(frame(HEADLINE, ABLATION), "50 % of a_b & c# {x} ~ ^ \\ $", "table1", "text")
    for table, name in ((headline, "table1"), (ablation, "table4")):
        source = write(table, tmp_path, name, text)[2].read_text()
        bare = re.sub(r"\\[%_#$&{}\\]", "", source.replace("{!}{%\n", "{!}{\n"))  # escapes and the wanted line-end %
        assert not re.search(r"[%_#$~^]", bare)
        depth = np.cumsum([(c == "{") - (c == "}") for c in bare])
        assert depth[-1] == 0 and depth.min() >= 0
        begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", source) for word in ("begin", "end"))
        assert sorted(begun) == sorted(ended) and begun
        for body in re.findall(r"begin{tabular}{(l+)}\n(.*?)\\end{tabular}", source, flags=re.S):
            rows = [line for line in body[1].splitlines() if line.endswith(r"\\")]
            assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in rows} == {len(body[0])}


def test_the_caption_says_what_was_measured():
    text = caption(frame(HEADLINE, ABLATION), "Table 1.", "table1", "some encyclopaedia")
    for part in (
        "stand-ins",
        "not the paper's checkpoints",
        "some encyclopaedia",
        "4096 tokens",
        "1 to 3 realisations",
    ):
        assert part in text
    assert "95 % percentile bootstrap" in text and "\n" not in text
    assert "2 realisations" in caption(frame(ABLATION), "Table 4.", "table4", "text")


CURVES = pd.DataFrame(
    [
        dict(model=m, chip=c, temperature_c=t, sigma_dev=s, realisation=r, kl=k * (8 + r))
        for m in ("olmoe", "qwen3")
        for c in ("table1", "rram_a")
        for t in (25.0, 80.0)
        for s, k in ((0.0, 0.0), (0.01, 2**-11), (0.04, 2**-7), (0.16, 2**-3))  # powers of two: the means are exact
        for r in range(3)
    ]
)
FITS = pd.DataFrame(
    [
        dict(model="olmoe", chip="table1", temperature_c=25.0, sigma_dev=0.047, kl_target=0.0885, sigma_low=0.04)
        | {"sigma_high": 0.05},
        dict(model="qwen3", chip="rram_a", temperature_c=80.0, sigma_dev=0.09, kl_target=0.3, sigma_low=math.nan)
        | {"sigma_high": math.nan},
    ]
)
LAYERS = pd.DataFrame(
    [
        dict(chip=c, model=m, temperature_c=t, layer=layer, realisation=r, source=source)
        | {"relative_error": scale * (1 + layer) * (8 + r) * t / 2**14}
        for c, m, source, scale in (
            ("table1", "olmoe", "noise model", 1),
            ("table1", "qwen3", "noise model", 2),
            ("rram_a", "olmoe", "noise model", 4),
            ("rram_a", "qwen3", "noise model", 8),
            ("rram_a", "qwen3", "chip", 9),
        )
        for t in (25.0, 80.0)
        for layer in range(3)
        for r in range(3)
    ]
)
DRAWN = LAYERS["model"] == LAYERS["chip"].map({"table1": "olmoe", "rram_a": "qwen3"})
LOAD = {c: np.random.default_rng(i).gamma(2.0, size=(4, 8)) for i, c in enumerate(("clean", "vanilla", "romer"))}
COLD = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])


def draw_fig2(folder, curves=CURVES, fits=FITS, layers=LAYERS):
    return fig2_kl(curves, fits, layers, folder)


def fig2_bytes(folder, **changed):
    return draw_fig2(folder, **changed)[1].read_bytes()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return fig2_bytes(tmp_path_factory.mktemp("base"))


def draw_fig5(folder, load=LOAD, cold=COLD):
    return fig5_heatmaps(load, cold, folder, title="olmoe at 80 °C")


@pytest.mark.parametrize("draw", [draw_fig2, draw_fig5])
def test_the_same_figure_twice_is_the_same_bytes(tmp_path, draw):
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    for one_path, other in zip(first, second, strict=True):
        assert one_path.read_bytes() == other.read_bytes() and one_path.stat().st_size > 10_000
    assert first[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in first[1].read_bytes()


def test_figures_show_their_data(tmp_path, base):
    r = CURVES["realisation"]
    spread = CURVES.assign(kl=CURVES["kl"] / (8 + r) * (9 + 4 * (r - 1)))  # the same means
    assert fig2_bytes(tmp_path, curves=spread) != base
    assert fig2_bytes(tmp_path, curves=CURVES[CURVES["sigma_dev"] > 0]) == base
    assert fig2_bytes(tmp_path, curves=CURVES[CURVES["temperature_c"] == 25]) == base
    assert fig2_bytes(tmp_path, fits=FITS.assign(sigma_low=[0.03, math.nan])) != base
    unmarked = draw_fig5(tmp_path / "b", cold=COLD[:, :0])
    assert draw_fig5(tmp_path / "a")[0].read_bytes() != unmarked[0].read_bytes()


@pytest.mark.parametrize("chip, source", [("table1", "noise model"), ("rram_a", "noise model"), ("rram_a", "chip")])
def test_every_line_of_layers_is_seen_with_its_spread(tmp_path, base, chip, source):
    error, r = LAYERS["relative_error"], LAYERS["realisation"]
    line = DRAWN & (LAYERS["chip"] == chip) & (LAYERS["source"] == source) & (LAYERS["temperature_c"] == 25)
    higher = error.mask(line & (LAYERS["layer"] == 1), error * 1.125)
    assert fig2_bytes(tmp_path, layers=LAYERS.assign(relative_error=higher)) != base
    wider = error.mask(line, error * (9 + 4 * (r - 1)) / (8 + r))  # the same means
    assert fig2_bytes(tmp_path, layers=LAYERS.assign(relative_error=wider)) != base
    warmer = LAYERS["temperature_c"].mask(line, 45.0)
    assert fig2_bytes(tmp_path, layers=LAYERS.assign(temperature_c=warmer)) != base
    single = fig2_bytes(tmp_path, layers=LAYERS[~line | (r == 1)])  # the mean's realisation alone: no band
    assert len({base, single, fig2_bytes(tmp_path, layers=LAYERS[~line])}) == 3


def test_layers_are_those_of_the_model_that_the_chip_was_simulated_with_or_of_the_first(tmp_path, base):
    assert fig2_bytes(tmp_path, layers=LAYERS[DRAWN]) == base
    assert fig2_bytes(tmp_path, layers=LAYERS[::-1].sort_values("model", kind="stable")) == base
    assert fig2_bytes(tmp_path, layers=LAYERS[::-1]) != base  # qwen3 is the first, then
    nowhere = LAYERS[LAYERS["source"] == "noise model"]
    first = nowhere[nowhere["model"] == "olmoe"]
    assert fig2_bytes(tmp_path, layers=nowhere) == fig2_bytes(tmp_path, layers=first) != base


def test_a_source_is_not_mistaken_for_the_other(tmp_path, base):
    swapped = LAYERS["source"].map({"chip": "noise model", "noise model": "chip"})
    there = DRAWN & (LAYERS["chip"] == "rram_a")
    layers = LAYERS.assign(source=LAYERS["source"].mask(there, swapped))
    assert fig2_bytes(tmp_path, layers=layers) != base


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("top", [0.0, 0.5, 5000.0])
def test_layers_without_error_can_be_drawn(tmp_path, base, top):
    error = LAYERS["relative_error"].mask(LAYERS["layer"] == 2, top).mask(LAYERS["layer"] == 0, 0.0)
    assert fig2_bytes(tmp_path, layers=LAYERS.assign(relative_error=error)) != base


def test_the_distance_of_chip_and_noise_model_is_printed_where_it_is_known(tmp_path, base):
    fits = pd.concat([FITS, FITS.assign(model=["qwen3", "olmoe"])])  # shown: olmoe on table1, qwen3 on rram_a
    unknown = fig2_bytes(tmp_path, fits=fits.assign(kl_chip_model=[None, math.inf, 0.1, math.nan]))
    assert unknown == fig2_bytes(tmp_path, fits=fits)
    printed = {fig2_bytes(tmp_path, fits=FITS.assign(kl_chip_model=v)) for v in ([None, 0.012], [0.012, None])}
    assert len(printed | {base}) == 3
    twice = pd.concat([FITS, FITS.assign(temperature_c=FITS["temperature_c"] + 5)])
    ranges = ([0.1, 0.2], [0.2, 0.1], [0.1, 0.3], [0.2, math.nan])
    texts = [fig2_bytes(tmp_path, fits=twice.assign(kl_chip_model=[a, 0.5, b, 0.5])) for a, b in ranges]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_fig2_puts_three_chips_in_a_row(tmp_path):
    def size(count):
        chips = [
            [f[f["model"] == "olmoe"].assign(chip=f"chip{i}") for i in range(count)] for f in (CURVES, FITS, LAYERS)
        ]
        png = fig2_kl(*map(pd.concat, chips), tmp_path)[0].read_bytes()
        return tuple(int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # width, height

    (narrow, low), (wide, same), (as_wide, high) = size(1), size(3), size(7)
    assert narrow < wide == as_wide and low == same and high == 3 * low


def test_heatmaps_show_shares_so_that_a_layers_total_is_no_matter(tmp_path):
    scaled = {c: a * np.array([[1.0], [4.0], [0.5], [64.0]]) for c, a in LOAD.items()}
    assert draw_fig5(tmp_path / "a")[0].read_bytes() == draw_fig5(tmp_path / "b", load=scaled)[0].read_bytes()


@pytest.mark.parametrize(
    "load, cold, message",
    [
        ({"clean": LOAD["clean"]}, COLD, "found clean, expected clean, vanilla, romer"),
        (LOAD | {"romer": np.zeros((4, 8))}, COLD, "romer has shape"),
        (LOAD | {"romer": np.full((4, 8), math.nan)}, COLD, "romer has shape"),
        (LOAD | {"romer": np.ones((4, 9))}, COLD, r"romer \[4, 9\]"),
        (LOAD, COLD[:2], r"cold \[2, 2\]"),
    ],
)
def test_heatmaps_refuse_what_cannot_be_drawn(tmp_path, load, cold, message):
    with pytest.raises(InputError, match=message):
        draw_fig5(tmp_path, load, cold)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, frame", [("curves", CURVES), ("fits", FITS), ("layers", LAYERS)])
def test_fig2_needs_every_column_and_a_row(tmp_path, name, frame):
    for column in frame.columns:
        with pytest.raises(InputError, match=f"{name}: column {column} is missing"):
            draw_fig2(tmp_path, **{name: frame.drop(columns=column)})
    with pytest.raises(InputError, match=f"{name}: found no rows"):
        draw_fig2(tmp_path, **{name: frame.head(0)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "layers, message",
    [
        (LAYERS[LAYERS["chip"] == "table1"], "found no rows of chip rram_a"),
        (LAYERS.assign(source="cell"), "found source cell, expected noise model or chip"),
        (LAYERS.assign(relative_error=-0.1), "expected finite numbers >= 0"),
        (LAYERS.assign(relative_error=math.nan), "expected finite numbers >= 0"),
        (LAYERS.assign(relative_error=math.inf), "expected finite numbers >= 0"),
    ],
)
def test_fig2_refuses_layers_that_cannot_be_drawn(tmp_path, layers, message):
    with pytest.raises(InputError, match=message):
        draw_fig2(tmp_path, layers=layers)
    assert not list(tmp_path.iterdir())
