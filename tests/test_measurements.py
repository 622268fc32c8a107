"""Measurements of a chip: what a file says is what the tables hold, and what does not belong is refused in one line."""

import csv
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from romer.chips import derive
from romer.chips.measurements import (
    CellTable,
    ColumnErrors,
    end_to_end_target,
    fit_columns,
    read_cells,
    read_end_to_end,
    read_mvm,
)
from romer.errors import InputError

ROOT = Path(__file__).parents[1]
RAW = ROOT.parent / "shared" / "data"
CELLS = "temperature_c,g_target_us,g_read_us"
TABLE = "temperature_c,g_us,mean_delta_us,sigma_us,cells"
MVM = "temperature_c,column,y_ideal,y_measured"
COLUMNS = "temperature_c,column,gain,residual_std"
KL = "model,temperature_c,kl,layer_error_std"


def cells_frame(rng, sigma=2.0, shift=-0.5, count=400, temperatures=(25.0, 85.0), targets=(5.0, 20.0, 60.0)):
    t, g = (grid.ravel() for grid in np.meshgrid(temperatures, targets))
    frame = pd.DataFrame({"temperature_c": np.repeat(t, count), "g_target_us": np.repeat(g, count)})
    return frame.assign(g_read_us=frame["g_target_us"] + shift + sigma * rng.standard_normal(len(frame)))


