"""A reading counts as far as it can be trusted, and the best that can be made of it does no harm."""

import math
from dataclasses import replace

import pytest
import torch

from romer.chips.pcm import Pcm
from romer.errors import InputError
from romer.noise import Conductance, Draws, Drift, NoiseModel
from romer.readback import LEAST_CELLS, _groups, as_read, estimate, read_sigma, unit

SIGMA = 0.1
WEIGHT = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
PCM = Conductance(Pcm(), 0.0, Pcm.G_MAX_US)


def normal(seed):
    return torch.randn(WEIGHT.shape, generator=torch.Generator().manual_seed(seed))


def mse(estimated, true):
    return (estimated - true).square().mean().item()


@pytest.fixture
def stands():
    """What the cells hold under eq. 2."""
    return WEIGHT * (1 + SIGMA * normal(1))


def read(stands, s):
    return stands + s * normal(2), torch.full_like(WEIGHT, s)


def test_an_exact_reading_is_taken_at_its_word(stands):
    reading, sigma = read(stands, 0.0)
    assert estimate(reading, WEIGHT, sigma).equal(stands)
    assert estimate(reading, WEIGHT, read_sigma(NoiseModel(SIGMA), WEIGHT)).equal(stands)


@pytest.mark.parametrize("s", [0.02, 0.1, 0.5])
def test_it_is_as_good_as_if_the_devices_were_known(stands, s):
    """Within 10 % of the posterior mean under eq. 2 with its true σ_dev, and better than the reading and than none."""
    reading, sigma = read(stands, s)
    tau = (SIGMA * WEIGHT).square()
    known = WEIGHT + tau / (tau + s**2) * (reading - WEIGHT)
    assert mse(estimate(reading, WEIGHT, sigma), stands) < 1.1 * mse(known, stands)
    assert mse(known, stands) < min(mse(reading, stands), mse(WEIGHT, stands))


