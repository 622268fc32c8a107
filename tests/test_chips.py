"""Chips: every one in conf/chip can be built, measured ones reproduce their tables, PCM its source, and bad ones are
refused in one line."""

import math

import numpy as np
import pytest
import torch
import yaml

from romer import published
from romer.adc import Adc
from romer.chips import DATA, MeasuredCells, build, files
from romer.chips.measurements import CellTable, ColumnErrors
from romer.chips.pcm import Pcm
from romer.cli import conf_folder
from romer.errors import InputError
from romer.noise import ColumnGain, Conductance, Draws, NoiseModel

CHIPS = {f.stem: yaml.safe_load(f.read_text()) for f in (conf_folder() / "chip").glob("*.yaml")}
AT = [
    (name, model, temperature)
    for name, section in sorted(CHIPS.items())
    if name != "file"
    for model in section["models"]
    for temperature in section["temperatures"]
]
CELLS = 200_000
DRAWS = Draws(0, 0, "array")


@pytest.mark.parametrize("name, model, temperature", AT)
def test_every_chip_can_be_built_for_every_model_and_temperature_it_has(name, model, temperature):
    chip = build(CHIPS[name], model, temperature)
    assert chip.name == name and chip.temperature_c == temperature
    if name in published.TABLES:
        assert chip.kl_target == published.kl_target(name, model, temperature) > 0 and not chip.errors
    else:
        assert chip.kl_target is None and chip.errors
    assert all(path.exists() for path in files(CHIPS[name]).values())


@pytest.mark.parametrize("name", ["rram_a", "rram_b"])
@pytest.mark.parametrize("temperature", [25, 80, 100])
def test_measured_cells_have_the_mean_and_spread_of_their_table(name, temperature):
    """At the levels of the table and halfway between two."""
    (error,) = build(CHIPS[name], "olmoe", temperature).errors
    g, mean, sigma = CellTable.read(DATA / f"{name}.csv").at(temperature)
    for i in range(len(g) - 1):
        for share in (0.0, 0.5):
            at, m, s = ((1 - share) * v[i] + share * v[i + 1] for v in (g, mean, sigma))
            delta = error.cells(torch.full((CELLS,), at, dtype=torch.float32), DRAWS, f"{i} {share}").double() - at
            assert abs(delta.mean() - m) < 4 * s / math.sqrt(CELLS) + 1e-4
            assert abs(delta.std() - s) < 4 * s / math.sqrt(2 * CELLS) + 1e-4


@pytest.mark.parametrize("least", [1.0, 1e-2, 1e-5])  # µS between two conductances; the last is too fine for bins
def test_cells_are_read_off_the_line_between_the_two_conductances_around_them(least):
    g = torch.Generator().manual_seed(0)
    steps = torch.rand(40, generator=g).add(0.1).where(torch.arange(40) % 5 > 0, torch.tensor(least))
    grid = torch.cat([torch.tensor([2.0]), 2 + steps.cumsum(0)])
    cells = MeasuredCells(grid, torch.randn(41, generator=g), torch.zeros(41))
    assert (cells._bins is None) == (least == 1e-5)
    target = torch.cat([grid, grid[0] + (grid[-1] - grid[0]) * torch.rand(2000, generator=g)]).clamp(max=grid[-1])
    expected = target.numpy() + np.interp(target.numpy(), grid.numpy(), cells.mean_us.numpy())
    np.testing.assert_allclose(cells(target, DRAWS, "plus").numpy(), expected, atol=2e-4 if least == 1e-5 else 1e-5)


def test_a_temperature_between_measured_ones_is_said_to_be_one():
    assert not build(CHIPS["rram_a"], "olmoe", 100).notes
    (note,) = build(CHIPS["rram_a"], "olmoe", 80).notes
    assert "80 C" in note and "25, 100" in note


@pytest.mark.parametrize("g", [0.04, 0.2, 0.5, 0.8, 1.0])
def test_pcm_is_programmed_as_spread_as_its_source_says(g):
    """Joshi et al. 2020: σ_prog in µS; near 0 the distribution is cut off, so the smallest is 1 µS = 2.9 σ."""
    target = torch.full((CELLS,), 25 * g)
    read = Pcm(20.0, read=False)(target, DRAWS, "plus").double()
    sigma = -1.1731 * g**2 + 1.9650 * g + 0.26348
    assert abs(read.mean() - 25 * g) < 4 * sigma / math.sqrt(CELLS) + (0.001 if g < 0.1 else 1e-5)
    assert abs(read.std() / sigma - 1) < 4 / math.sqrt(2 * CELLS) + (0.005 if g < 0.1 else 0)