def line_of(refused, *parts):
    """The message of a refusal: one line that holds the parts."""
    text = str(refused.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text, text
    return text


# the derived cell table


def test_a_table_reads_back_as_it_was_written(tmp_path):
    table = CellTable.from_cells(cells_frame(np.random.default_rng(0)), "mychip")
    (tmp_path / "mychip.csv").write_text(table.to_csv_text())
    again = CellTable.read(tmp_path / "mychip.csv")
    assert (again.name, again.temperature_c, again.g_us) == (table.name, table.temperature_c, table.g_us)
    for field in ("mean_delta_us", "sigma_us", "cells"):
        assert np.array_equal(getattr(again, field), getattr(table, field)), field
        assert getattr(again, field).dtype == getattr(table, field).dtype
    assert again.to_csv_text() == table.to_csv_text()


def test_from_cells_recovers_mean_and_sigma():
    sigma, shift, count = 2.0, -0.5, 400
    table = CellTable.from_cells(cells_frame(np.random.default_rng(1), sigma, shift, count), "mychip")
    assert table.g_us == (5.0, 20.0, 60.0) and table.temperature_c == (25.0, 85.0)
    assert (table.cells == count).all()
    # 6 entries within 4 standard errors: fails by chance for one seed in 2600, and this seed is fixed
    assert np.abs(table.mean_delta_us - shift).max() < 4 * sigma / math.sqrt(count)
    assert np.abs(table.sigma_us - sigma).max() < 4 * sigma / math.sqrt(2 * (count - 1))


def test_sigma_has_n_minus_1_degrees_of_freedom():
    reads = [9.0, 11.0] * 5
    frame = pd.DataFrame({"temperature_c": 25.0, "g_target_us": 10.0, "g_read_us": reads})
    assert CellTable.from_cells(frame, "mychip").sigma_us[0, 0] == pytest.approx(math.sqrt(10 / 9))


def test_many_targets_are_pooled_and_every_read_keeps_its_own_target():
    targets = np.linspace(1, 100, 90)
    frame = cells_frame(np.random.default_rng(2), sigma=0.0, shift=3.0, count=4, targets=targets)
    table = CellTable.from_cells(frame, "mychip", bins=30)
    assert table.g_us == pytest.approx(targets.reshape(30, 3).mean(axis=1))
    assert (table.cells == 12).all()
    assert table.mean_delta_us == pytest.approx(np.full((2, 30), 3.0))
    assert table.sigma_us == pytest.approx(np.zeros((2, 30)), abs=1e-12)  # and no spread of the pooled targets


def test_the_order_of_the_rows_does_not_matter():
    frame = cells_frame(np.random.default_rng(3), count=20)
    shuffled = frame.sample(frac=1, random_state=0)
    ours, theirs = CellTable.from_cells(frame, "mychip"), CellTable.from_cells(shuffled, "mychip")
    assert theirs.g_us == ours.g_us
    assert theirs.sigma_us == pytest.approx(ours.sigma_us, rel=1e-12)


def small_table(sigma=((1.0, 2.0), (3.0, 6.0), (4.0, 4.0))):
    mean = np.array([[0.0, -1.0], [2.0, -3.0], [2.0, -7.0]])
    return CellTable("mychip", (25.0, 85.0, 125.0), (10.0, 40.0), mean, np.array(sigma), np.full((3, 2), 10))


def test_interpolation_is_exact_at_measured_temperatures_and_linear_between():
    table = small_table()
    for i, t in enumerate(table.temperature_c):
        g, mean, sigma = table.at(t)
        assert table.measured(t)
        assert (g == table.g_us).all() and g.dtype == np.float64
        assert np.array_equal(mean, table.mean_delta_us[i]) and np.array_equal(sigma, table.sigma_us[i])
    assert not table.measured(40)
    _, mean, sigma = table.at(40)  # a quarter of the way from 25 to 85
    assert mean == pytest.approx([0.5, -1.5]) and sigma == pytest.approx([1.5, 3.0])
    _, mean, sigma = table.at(105)  # half of the way from 85 to 125
    assert mean == pytest.approx([2.0, -5.0]) and sigma == pytest.approx([3.5, 5.0])


def test_extrapolation_is_asked_for_and_keeps_sigma_above_zero():
    table = small_table()
    for outside in (24.9, 125.1, math.nan, math.inf):
        with pytest.raises(InputError) as refused:
            table.at(outside)
        line_of(refused, "mychip", f"{outside:g} C", "25 to 125 C")
    with pytest.raises(InputError):
        table.at(math.nan, extrapolate=True)
    _, mean, sigma = table.at(-35, extrapolate=True)  # as far below 25 as 85 is above
    assert mean == pytest.approx([-2.0, 1.0])
    assert (sigma == 0).all()  # the line gives -1 and -2
    _, mean, sigma = table.at(165, extrapolate=True)
    assert mean == pytest.approx([2.0, -11.0]) and sigma == pytest.approx([5.0, 2.0])


def test_one_temperature_stands_for_itself_only():
    table = CellTable.from_cells(cells_frame(np.random.default_rng(4), temperatures=(25.0,)), "mychip")
    assert np.array_equal(table.at(25)[2], table.sigma_us[0])
    with pytest.raises(InputError, match="measured 25 C"):
        table.at(26)
    assert np.array_equal(table.at(26, extrapolate=True)[2], table.sigma_us[0])


def test_few_reads_and_unequal_targets_are_refused():
    frame = cells_frame(np.random.default_rng(5), count=10)
    CellTable.from_cells(frame, "mychip")  # ten are enough
    with pytest.raises(InputError) as refused:
        CellTable.from_cells(frame.iloc[:-1], "mychip")
    line_of(refused, "mychip", "column 'g_read_us'", "9 rows", "at least 10")
    with pytest.raises(InputError) as refused:
        CellTable.from_cells(frame[(frame["temperature_c"] == 25) | (frame["g_target_us"] > 5)], "mychip")
    line_of(refused, "mychip", "column 'g_target_us'", "no row 5 at 85 C", "the same targets")
    with pytest.raises(InputError, match="0 bins"):
        CellTable.from_cells(frame, "mychip", bins=0)
    with pytest.raises(InputError, match="row 3, column 'g_read_us': found .*nan"):
        CellTable.from_cells(frame.assign(g_read_us=frame["g_read_us"].where(frame.index != 2)), "mychip")


# matrix-vector products


def mvm_frame(rng, gains=(0.9, 1.0, 1.1), residual=0.0, count=50, temperature_c=25.0, unit=7.0):
    parts = []
    for column, gain in enumerate(gains):
        ideal = rng.standard_normal(count) + 0.5
        measured = unit * (gain * ideal + residual * rng.standard_normal(count)) - 3.0
        row = {"temperature_c": temperature_c, "column": str(column), "y_ideal": ideal, "y_measured": measured}
        parts.append(pd.DataFrame(row))
    return pd.concat(parts, ignore_index=True)


def test_gains_are_recovered_without_their_unit_and_offset():
    frame = mvm_frame(np.random.default_rng(0))
    fitted = fit_columns(frame, "mychip")
    assert fitted["gain"].tolist() == pytest.approx([6.3, 7.0, 7.7])
    errors = ColumnErrors.from_mvm(frame, "mychip")
    gain_std, residual_std = errors.at(25)
    assert gain_std == pytest.approx(0.1)
    assert residual_std == pytest.approx(0.0, abs=1e-12)
    assert errors.columns.tolist() == [3]


@pytest.mark.parametrize("ideal, measured", [(1e-300, 1e-300), (1e30, 1e30), (1e-200, 1e30), (1e30, 1e-200)])
def test_any_unit_of_the_outputs_gives_the_same_errors(ideal, measured):
    frame = mvm_frame(np.random.default_rng(5), residual=0.1)
    scaled = frame.assign(y_ideal=ideal * frame["y_ideal"], y_measured=measured * frame["y_measured"])
    expected, found = (ColumnErrors.from_mvm(f, "mychip").at(25) for f in (frame, scaled))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_residual_is_relative_to_the_rms_of_the_ideal_output():
    count, residual = 2000, 0.2
    frame = mvm_frame(np.random.default_rng(1), gains=(1.0,) * 20, residual=residual, count=count)
    expected = residual / math.sqrt(1 + 0.5**2)  # ideal outputs are N(0.5, 1)
    gain_std, residual_std = ColumnErrors.from_mvm(frame, "mychip").at(25)
    assert residual_std == pytest.approx(expected, rel=4 / math.sqrt(2 * 20 * count) + 4 * 0.6 / math.sqrt(20 * count))
    assert 0 < gain_std < 2 * residual / math.sqrt(count)  # what the fit adds by itself is residual / sqrt(count)


def test_the_residual_has_n_minus_2_degrees_of_freedom():
    ideal, error = np.array([-1.0, 1.0, -1.0, 1.0]), np.array([0.1, 0.1, -0.1, -0.1])  # no line fits such an error
    row = {"temperature_c": 25.0, "column": "0", "y_ideal": ideal, "y_measured": 2 * (ideal + error)}
    fitted = fit_columns(pd.DataFrame(row), "mychip")
    assert fitted["gain"][0] == pytest.approx(2.0)
    assert fitted["residual_std"][0] == pytest.approx(math.sqrt(4 * 0.1**2 / 2))


def test_columns_that_were_fitted_elsewhere_give_the_same(tmp_path):
    rng = np.random.default_rng(2)
    frame = pd.concat([mvm_frame(rng, residual=0.1, temperature_c=t) for t in (25.0, 85.0)])
    fit_columns(frame, "mychip").to_csv(tmp_path / "mychip.csv", index=False)
    ours, theirs = ColumnErrors.from_mvm(frame, "mychip"), ColumnErrors.read(tmp_path / "mychip.csv")
    assert theirs.name == "mychip" and theirs.temperature_c == ours.temperature_c == (25.0, 85.0)
    assert theirs.gain_std == pytest.approx(ours.gain_std) and theirs.residual_std == pytest.approx(ours.residual_std)
    middle = np.mean([ours.at(25), ours.at(85)], axis=0)
    assert ours.at(55) == pytest.approx(middle) and not ours.measured(55)


def test_column_errors_of_one_temperature_stand_for_it_only():
    errors = ColumnErrors.from_mvm(mvm_frame(np.random.default_rng(3)), "mychip")
    with pytest.raises(InputError, match="measured 25 C"):
        errors.at(85)
    assert errors.at(85, extrapolate=True) == errors.at(25)


def test_what_cannot_be_fitted_is_refused():
    frame = mvm_frame(np.random.default_rng(4), count=3)
    ColumnErrors.from_mvm(frame, "mychip")  # three rows are enough
    first = frame["column"] == "0"
    for bad, parts in {
        "few": (frame.iloc[1:], ("'y_ideal'", "2 rows of column 0 at 25 C", "at least 3")),
        "constant": (frame.assign(y_ideal=frame["y_ideal"].where(~first, 1.5)), ("'y_ideal'", "only 1.5", "column 0")),
        "one column": (frame[first], ("'column'", "1 column at 25 C", "at least 2")),
        "inverted": (frame.assign(y_measured=-frame["y_measured"]), ("'y_measured'", "a gain of -", "column 0")),
        "no column": (frame.drop(columns="column"), ("'column'", "no rows")),
    }.values():
        with pytest.raises(InputError) as refused:
            ColumnErrors.from_mvm(bad, "mychip")
        line_of(refused, "mychip", *parts)


# end to end


def test_the_target_of_a_model_and_temperature(tmp_path):
    path = tmp_path / "kl.csv"
    path.write_text(f"{KL}\nolmoe,25,0.1,0.01;0.02\nolmoe,85,0.4,\nqwen3,25,0.2,0.5\n")
    frame = read_end_to_end(path)
    assert end_to_end_target(frame, path, "olmoe", 25) == (0.1, (0.01, 0.02))
    assert end_to_end_target(frame, path, "olmoe", 85.0) == (0.4, None)
    assert end_to_end_target(frame, path, "qwen3", 25) == (0.2, (0.5,))
    with pytest.raises(InputError) as refused:
        end_to_end_target(frame, path, "mixtral", 25)
    line_of(refused, path, "'model'", "mixtral", "olmoe, qwen3")
    with pytest.raises(InputError) as refused:
        end_to_end_target(frame, path, "olmoe", 60)
    line_of(refused, path, "'temperature_c'", "60", "25, 85")


def test_layer_errors_are_optional(tmp_path):
    path = tmp_path / "kl.csv"
    path.write_text("temperature_c,model,kl\n25,olmoe,0.1\n")
    assert end_to_end_target(read_end_to_end(path), path, "olmoe", 25) == (0.1, None)


# what is refused

REFUSED = [  # reader, header, rows, what the line holds
    (read_cells, CELLS, ["25,1,1", "25,1"], ("row 2", "'g_read_us'", "2 fields", "3")),
    (read_cells, CELLS, ["25,1,1,1"], ("row 1", "'g_read_us'", "4 fields", "3")),
    (read_cells, CELLS, ["25,1,1", "", "25,1,1"], ("row 2", "'temperature_c'", "0 fields")),
    (read_cells, CELLS, ["25,1,1", "25,1,nan"], ("row 2", "'g_read_us'", "'nan'", "microsiemens")),
    (read_cells, CELLS, ["25,1,1", "25,inf,1"], ("row 2", "'g_target_us'", "'inf'", "microsiemens")),
    (read_cells, CELLS, ["25,1,1", "25,1,1e300"], ("row 2", "'g_read_us'", "'1e300'", "microsiemens")),
    (CellTable.read, TABLE, ["25,1,-1e31,1,10"], ("row 1", "'mean_delta_us'", "'-1e31'", "microsiemens")),
    (ColumnErrors.read, COLUMNS, ["25,0,1,1e300", "25,1,1,0"], ("row 1", "'residual_std'", "'1e300'")),
    (read_cells, CELLS, ["25,1,"], ("row 1", "'g_read_us'", "''", "microsiemens")),
    (read_cells, CELLS, ["room,1,1"], ("row 1", "'temperature_c'", "'room'", "degrees Celsius")),
    (read_cells, CELLS, ["-300,1,1"], ("row 1", "'temperature_c'", "'-300'", "-273.15")),
    (read_cells, CELLS, ["25,1,-0.5"], ("row 1", "'g_read_us'", "'-0.5'", "at least 0")),
    (read_cells, CELLS, ["25,-1,0.5"], ("row 1", "'g_target_us'", "'-1'", "at least 0")),
    (read_cells, CELLS, ["25,1_0,1"], ("row 1", "'g_target_us'", "'1_0'")),
    (read_cells, CELLS, [], ("row 1", "'temperature_c'", "the end of the file")),
    (read_cells, "", [], ("header row", "'temperature_c'", "missing")),
    (read_cells, "25,1,1", ["25,1,1"], ("header row", "'temperature_c'", "missing in 25, 1, 1")),
    (read_cells, "temperature_c,g_target_s,g_read_us", ["25,1,1"], ("header row", "'g_target_us'", "g_target_s")),
    (read_cells, "temperature_c,g_target_ns,g_read_us", ["25,1,1"], ("header row", "'g_target_us'", "g_target_ns")),
    (
        read_cells,
        "temperature_k,g_target_us,g_read_us",
        ["298,1,1"],
        ("header row", "'temperature_c'", "temperature_k"),
    ),
    (read_cells, CELLS + ",g_target_ns", ["25,1,1,1"], ("header row", "'g_target_ns'", "unknown", CELLS[:13])),
    (read_cells, CELLS + ",g_read_us", ["25,1,1,1"], ("header row", "'g_read_us'", "2 times")),
    (read_mvm, MVM, ["25,,1,1"], ("row 1", "'column'", "''")),
    (read_mvm, MVM, ["25,0,1,x"], ("row 1", "'y_measured'", "'x'")),
    (read_end_to_end, KL, ["olmoe,25,0,"], ("row 1", "'kl'", "'0'", "above 0")),
    (read_end_to_end, KL, ["olmoe,25,1,", "olmoe,85,-1,"], ("row 2", "'kl'", "'-1'", "nats per token")),
    (read_end_to_end, KL, [" ,25,1,"], ("row 1", "'model'")),
    (read_end_to_end, KL, ["olmoe,25,1,0.1;;0.2"], ("row 1", "'layer_error_std'", "'0.1;;0.2'", "';'")),
    (read_end_to_end, KL, ["olmoe,25,1,0.1;-2"], ("row 1", "'layer_error_std'")),
    (read_end_to_end, KL, ["olmoe,25,1,", "olmoe,25.0,2,"], ("row 2", "'temperature_c'", "olmoe at 25 C again")),
    (ColumnErrors.read, COLUMNS, ["25,0,1,0", "25,1,0,0"], ("row 2", "'gain'", "'0'", "above 0")),
    (ColumnErrors.read, COLUMNS, ["25,0,1,-1", "25,1,1,0"], ("row 1", "'residual_std'", "'-1'")),
    (ColumnErrors.read, COLUMNS, ["25,0,1,0", "25,0,1,0"], ("row 2", "'column'", "'0' again")),
    (ColumnErrors.read, COLUMNS, ["25,0,1,0"], ("'column'", "1 column at 25 C")),
    (CellTable.read, TABLE, ["25,1,0,1,10", "25,2,0,-1,10"], ("row 2", "'sigma_us'", "'-1'")),
    (CellTable.read, TABLE, ["25,1,0,1,0"], ("row 1", "'cells'", "'0'")),
    (CellTable.read, TABLE, ["25,1,0,1,10.5"], ("row 1", "'cells'", "'10.5'")),
    (CellTable.read, TABLE, ["25,2,0,1,10", "25,1,0,1,10"], ("row 2", "'g_us'", "1 after 2", "ascending")),
    (CellTable.read, TABLE, ["25,1,0,1,10", "25,1,0,1,10"], ("row 2", "'g_us'", "1 after 1", "ascending")),
    (CellTable.read, TABLE, ["85,1,0,1,10", "25,1,0,1,10"], ("row 2", "'temperature_c'", "25 after 85", "ascending")),
    (CellTable.read, TABLE, ["25,1,0,1,10", "25,2,0,1,10", "85,1,0,1,10"], ("row 4", "'g_us'", "the end", "2, as")),
    (
        CellTable.read,
        TABLE,
        ["25,1,0,1,10", "25,2,0,1,10", "85,1,0,1,10", "95,1,0,1,10", "95,2,0,1,10"],
        ("row 4", "'g_us'", "the end of a temperature", "2, as"),
    ),
    (CellTable.read, TABLE, ["25,1,0,1,10", "85,1.5,0,1,10"], ("row 2", "'g_us'", "1.5", "1, as at 25 C")),
    (CellTable.read, TABLE, ["25,1,0,1,10", "85,1,0,1,10", "85,2,0,1,10"], ("row 3", "'g_us'", "only 1", "25 C")),
]


@pytest.mark.parametrize("read, header, rows, parts", REFUSED)
def test_a_refusal_is_one_line_with_file_column_and_row(tmp_path, read, header, rows, parts):
    path = tmp_path / "mychip.csv"
    path.write_text("\n".join([header, *rows]) + "\n" if header else "")
    with pytest.raises(InputError) as refused:
        read(path)
    line_of(refused, path, *parts)


@pytest.mark.parametrize("read", [read_cells, read_mvm, read_end_to_end, CellTable.read, ColumnErrors.read])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, read):
    with pytest.raises(InputError) as refused:
        read(tmp_path / "none.csv")
    line_of(refused, tmp_path / "none.csv", "no such file", "temperature_c")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError) as refused:
        read(tmp_path / "bytes.csv")
    line_of(refused, tmp_path / "bytes.csv", "UTF-8")