@pytest.mark.parametrize(("cells", "most"), [(100, 30.0), (2500, 1.5), (40000, 1.1)])
def test_a_reading_that_says_nothing_does_no_harm(cells, most):
    """Squared error over that of no reading at all, which a hundredfold reading error would make 10 000."""
    with_it, without = 0.0, 0.0
    for a in range(400_000 // cells):
        weight, error, noise = torch.randn(3, 1, cells, generator=torch.Generator().manual_seed(a))
        stands = weight * (1 + SIGMA * error)
        with_it += mse(estimate(stands + 10 * noise, weight, torch.full_like(weight, 10.0)), stands)
        without += mse(weight, stands)
    assert with_it < most * without


def test_a_shift_that_cells_have_in_common_is_found_under_noise(stands):
    """Toward zero, as drift: by the mean over like cells, whatever a single reading is worth."""
    shifted = stands - 0.3 * WEIGHT
    reading, sigma = read(shifted, 1.0)
    assert mse(estimate(reading, WEIGHT, sigma), shifted) < 0.3 * mse(WEIGHT, shifted)


@pytest.mark.parametrize(("seconds", "compensate"), [(20.0, False), (86400.0, False), (86400.0, True)])
def test_read_noise_of_cells_is_that_of_many_reads(seconds, compensate):
    """Its variance over 100 reads, on average over cells of like size, within 5 %: it goes with what was programmed
    and has drifted, of which only the root mean square is known."""
    pairs = replace(PCM, cells=Pcm(seconds), compensate=compensate)
    many = [replace(pairs, cells=Pcm(seconds, reading=f" {i}"))(WEIGHT, Draws(0, 0, "w")) for i in range(100)]
    found, expected = torch.stack(many).var(0), read_sigma(NoiseModel(errors=(pairs,)), WEIGHT).square()
    for low, high in ((0.1, 0.5), (0.5, 1.0), (1.0, 4.0)):
        cells = (WEIGHT.abs() >= low) & (WEIGHT.abs() < high)
        assert found[cells].mean().item() == pytest.approx(expected[cells].mean().item(), rel=0.05)


def test_a_slower_read_is_less_noisy_and_known_to_be():
    """By what 1/f noise gathers between a read of 250 ns and one of 10 ms: ln(t / 2 t_r), an hour after programming."""
    noise = NoiseModel(errors=(replace(PCM, cells=Pcm(3600.0)),))
    quiet = NoiseModel(errors=(replace(PCM, cells=Pcm(3600.0, read=False)),)).realise("w", WEIGHT, 0)
    found, expected = [], []
    for seconds in (Pcm.read_seconds, 0.01):
        seen = as_read(noise, read_seconds=seconds)
        found.append(mse(seen.realise("w", WEIGHT, 0), quiet))
        expected.append(read_sigma(seen, WEIGHT).square().mean().item())
    ratio = math.log(3600 / 0.02) / math.log(3600 / 500e-9)
    assert expected[1] / expected[0] == pytest.approx(ratio, rel=1e-3)
    assert found[1] / found[0] == pytest.approx(ratio, rel=0.05)  # of some 40 000 cells


@pytest.mark.parametrize("seconds", [0.0, -1.0, 21.0, math.nan])
def test_a_read_takes_some_time_and_is_over_before_drift_is_first_read(seconds):
    with pytest.raises(InputError, match="read_seconds: found"):
        as_read(NoiseModel(errors=(PCM,)), read_seconds=seconds)


def test_columns_of_different_ranges_are_weighed_each_by_its_own():
    """Cells whose columns have another full range err by as much less: in one group with the others they would be
    trusted as those are."""
    scale = torch.where(torch.arange(200) % 2 == 0, 1.0, 0.05)[:, None]
    pairs = Conductance(lambda g, draws, kind: g + 0.5 * draws.normal(kind, g), 0.0, 25.0, "column")
    noise, weight = NoiseModel(errors=(pairs,)), WEIGHT * scale
    stands, sigma = pairs(weight, Draws(0, 0, "w")), torch.full_like(WEIGHT, 0.02)
    reading = stands + sigma * normal(2)
    alone, together = (estimate(reading, weight, sigma, u) for u in (unit(noise, weight), None))
    narrow = scale.squeeze() < 1
    assert mse(alone[narrow], stands[narrow]) < 0.5 * mse(together[narrow], stands[narrow])
    assert mse(alone[~narrow], stands[~narrow]) < 1.05 * mse(together[~narrow], stands[~narrow])


def test_the_few_largest_weights_are_weighed_by_cells_like_them():
    """Whose errors stand far above the reading's: an estimate that took them for average cells would drop them."""
    weight = WEIGHT.clone()
    weight.view(-1)[:300] *= 10
    stands = weight * (1 + SIGMA * normal(1))
    sigma = torch.full_like(weight, 0.1)
    estimated = estimate(stands + sigma * normal(2), weight, sigma)
    assert mse(estimated.flatten()[:300], stands.flatten()[:300]) < 1.3 * 0.1**2


@pytest.mark.parametrize("scaling", ["tensor", "column"])
def test_arrays_together_are_read_as_one_by_one(scaling):
    pairs = replace(PCM, scaling=scaling, compensate=True, cells=Pcm(seconds=86400.0))
    noise, arrays = NoiseModel(errors=(pairs,)), (WEIGHT, 3 * WEIGHT.flip(0), 0.1 * WEIGHT.flip(1))
    stacked = torch.cat(arrays)
    sigma = read_sigma(noise, stacked, 0.01, arrays=3)
    torch.testing.assert_close(sigma, torch.cat([read_sigma(noise, w, 0.01) for w in arrays]))
    readings = [noise.realise("w", w, 0) + 0.01 * w.abs().max() * normal(3) for w in arrays]
    found = estimate(torch.cat(readings), stacked, sigma, unit(noise, stacked), arrays=3)
    parts = zip(readings, arrays, strict=True)
    alone = [estimate(m, w, read_sigma(noise, w, 0.01), unit(noise, w)) for m, w in parts]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [[5000, 300, 100, 90, 100, 10, 0, 0, 1], [10, 3, 1], [0, 700, 0, 1, 300, 0]])
def test_groups_are_large_enough_and_in_order(counts):
    groups = _groups([counts]).tolist()
    sizes = [sum(c for c, g in zip(counts, groups, strict=True) if g == k) for k in range(max(groups) + 1)]
    assert groups == sorted(groups, reverse=True) and sum(sizes) == sum(counts)
    assert all(size >= LEAST_CELLS for size in sizes if size) or len(set(groups)) == 1


def test_a_read_back_has_noise_of_its_own_and_no_drift_before_its_time():
    noise = NoiseModel(errors=(replace(PCM, cells=Pcm(seconds=86400.0)), Drift(0.05, 0.01, 86400.0)))
    (written,) = as_read(noise, written=True).errors
    assert written.cells == Pcm(reading=" back")
    later, drift = as_read(noise, reading="another").errors
    assert later.cells == Pcm(86400.0, reading=" another") and drift == noise.errors[1]
    assert as_read(NoiseModel(SIGMA)) == NoiseModel(SIGMA)
    quiet = replace(PCM, cells=Pcm(read=False))(WEIGHT, Draws(0, 0, "w"))
    a, b = (replace(PCM, cells=Pcm(reading=r))(WEIGHT, Draws(0, 0, "w")) - quiet for r in ("", " back"))
    correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(WEIGHT.numel())
