"""Our errors and converter against what CrossSim, aihwkit and aihwkit-lightning did, recorded in benchmarks/peers/."""

import math
import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy import stats

from romer.adc import quantise, step
from romer.chips.pcm import Pcm
from romer.noise import Conductance, Draws, NoiseModel

PEERS = Path(__file__).resolve().parents[1] / "benchmarks" / "peers"
SCRIPTS = ("device_noise", "pcm", "adc")
WEIGHT = 0.02 * torch.randn(512, 512, generator=torch.Generator().manual_seed(1))  # that of device_noise.py
CELLS = 1_000_000  # as recorded


def recorded(name: str) -> pd.DataFrame:
    return pd.read_csv(PEERS / f"{name}.csv", comment="#")


def cases(table: pd.DataFrame, *columns: str) -> list:
    """One parameter a row, named by its columns."""
    return [pytest.param(row, id="-".join(str(row[c]) for c in columns)) for _, row in table.iterrows()]


DEVICE = recorded("device_noise")
CELL = recorded("pcm")


@pytest.mark.parametrize("row", cases(DEVICE[DEVICE.case == "weight"], "peer", "sigma"))
def test_eq_2_has_the_peers_mean_and_spread(row):
    noisy = NoiseModel(row.sigma).realise("weight", WEIGHT, realisation=1)
    e = noisy.double() / WEIGHT.double() - 1
    assert abs(e.mean() - row.peer_mean) < 4 * row.mean_se
    assert abs(e.std() - row.peer_std) < 4 * row.std_se
    size = torch.corrcoef(torch.stack([(noisy - WEIGHT).abs().flatten(), WEIGHT.abs().flatten()]))[0, 1]
    assert abs(size - row.peer_correlation) < 4 * math.sqrt(2 / WEIGHT.numel())


@pytest.mark.parametrize("row", cases(DEVICE[DEVICE.case == "pair"], "peer", "sigma"))
def test_differential_pairs_have_the_peers_spread(row):
    def cells(target, draws, kind):
        return (target * (1 + row.sigma * draws.normal(kind, target))).clamp(min=0)

    noisy = NoiseModel(errors=(Conductance(cells, 2.5, 25.0),)).realise("weight", WEIGHT, realisation=1)
    e = (noisy.double() - WEIGHT) / WEIGHT.abs().max()
    assert abs(e.mean() - row.peer_mean) < 4 * row.mean_se
    assert abs(e.std() - row.peer_std) < 4 * row.std_se


@pytest.mark.parametrize("row", cases(DEVICE[(DEVICE.case == "weight") & (DEVICE.sigma == 0.3)], "peer"))
def test_eq_2_flips_signs_where_a_cell_cannot(row):
    noisy = NoiseModel(row.sigma).realise("weight", WEIGHT, realisation=1)
    expected, n = stats.norm.cdf(-1 / row.sigma), WEIGHT.numel()  # P(1 + ε < 0)
    error = 4 * math.sqrt(expected / n)
    assert abs((noisy * WEIGHT < 0).double().mean() - expected) < error
    assert row.peer_flipped == 0 if row.peer == "CrossSim" else abs(row.peer_flipped - expected) < error


def assert_same(row: pd.Series, conductance: torch.Tensor):
    """Mean and spread within five standard errors of the difference of two samples of CELLS."""
    assert abs(conductance.double().mean() - row.peer_mean) < 5 * row.mean_se
    assert abs(conductance.double().std() - row.peer_std) < 5 * row.std_se


@pytest.mark.parametrize("row", cases(CELL[(CELL.quantity == "programmed") & (CELL.peer == "aihwkit")], "g_us"))
def test_programmed_cells_are_aihwkits(row):
    target = torch.full((CELLS,), row.g_us)
    assert_same(row, Pcm(Pcm.T_REFERENCE, read=False)(target, Draws(1, 0, "cells"), "plus"))


# At lower conductances the two differ by definition, see benchmarks/peers/README.md.
LEAST_US = {"drifted": 5.0, "read": 12.5}
SAME = (CELL.definition == "ours") & (CELL.g_us >= CELL.quantity.map(LEAST_US))  # NaN, so False, for "programmed"


@pytest.mark.parametrize("row", cases(CELL[SAME], "quantity", "seconds", "g_us"))
def test_drifted_and_read_cells_are_aihwkits(row):
    target = torch.full((CELLS,), row.g_us)
    assert_same(row, Pcm(row.seconds, read=row.quantity == "read")(target, Draws(1, 0, "cells"), "plus"))


def test_an_independent_fit_of_the_same_measurement_gives_nearly_the_same_programming_spread():
    table = CELL[(CELL.quantity == "programmed") & (CELL.peer == "CrossSim") & (CELL.g_us >= 5)]
    sigma = Pcm.programming_sigma(torch.tensor(table.g_us.values / Pcm.G_MAX_US))
    assert table.g_us.tolist() == [5.0, 12.5, 20.0, 25.0]
    torch.testing.assert_close(sigma, torch.tensor(table.peer_std.values), rtol=0.02, atol=0)


@pytest.mark.parametrize("bits", [4, 6, 8, 10])
def test_conversions_are_those_of_aihwkit_lightning_at_the_same_step(bits):
    pairs = recorded("adc_pairs").query("bits == @bits")
    x, y = (torch.tensor(pairs[c].values, dtype=torch.float32) for c in ("input", "output"))
    bound = pairs.bound.iloc[0]
    assert len(pairs) == 40 and (x.abs() > bound).any()
    v_ref = 2 * bound * (2**bits - 1) / (2**bits - 2)
    torch.testing.assert_close(quantise(x, v_ref, bits), y, rtol=1e-6, atol=0)
    same_range = quantise(x, 2 * bound, bits)
    delta = step(2 * bound, bits)
    assert same_range.max().item() == pytest.approx(bound - delta / 2)  # the last code's interval ends at V_ref / 2
    assert (same_range - y).abs().max() < 2 * bound / (2**bits - 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_its_peers_says_how_to_get_them(script, monkeypatch):
    for package in ("aihwkit", "aihwkit_lightning", "simulator"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.syspath_prepend(PEERS)  # as `python benchmarks/peers/<script>.py` does
    with pytest.raises(SystemExit, match=r"^[^\n]+: pip install --no-deps aihwkit[^\n]+$"):
        runpy.run_path(str(PEERS / f"{script}.py"))


@pytest.mark.parametrize("table", [*SCRIPTS, "adc_pairs"])
def test_the_readme_names_the_versions_that_were_measured(table):
    first = (PEERS / f"{table}.csv").read_text().splitlines()[0]
    named = re.findall(r"(?:CrossSim|aihwkit-lightning|aihwkit|torch) \d[\w.]*", first)
    readme = (PEERS / "README.md").read_text()
    assert len(named) >= 2
    assert [name for name in named if name not in readme] == []