def test_columns_may_stand_in_any_order_and_files_may_come_from_a_spreadsheet(tmp_path):
    path = tmp_path / "mychip.csv"
    path.write_bytes("\ufeffg_read_us, temperature_c ,g_target_us\r\n3.5,25,4\r\n\r\n".encode())
    assert read_cells(path).to_dict("records") == [{"temperature_c": 25.0, "g_target_us": 4.0, "g_read_us": 3.5}]


# the tables in the package


@pytest.mark.parametrize("name", ["rram_a", "rram_b"])
def test_the_committed_tables_are_what_the_measurements_give(name):
    if not (RAW / "rram_relaxation").is_dir():
        pytest.skip("needs the raw measurements")
    assert derive.rram_table(RAW / "rram_relaxation", name).to_csv_text() == (derive.DATA / f"{name}.csv").read_text()


@pytest.mark.parametrize("name, largest_us", [("rram_a", 237.0), ("rram_b", 124.7)])
def test_the_committed_tables_are_whole(name, largest_us):
    table = CellTable.read(derive.DATA / f"{name}.csv")
    assert table.temperature_c == (25, 100, 140, 180, 220, 260) and len(table.g_us) == 32
    assert table.g_us[-1] == pytest.approx(largest_us, abs=0.05)
    assert (table.cells[0] == 5 * 512).all() and (table.cells[1:] == 512).all()
    assert not table.measured(85)
    low, high = np.minimum(*table.sigma_us[:2]), np.maximum(*table.sigma_us[:2])
    sigma = table.at(85)[2]
    assert ((low <= sigma) & (sigma <= high)).all()