def test_pcm_drifts_by_its_exponent():
    """At full conductance ν ~ N(0.049, 0.008²): the log of the mean decay is -ν̄ x + σ² x² / 2 with x = ln(t / t0)."""
    target = torch.full((CELLS,), 25.0)
    for seconds in (200.0, 3600.0, 86400.0 * 365):
        x = math.log(seconds / 20)
        early, late = (Pcm(s, read=False)(target, DRAWS, "plus").double() for s in (20.0, seconds))
        ratio = (late / early).log()
        assert abs(ratio.mean() + 0.049 * x) < 4 * 0.008 * x / math.sqrt(CELLS) + 1e-6
        assert abs(ratio.std() / (0.008 * x) - 1) < 4 / math.sqrt(2 * CELLS) + 1e-4


def test_pcm_reads_with_one_over_f_noise():
    target = torch.full((CELLS,), 12.5)
    seconds = 3600.0
    quiet, loud = (Pcm(seconds, read=read)(target, DRAWS, "plus").double() for read in (False, True))
    sigma = 0.0088 / 0.5**0.65 * math.sqrt(math.log((seconds + 250e-9) / 500e-9))
    relative = loud / quiet - 1
    assert abs(relative.std() / sigma - 1) < 4 / math.sqrt(2 * CELLS) + 1e-3
    assert abs(relative.mean()) < 4 * sigma / math.sqrt(CELLS)


def test_compensation_takes_the_mean_drift_out():
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    year = Pcm(86400.0 * 365)

    def loss(compensate):
        noise = NoiseModel(errors=(Conductance(year, 0.0, 25.0, compensate=compensate),))
        read = noise.realise("w", weight, 0)
        return 1 - (read * weight).sum() / weight.square().sum()

    assert loss(False) > 0.3 and abs(loss(True)) < 0.1


def test_columns_need_a_converter_and_give_it_their_residual():
    gain_std, residual_std = ColumnErrors.read(DATA / "neurram.csv").at(25)
    chip = build(CHIPS["neurram"], "olmoe", 25)
    assert chip.errors == (ColumnGain(gain_std),) and chip.adc.residual == residual_std
    with pytest.raises(InputError, match="set chip.adc"):
        build(CHIPS["neurram"] | {"adc": None}, "olmoe", 25)


def test_a_user_brings_files_of_every_level():
    own = {"name": "mine", "cells": str(DATA / "example_cells.csv")}
    columns = {"table": str(DATA / "example_mvm.csv"), "extrapolate": True}
    both = own | {"columns": columns, "adc": {"bits": 6, "form": "uniform"}}
    (cells,) = build(own, "olmoe", 25).errors
    chip = build(both, "olmoe", 60)
    assert [type(e) for e in chip.errors] == [type(cells), ColumnGain] and len(chip.notes) == 2
    assert chip.adc == Adc(6, "uniform", residual=chip.adc.residual)
    assert files(both) == {"cells": DATA / "example_cells.csv", "columns": DATA / "example_mvm.csv"}
    told = build({"name": "mine", "end_to_end": str(DATA / "example_end_to_end.csv")}, "olmoe", 25)
    assert told.kl_target == 0.031 and told.layer_error == (0.08, 0.09, 0.11)


