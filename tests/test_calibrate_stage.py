"""`romer calibrate` on measured chips, and what the stages after it make of a chip's own noise."""

import json

import pandas as pd
import pytest
import torch

from romer.arrays import KeptDraws
from romer.calibration import fit_sigma
from romer.errors import InputError
from romer.noise import Draws
from romer.stages.calibrate import log_distance
from tests.test_cli import one_line, romer


def test_a_chip_with_adc_and_kv_cache_goes_through_the_stages(smoke_results):
    common = ["profile=smoke", f"results={smoke_results}", "tracking=disabled", "model=deepseek", "temperature=25"]
    own = [*common, "chip=rram_b", "noise.adc={bits: 8}", "placement.rule=linear+kv"]
    done = romer("calibrate", *own, "profile.calibrate.identify_bits=[4,10]")
    assert done.returncode == 0, done.stderr
    folder = smoke_results / "smoke/calibrate/rram_b/deepseek/25"
    fit = json.loads((folder / "calibration.json").read_text())
    assert abs(fit["kl"] / fit["kl_target"] - 1) < 0.02 and fit["evaluations"] <= 12 and fit["adc"]["bits"] == 8
    rows = pd.read_csv(folder / "identifiability.csv")
    assert list(rows.bits) == [4, 10] and rows.sigma_dev.iloc[1] > 0
    met = rows.dropna(subset="sigma_dev")
    assert ((met.kl / fit["kl_target"] - 1).abs() < 0.02).all()  # each resolution meets the same target
    coverage = pd.read_csv(folder / "coverage.csv", keep_default_na=False).set_index("parameter")
    assert coverage.loc["cached keys and values", "analog"] and set(coverage[coverage.analog].encoding) == {
        "differential pair"
    }
    done = romer("profile", *own, "noise.source=chip")
    assert done.returncode == 0, done.stderr
    assert (smoke_results / "smoke/profile/rram_b/deepseek/25/coverage.csv").exists()
    line = one_line(romer("profile", *common, "chip=rram_b", "placement.rule=linear+kv"))
    assert "calibrated with another noise.adc" in line and str(folder) in line


def test_a_measured_target_does_not_silence_the_cells(smoke_results):
    """The target is what was measured; beside it stands how much of it the cells explain."""
    common = ["profile=smoke", f"results={smoke_results}", "tracking=disabled", "model=qwen3", "temperature=25"]
    kl = smoke_results / "own_kl.csv"
    kl.write_text("model,temperature_c,kl\nqwen3,25,0.05\n")
    own = ["chip=file", "chip.name=both", "chip.cells=rram_b", f"chip.end_to_end={kl}"]
    done = romer("calibrate", *common, *own)
    assert done.returncode == 0, done.stderr
    folder = smoke_results / "smoke/calibrate/both/qwen3/25"
    fit = json.loads((folder / "calibration.json").read_text())
    assert fit["kl_target"] == 0.05 and abs(fit["kl"] / 0.05 - 1) < 0.02
    assert fit["kl_simulated"] > 0.1 and fit["kl_chip_model"] > 0 and fit["layer_distance"] > 0.1
    assert set(pd.read_csv(folder / "layers.csv").source) == {"chip", "noise model"}


def test_errors_that_overflow_the_model_are_said_in_one_line(smoke_results):
    cells = smoke_results / "huge.csv"
    cells.write_text("temperature_c,g_us,mean_delta_us,sigma_us,cells\n25,1,0,1e30,10\n25,9,0,1e30,10\n")
    common = ["profile=smoke", f"results={smoke_results}", "tracking=disabled", "model=olmoe", "temperature=25"]
    line = one_line(romer("calibrate", *common, "chip=file", "chip.name=huge", f"chip.cells={cells}"))
    assert "chip huge at 25 C: under its own errors the model's KL is" in line and len(line) < 300
    assert not (smoke_results / "smoke/calibrate/huge").exists()


@pytest.mark.parametrize(
    "overrides, culprit",
    [
        (["chip=file", "chip.adc={bits: 8}"], "ADC alone"),
        (["chip=rram_b", "profile.calibrate.identify_bits=[0]"], "identify_bits: found [0]"),
        (["chip=rram_b", "profile.calibrate.window=65"], "calibrate.window: found 65, expected an integer from 2 to"),
    ],
)
def test_what_cannot_be_calibrated_is_said_before_the_work(smoke_results, overrides, culprit):
    common = ["profile=smoke", f"results={smoke_results}", "tracking=disabled", "temperature=100"]
    assert culprit in one_line(romer("calibrate", *common, *overrides))


def test_layers_are_compared_where_both_err():
    assert log_distance([0.0, 0.2, 0.4], [0.1, 0.1, 0.2]) == pytest.approx(0.6931, abs=1e-4)
    assert log_distance([0.0], [0.1]) is None


def test_a_flat_curve_is_followed_down_to_tiny_sigmas():
    """Where any disturbance flips experts, KL hardly falls with σ: 0.03 nats at 1e-4, 0.2 at 0.05."""
    fit = fit_sigma(lambda s: [0.3 * s**0.25], 0.0193)
    assert fit.kl == pytest.approx(0.0193, rel=0.01) and fit.evaluations <= 12
    assert fit.sigma_dev == pytest.approx((0.0193 / 0.3) ** 4, rel=0.05) and fit.slope == pytest.approx(0.25, abs=0.01)


def test_two_close_sigmas_on_a_jump_do_not_set_the_slope():
    fit = fit_sigma(lambda s: [30 * s**2 * (1.01 if s > 0.0816 else 0.99), 30 * s**2], 0.2)
    assert fit.slope == pytest.approx(2, abs=0.1)


def test_draws_of_a_cache_are_made_once():
    kept, plain = KeptDraws(0, 3, "layer.key"), Draws(0, 3, "layer.key")
    first = kept.normal("device", torch.zeros(5, 4))
    assert first.equal(plain.normal("device", (5, 4)))
    grown = kept.normal("device", torch.zeros(6, 4))
    assert grown.equal(plain.normal("device", (6, 4))) and grown[:5].equal(first)
    storage = kept.kept["device", 4].data_ptr()
    for rows in range(7, 11):  # doubled at the sixth row
        assert kept.shared("device", (rows, 4)).data_ptr() == storage
    assert kept.normal("column", (6, 4)).ne(grown).any()


def test_left_padding_is_refused(olmoe, ids):
    from romer import NoiseModel, Placement, program

    rows, mask = ids[:24].view(2, 12), torch.ones(2, 12, dtype=torch.long)
    with program(olmoe, NoiseModel(0.05), 0, Placement("linear+kv")), torch.no_grad():
        olmoe(rows, attention_mask=mask)
        mask[0, :3] = 0
        with pytest.raises(InputError, match="padded on the left"):
            olmoe(rows, attention_mask=mask)