def test_neurram_is_what_the_notebooks_printed():
    source = RAW / "neurram" / "mvm_error_from_notebooks.json"
    if not source.exists():
        pytest.skip("needs the printed numbers")
    committed = pd.read_csv(derive.DATA / "neurram.csv")
    pd.testing.assert_frame_equal(derive.neurram_columns(source), committed, check_dtype=False)


def test_neurram_is_a_chip_of_columns():
    errors = ColumnErrors.read(derive.DATA / "neurram.csv")
    assert errors.temperature_c == (25.0,) and errors.columns.tolist() == [80]
    with open(derive.DATA / "neurram.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for layer, count in (("cifar10", 64), ("finetune", 16)):
        gains = [float(r["gain"]) for r in rows if r["column"].startswith(layer)]
        assert len(gains) == count and np.mean(gains) == pytest.approx(1, abs=1e-6)


def test_derive_names_what_is_wrong_and_writes_nothing(tmp_path, capsys):
    output = tmp_path / "tables"
    (tmp_path / "techA").mkdir()
    for content in (None, b"80000\t0.0\t1e4\t1e-4\t100\n", b"not gzip"):
        path = tmp_path / "techA" / "bake.tsv.gz"
        if content:
            path.write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            derive.main([str(tmp_path), "--output", str(output)])
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert str(path) in message and message.count("\n") == 1
    assert not output.exists()


def test_levels_are_taken_from_addresses_and_reads_from_before_and_after(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for address in range(1000, 1000 + 2 * 32 * 12, 2):  # step 2: every level 12 times
        target = 10 + 3 * (address // 2 % 32)
        for bake_c in (100, 180):
            before, after = target + rng.choice([-1, 1]), target + 5 + bake_c / 100
            rows += [
                (address, 0.0, 1e6 / before, before * 1e-6, bake_c),
                (address, 5000.0, 1e6 / after, after * 1e-6, bake_c),
            ]
    (tmp_path / "techB").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "techB" / "bake.tsv.gz", sep="\t", header=False, index=False)
    table = derive.rram_table(tmp_path, "rram_b")
    assert table.temperature_c == (25, 100, 180)
    assert np.diff(table.g_us).min() > 0 and np.abs(np.array(table.g_us) - (10 + 3 * np.arange(32))).max() <= 1
    assert (table.cells[0] == 24).all() and (table.cells[1:] == 12).all()
    assert table.mean_delta_us[2] - table.mean_delta_us[1] == pytest.approx(np.full(32, 0.8), abs=2e-4)
    assert table.sigma_us[1:] == pytest.approx(np.zeros((2, 32)), abs=1e-4)


def test_the_examples_of_the_documentation_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "chips.md").read_text(), re.S)
    found: dict = {}
    for example in examples:
        exec(example, found)
    assert len(examples) == 3
    table = found["table"]
    assert table.temperature_c == (25, 85) and table.g_us == (10, 40, 80) and (table.cells == 20).all()
    assert capsys.readouterr().out.startswith(TABLE)
    assert found["columns"].columns.tolist() == [3] and 0 < found["gain_std"] < 0.2
    assert found["kl"] == 0.031 and len(found["layer_error_std"]) == 3


def test_the_documentation_describes_every_column():
    text = (ROOT / "docs" / "chips.md").read_text()
    for header in (CELLS, TABLE, MVM, KL):
        for column in header.split(","):
            assert f"| `{column}` |" in text, column
    assert f"`{COLUMNS.replace(',', ', ')}`" in text