@pytest.mark.parametrize(
    "section, model, temperature, message",
    [
        (CHIPS["file"], "olmoe", 25, "chip file: nothing is given"),
        ({"name": "x", "cell": "a.csv"}, "olmoe", 25, "chip x: unknown setting 'cell'"),
        ({"name": "x", "cells": "rram_a", "pcm": {}}, "olmoe", 25, "one kind of cells at most"),
        (CHIPS["pcm"] | {"drift": {"seconds": 3600}}, "olmoe", 25, "chip pcm: found drift beside pcm"),
        ({"name": "x", "cells": "no/such.csv"}, "olmoe", 25, "no/such.csv: no such file"),
        ({"name": "x", "cells": {"table": "rram_a", "g_max_us": 300}}, "olmoe", 25, "column 'g_us': found"),
        ({"name": "x", "cells": {"table": "rram_a", "gmax": 300}}, "olmoe", 25, "cells: unknown setting 'gmax'"),
        ({"name": "x", "cells": {"scaling": "tensor"}}, "olmoe", 25, "chip x: cells: table is missing"),
        ({"name": "x", "cells": {"table": 5}}, "olmoe", 25, "chip x: cells.table: found 5, expected str"),
        ({"name": "x", "cells": ["a.csv"]}, "olmoe", 25, "chip x: cells: found ['a.csv']"),
        ({"name": "x", "cells": {"table": "rram_a", "g_max_us": "big"}}, "olmoe", 25, "cells.g_max_us: found 'big'"),
        (
            {"name": "x", "cells": {"table": "rram_a", "extrapolate": "no"}},
            "olmoe",
            25,
            "extrapolate: found 'no', expected",
        ),
        ({"name": "x", "cells": "/tmp"}, "olmoe", 25, "/tmp"),
        ({"name": "x", "end_to_end": 0}, "olmoe", 25, "chip x: end_to_end: found 0"),
        ({"name": "x", "adc": {"bits": "abc"}}, "olmoe", 25, "chip x: adc.bits: found 'abc', expected int"),
        ({"name": "x", "adc": 8}, "olmoe", 25, "chip x: adc: found 8, expected bits"),
        ({"name": "x", "drift": {"nu": 0.05}}, "olmoe", 25, "chip x: drift: seconds is missing"),
        (CHIPS["pcm"] | {"pcm": {"seconds": -1}}, "olmoe", 25, "pcm seconds: found -1, expected at least 20"),
        (CHIPS["pcm"] | {"pcm": True}, "olmoe", 25, "chip pcm: pcm: found True"),
        (
            CHIPS["rram_a"],
            "olmoe",
            20,
            "chip rram_a: found 20 C, expected a temperature within the measured 25 to 260 C",
        ),
        (CHIPS["pcm"], "olmoe", 80, "expected the measured 25 C"),
        (CHIPS["pcm"] | {"pcm": {"hours": 1}}, "olmoe", 25, "pcm: unknown setting 'hours'"),
        (CHIPS["neurram"] | {"adc": {"bit": 8}}, "olmoe", 25, "adc: unknown setting 'bit'"),
        (CHIPS["table1"], "olmoe", 45, "published table1 has no 45 C"),
        ({"name": "x", "cells": "/tmp"}, "olmoe", 25, "/tmp: a directory, expected a CSV file with the columns"),
        ({"name": "x", "cells": "a\0b"}, "olmoe", 25, "cannot be read"),
        ({"name": "x", "cells": 300 * "x"}, "olmoe", 25, "cannot be read"),
        ({"name": "../x", "cells": "rram_a"}, "olmoe", 25, "chip.name: found '../x', expected letters"),
        ({"name": "", "cells": "rram_a"}, "olmoe", 25, "chip.name: found ''"),
        ({"name": "x", "cells": {"table": "rram_a", "extrapolate": True}}, "olmoe", -274, "at least -273.15 C"),
        (CHIPS["table1"], "olmoe", math.nan, "chip table1: found nan C"),
    ],
)
def test_a_chip_that_cannot_be_is_refused_in_one_line(section, model, temperature, message):
    with pytest.raises(InputError) as error:
        build(section, model, temperature)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "level, header, missing, expected",
    [
        ("cells", "temperature_c,g_target_us,g_read_ns", "g_read_us", "temperature_c, g_target_us, g_read_us"),
        ("cells", "temperature_c,g_target_us,g_read_us_old", "g_read_us", "g_target_us, g_read_us, separated"),
        ("cells", "temperature_c;g_target_us;g_read_us", "temperature_c", "g_read_us, separated by commas"),
        ("cells", "", "temperature_c", "temperature_c, g_target_us, g_read_us"),
        ("cells", "temperature_c,g_us,mean_delta_us,sigma", "sigma_us", "g_us, mean_delta_us, sigma_us, cells"),
        ("columns", "temperature_c,column,y_ideal", "y_measured", "column, y_ideal, y_measured"),
        ("columns", "temperature_c,column,gain", "residual_std", "column, gain, residual_std"),
    ],
)
def test_a_misspelt_column_is_missed_in_the_format_that_the_file_has(tmp_path, level, header, missing, expected):
    path = tmp_path / "mychip.csv"
    path.write_text(header + "\n")
    with pytest.raises(InputError) as error:
        build({"name": "x", level: str(path), "adc": {}}, "olmoe", 25)
    text = str(error.value)
    assert text.startswith(f"{path}: header row: column '{missing}' is missing") and expected in text


def test_extrapolation_is_done_where_it_is_asked_for():
    asked = {"name": "x", "cells": {"table": "rram_b", "extrapolate": True}}
    chip = build(asked, "olmoe", 10)
    assert chip.errors and "10 C is interpolated or extrapolated" in chip.notes[0]
