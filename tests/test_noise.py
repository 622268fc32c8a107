"""The errors of arrays: eq. 2, conductances, columns and drift, and that nothing but their key decides them."""

import hashlib
import itertools
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from romer.chips.pcm import Pcm
from romer.encoding import PLAIN, Replicated, realise
from romer.errors import InputError
from romer.noise import (
    CLEAN,
    ColumnGain,
    Conductance,
    Draws,
    Drift,
    NoiseModel,
    Proportional,
    generator,
    mirror,
    slot_name,
)

WEIGHT = torch.randn(400, 500, generator=torch.Generator().manual_seed(3))
EXPERTS = torch.randn(4, 60, 50, generator=torch.Generator().manual_seed(4))
N = WEIGHT.numel()


def errors(noise: NoiseModel, weight: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """ε of a programmed weight, from its values alone: w̃ / w - 1 in float64."""
    return noise.realise("layer.weight", weight, *args, **kwargs).double() / weight.double() - 1


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("weight", [WEIGHT, EXPERTS], ids=["matrix", "fused experts"])
def test_relative_errors_are_gaussian_with_the_given_sigma(sigma, weight):
    e, n = errors(NoiseModel(sigma), weight, 0), weight.numel()
    assert abs(e.mean()) < 4 * sigma / math.sqrt(n)
    assert abs(e.std() - sigma) < 4 * sigma / math.sqrt(2 * n)
    assert stats.kstest(e.flatten().numpy(), "norm", (0, sigma)).pvalue > 1e-4


def test_errors_do_not_depend_on_the_weight():
    e = errors(NoiseModel(0.1), WEIGHT, 0)
    assert abs(correlation(e, WEIGHT)) < 4 / math.sqrt(N)
    assert abs(correlation(e.abs(), WEIGHT.abs())) < 4 / math.sqrt(N)
    other = NoiseModel(0.1).realise("layer.weight", torch.full_like(WEIGHT, 2.0), 0).double() / 2 - 1
    torch.testing.assert_close(other, e, atol=1e-6, rtol=0)


def test_sigma_scales_the_errors_of_a_realisation():
    small, large = (errors(NoiseModel(s), WEIGHT, 5) for s in (0.05, 0.2))
    torch.testing.assert_close(large, 4 * small, atol=1e-6, rtol=0)


KEY = dict(seed=0, realisation=0, tensor="a.weight", replica=0, kind="device")


@pytest.mark.parametrize(
    "change", [dict(seed=1), dict(realisation=1), dict(tensor="b.weight"), dict(replica=1), dict(kind="adc")], ids=str
)
def test_each_part_of_the_key_gives_independent_draws(change):
    a, b = (torch.from_numpy(generator(**key).standard_normal(N)) for key in (KEY, KEY | change))
    assert abs(correlation(a, b)) < 4 / math.sqrt(N)


def test_realisation_replica_name_and_seed_reach_the_weights():
    base = errors(NoiseModel(0.1), WEIGHT, 0)
    others = [
        errors(NoiseModel(0.1), WEIGHT, 1),
        errors(NoiseModel(0.1), WEIGHT, 0, replica=1),
        errors(NoiseModel(0.1, seed=1), WEIGHT, 0),
        NoiseModel(0.1).realise("other.weight", WEIGHT, 0).double() / WEIGHT.double() - 1,
    ]
    for e in others:
        assert abs(correlation(base, e)) < 4 / math.sqrt(N)


def test_an_expert_slot_is_an_array_of_its_own():
    noise = NoiseModel(0.1)
    whole = noise.realise("experts.down_proj", EXPERTS, 2)
    for i, w in enumerate(EXPERTS):
        assert torch.equal(noise.realise(slot_name("experts.down_proj", i), w, 2), whole[i])
    e = whole / EXPERTS - 1
    for i in range(len(EXPERTS)):
        for j in range(i):
            assert abs(correlation(e[i], e[j])) < 4 / math.sqrt(e[0].numel())


def test_sigma_zero_is_bitwise_clean_and_a_copy():
    special = torch.tensor([[0.0, -0.0, 1e-42, 3e38, -1.5]])
    for weight in (special, special.bfloat16(), EXPERTS):
        out = NoiseModel(0.0).realise("w", weight, 0)
        assert out.dtype == weight.dtype
        assert out.flatten().view(torch.uint8).equal(weight.flatten().view(torch.uint8))
        assert out.data_ptr() != weight.data_ptr()


def test_the_weight_itself_is_left_alone():
    weight = EXPERTS.clone()
    NoiseModel(0.3).realise("w", weight, 0)
    assert torch.equal(weight, EXPERTS)


def test_the_same_key_gives_the_same_bits_whatever_happened_before():
    noise, threads = NoiseModel(0.1), torch.get_num_threads()
    first = noise.realise("w", WEIGHT, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        noise.realise("w", WEIGHT, 9)
        noise.realise("v", EXPERTS, 0)
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            assert torch.equal(noise.realise("w", WEIGHT, 0), first)
        finally:
            torch.set_num_threads(threads)


def test_another_process_draws_the_same_bits():
    code = "import torch; from romer.noise import NoiseModel; print(NoiseModel(0.1).epsilon('w', (3, 5), 2).tolist())"
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(NoiseModel(0.1).epsilon("w", (3, 5), 2).tolist()), result.stderr


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    NoiseModel(0.1).realise("w", EXPERTS, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_rounded_once_after_the_noise(dtype):
    """With ε added in the weight's dtype, 1 + ε at σ = 0.002 is far off; rounded once, w̃ is within half a step."""
    noise, weight = NoiseModel(0.002), WEIGHT.to(dtype)
    exact = weight.double() * (1 + noise.epsilon("w", weight.shape, 0).double())
    out = noise.realise("w", weight, 0)
    assert out.dtype == dtype
    normal = exact.abs() > 1e-3  # float16 is subnormal below 6e-5, where a step is no longer relative
    step = torch.finfo(dtype).eps * 2.0 ** (exact.frexp().exponent - 1)
    half_step = step * (0.5 + 1e-3)  # float32's own rounding on top
    assert ((out.double() - exact).abs() <= half_step)[normal].all()
    naive = weight * (1 + noise.epsilon("w", weight.shape, 0).to(dtype))
    assert ((naive.double() - exact).abs() > half_step)[normal].double().mean() > 0.1  # the test can tell


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
def test_a_sigma_that_is_no_sigma_is_refused(sigma):
    with pytest.raises(InputError, match="sigma_dev: found"):
        NoiseModel(sigma)


def perfect(target, draws, kind):
    return target


def spread(target, draws, kind):
    """0.5 µS on every cell."""
    return target + 0.5 * draws.normal(kind, target)


DRAWS = Draws(0, 0, "w")
ERRORS = {
    "proportional": Proportional(0.1),
    "column": ColumnGain(0.1),
    "drift": Drift(0.05, 0.02, 1e4),
    "cells": Conductance(spread, 1.0, 26.0),
    "columns of cells": Conductance(spread, 1.0, 26.0, "column", compensate=True),
    "pcm": Conductance(Pcm(3600.0), 0.0, 25.0, "column", compensate=True),
}
every_error = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)


def test_the_bits_of_a_realisation_never_change():
    """Of a matrix, of fused experts, and of ε: results of earlier runs stay comparable."""
    w = torch.arange(-30, 30) / 8
    drawn = [
        NoiseModel(0.1).realise("w", w.view(6, 10), 3),
        NoiseModel(0.1, seed=5).realise("w", w.view(3, 4, 5), 0, 2),
    ]
    drawn.append(NoiseModel(0.1).epsilon("v", (3, 5), 1))
    assert [hashlib.sha256(x.numpy().tobytes()).hexdigest()[:12] for x in drawn] == [
        "54dbaa985935",
        "c65bcb558ff2",
        "41d91cd5c87a",
    ]


@pytest.mark.parametrize("kind", ["device", "column"])
def test_the_first_rows_of_a_longer_draw_are_those_of_a_shorter(kind):
    """A KV cache grows by rows; odd sizes, as a generator of 32-bit numbers may buffer halves of 64."""
    long = DRAWS.normal(kind, (101, 7))
    for rows in (1, 2, 50, 99):
        assert torch.equal(DRAWS.normal(kind, (rows, 7)), long[:rows])
        assert torch.equal(DRAWS.normal(kind, torch.empty(rows, 7, dtype=torch.bfloat16)), long[:rows])
    assert torch.equal(DRAWS.normal(kind, (101,)), long.flatten()[:101])


def test_kinds_replicas_and_realisations_are_independent_whatever_is_drawn_before():
    arrays = [DRAWS, Draws(0, 1, "w"), Draws(0, 0, "w", 1), Draws(1, 0, "w"), Draws(0, 0, "v")]
    kinds = ["device", "column", "drift", "plus", "minus"]
    drawn = {(i, kind): a.normal(kind, WEIGHT) for i, a in enumerate(arrays) for kind in kinds}
    n = len(drawn)
    matrix = torch.corrcoef(torch.stack([x.flatten() for x in drawn.values()]))
    # the largest of n (n - 1) / 2 = 300 correlations, each N(0, 1 / N): beyond 5 with a probability of 2e-4
    assert (matrix - torch.eye(n)).abs().max() < 5 / math.sqrt(N)
    again = {key: arrays[key[0]].normal(key[1], WEIGHT) for key in reversed(drawn)}
    assert all(torch.equal(again[key], drawn[key]) for key in drawn)


@pytest.mark.parametrize("encoding", [PLAIN, Replicated(2)], ids=["plain", "two copies"])
def test_mirror_images_err_by_as_much_in_the_other_direction(encoding):
    """So what changes in proportion to an error cancels in the mean of an antithetic pair."""
    for weight in (WEIGHT, EXPERTS):
        one, other = (realise(encoding, NoiseModel(0.2), "w", weight, r) - weight for r in (3, mirror(3)))
        torch.testing.assert_close(one, -other, rtol=0, atol=1e-6)
        assert one.std() > 0.1
    assert mirror(mirror(3)) == 3 and mirror(CLEAN) == CLEAN


@every_error
def test_errors_depend_on_their_key_alone(error):
    """Not on the order of layers, on threads, or on the global generators, which lm-eval's `simple_evaluate` seeds;
    here they are seeded as it does, without it."""
    noise, threads, states = (
        NoiseModel(0.1, errors=(error,)),
        torch.get_num_threads(),
        (random.getstate(), np.random.get_state()),
    )
    layers = {name: WEIGHT[:50] for name in "abc"} | {"e": EXPERTS}
    first = {name: noise.realise(name, w, 0) for name, w in layers.items()}
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(0), np.random.seed(1234), torch.manual_seed(1234)
            torch.set_num_threads(1 if threads > 1 else 2)
            state = torch.get_rng_state()
            for name in reversed(layers):
                noise.realise("other", WEIGHT, 0)
                assert torch.equal(noise.realise(name, layers[name], 0), first[name])
            assert torch.equal(torch.get_rng_state(), state)
        finally:
            torch.set_num_threads(threads)
            random.setstate(states[0]), np.random.set_state(states[1])
    assert all(torch.equal(noise.realise(name, w, 0), first[name]) for name, w in layers.items())
    for i, w in enumerate(EXPERTS):  # an expert slot is an array of its own, with a range and columns of its own
        assert torch.equal(noise.realise(slot_name("e", i), w, 0), first["e"][i])


@every_error
def test_the_number_of_threads_does_not_reach_the_last_bit(error):
    """Odd sizes: what a thread is left with at the end of its share must be computed as the rest."""
    noise, threads = NoiseModel(errors=(error,)), torch.get_num_threads()
    weight = torch.randn(513, 577, generator=torch.Generator().manual_seed(8))
    try:
        torch.set_num_threads(1)
        alone = noise.realise("w", weight, 0)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(noise.realise("w", weight, 0), alone), count
    finally:
        torch.set_num_threads(threads)


@every_error
@pytest.mark.parametrize("outputs", [0, 1])
def test_rows_that_are_written_later_change_nothing(error, outputs):
    """A KV cache: a token's key and value are written once, whatever comes after them."""
    noise, rows = NoiseModel(0.05, errors=(error,)), torch.randn(401, 7, generator=torch.Generator().manual_seed(9))
    whole = noise.store(rows, DRAWS, outputs, 3.0)
    for length in (1, 2, 5, 9, 100, 399):
        assert torch.equal(noise.store(rows[:length], DRAWS, outputs, 3.0), whole[:length]), length


@every_error
def test_realisations_and_replicas_have_errors_of_their_own(error):
    noise = NoiseModel(errors=(error,))
    e = [
        noise.realise(*key) - WEIGHT
        for key in (("w", WEIGHT, 0), ("w", WEIGHT, 1), ("w", WEIGHT, 0, 1), ("v", WEIGHT, 0))
    ]
    for x in e[1:]:
        assert rms(x - e[0]) > 0.1 * rms(e[0]) > 0  # drift has a common part


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_errors_are_applied_after_eq_2_in_order():
    gain, cells = ColumnGain(0.1), Conductance(spread, 0.0, 25.0)
    for errors in ((gain, cells), (cells, gain)):
        by_hand = Proportional(0.2)(WEIGHT, DRAWS)
        for error in errors:
            by_hand = error(by_hand, DRAWS)
        assert torch.equal(NoiseModel(0.2, errors=errors).realise("w", WEIGHT, 0), by_hand)
    assert torch.equal(NoiseModel(0.2).realise("w", WEIGHT, 0), Proportional(0.2)(WEIGHT, DRAWS))
    low = WEIGHT.bfloat16()  # in float32 throughout, one cast at the end
    assert torch.equal(
        NoiseModel(0.2, errors=errors).realise("w", low, 0),
        NoiseModel(0.2, errors=errors).realise("w", low.float(), 0).bfloat16(),
    )


# ---- conductances


@pytest.mark.parametrize("scaling", ["tensor", "column"])
@pytest.mark.parametrize("outputs", [0, 1])
@pytest.mark.parametrize("g_min, g_max", [(0.0, 25.0), (1.0, 40.0)])
def test_perfect_cells_give_the_weight_back(scaling, outputs, g_min, g_max):
    read = Conductance(perfect, g_min, g_max, scaling)(WEIGHT, DRAWS, outputs)
    # g_min + w s and its difference to g_min are rounded to half a float32 step of at most g_max, 2^-24 g_max
    worst = 4 * 2**-24 * g_max / (g_max - g_min) * WEIGHT.abs().max()
    torch.testing.assert_close(read, WEIGHT, rtol=4 * 2**-24, atol=worst.item())


@pytest.mark.parametrize("scaling, outputs", [("tensor", 0), ("column", 0), ("column", 1)])
def test_weights_are_stored_as_differential_pairs(scaling, outputs):
    targets = {}

    def offset(target, draws, kind):
        assert draws == DRAWS
        targets[kind] = target.double().numpy()
        return target + {"plus": 3.0, "minus": 1.0}[kind]

    read = Conductance(offset, 2.0, 22.0, scaling)(WEIGHT, DRAWS, outputs)
    w = WEIGHT.double().numpy()
    top = np.abs(w).max() if scaling == "tensor" else np.abs(w).max(axis=1 - outputs, keepdims=True)
    np.testing.assert_allclose(targets["plus"], 2 + 20 * np.clip(w, 0, None) / top, rtol=1e-6)
    np.testing.assert_allclose(targets["minus"], 2 + 20 * np.clip(-w, 0, None) / top, rtol=1e-6)
    assert targets["plus"].max() == pytest.approx(22) and np.minimum(targets["plus"], targets["minus"]).max() == 2.0
    np.testing.assert_allclose(read.numpy(), w + (3 - 1) * top / 20, rtol=1e-5, atol=1e-5)


def test_both_cells_of_a_pair_err_independently():
    seen = {}

    def cells(target, draws, kind):
        seen[kind] = spread(target, draws, kind) - target
        return target + seen[kind]

    e = (Conductance(cells, 0.0, 25.0)(WEIGHT, DRAWS) - WEIGHT) * 25 / WEIGHT.abs().max()
    assert abs(correlation(seen["plus"], seen["minus"])) < 4 / math.sqrt(N)
    assert abs(e.std() / (0.5 * math.sqrt(2)) - 1) < 4 / math.sqrt(2 * N)  # σ of the difference of two cells
    assert abs(correlation(e, WEIGHT)) < 4 / math.sqrt(N)


def test_compensation_restores_the_mean_decay():
    def decay(target, draws, kind):
        return target * (0.7 + 0.05 * draws.normal(kind, target))

    read = {c: Conductance(decay, 0.0, 25.0, compensate=c)(WEIGHT, DRAWS) for c in (False, True)}
    assert (read[False].abs().sum() / WEIGHT.abs().sum()).item() == pytest.approx(0.7, abs=1e-3)
    assert (read[True].abs().sum() / WEIGHT.abs().sum()).item() == pytest.approx(1, abs=1e-5)
    factor = (read[True].double() / read[False])[WEIGHT != 0]  # one digital factor an array
    assert factor.max() / factor.min() - 1 < 1e-6
    assert torch.equal(  # a KV cache has none: its factor would depend on tokens that are still to come
        Conductance(decay, 0.0, 25.0, compensate=True)(WEIGHT, DRAWS, 0, 3.0),
        Conductance(decay, 0.0, 25.0)(WEIGHT, DRAWS, 0, 3.0),
    )


@pytest.mark.parametrize("scaling", ["tensor", "column"])
def test_a_given_full_range_clips_and_does_not_depend_on_the_values(scaling):
    cells = Conductance(spread, 0.0, 25.0, scaling)
    clipped = Conductance(perfect, 0.0, 25.0, scaling)(WEIGHT, DRAWS, 0, 1.5)
    torch.testing.assert_close(clipped, WEIGHT.clamp(-1.5, 1.5), rtol=1e-6, atol=0)
    larger = torch.cat([WEIGHT, 100 * WEIGHT])
    assert torch.equal(cells(larger, DRAWS, 0, 1.5)[: len(WEIGHT)], cells(WEIGHT, DRAWS, 0, 1.5))
    e = (cells(WEIGHT, DRAWS, 0, 1.5) - clipped) * 25 / 1.5
    assert abs(e.std() / (0.5 * math.sqrt(2)) - 1) < 4 / math.sqrt(2 * N)


@pytest.mark.parametrize("scaling", ["tensor", "column"])
@pytest.mark.parametrize("compensate", [False, True])
def test_columns_of_zeros_are_read_without_a_nan(scaling, compensate):
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    for w in (weight, weight.T, torch.zeros(3, 4)):
        for outputs in (0, 1):
            read = Conductance(perfect, 1.0, 41.0, scaling, compensate)(w, DRAWS, outputs)
            torch.testing.assert_close(read, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "low, high", [(-1.0, 5.0), (5.0, 5.0), (6.0, 5.0), (0.0, math.inf), (math.nan, 5.0), (0.0, math.nan)]
)
def test_a_conductance_range_that_is_none_is_refused(low, high):
    with pytest.raises(InputError, match="^conductance range: found .*, expected 0 ≤ g_min < g_max$"):
        Conductance(perfect, low, high)


def test_an_unknown_scaling_is_refused():
    with pytest.raises(InputError, match="^conductance scaling: found 'row', expected tensor or column$"):
        Conductance(perfect, 0.0, 25.0, "row")


# ---- columns and drift


@pytest.mark.parametrize("outputs", [0, 1])
def test_column_gain_is_drawn_anew_for_every_tile(outputs):
    shape = (40, 600) if outputs == 0 else (600, 40)
    gain = ColumnGain(0.1, tile_rows=256)(torch.ones(shape), DRAWS, outputs)
    along = gain if outputs == 0 else gain.T  # [40 outputs, 600 inputs]
    for start, stop in ((0, 256), (256, 512), (512, 600)):
        assert (along[:, start:stop] == along[:, start : start + 1]).all()
    assert (along[:, 255] != along[:, 256]).all() and (along[:, 511] != along[:, 512]).all()


@pytest.mark.parametrize("outputs", [0, 1])
def test_column_gain_multiplies_whole_outputs(outputs):
    wide = WEIGHT if outputs == 0 else WEIGHT.T
    gain = ColumnGain(0.1, tile_rows=1000)(torch.ones_like(wide), DRAWS, outputs)
    along = gain if outputs == 0 else gain.T  # [400, 500], one gain a row
    assert torch.equal(along, along[:, :1].expand_as(along))
    assert torch.equal(ColumnGain(0.1, tile_rows=1000)(wide, DRAWS, outputs), wide * gain)
    assert abs(along[:, 0].mean() - 1) < 4 * 0.1 / math.sqrt(400)
    assert abs(along[:, 0].std() / 0.1 - 1) < 4 / math.sqrt(2 * 400)
    assert torch.equal(NoiseModel(errors=(ColumnGain(0.1),)).realise("w", WEIGHT, 0), ColumnGain(0.1)(WEIGHT, DRAWS))


def test_nothing_drifts_before_the_reference_read():
    for seconds in (0.0, 1.0, 20.0):
        assert torch.equal(Drift(0.1, 0.05, seconds)(WEIGHT, DRAWS), WEIGHT)
    assert not torch.equal(Drift(0.1, 0.05, 20.1)(WEIGHT, DRAWS), WEIGHT)
    assert torch.equal(Drift(0.1, 0.05, 3600.0, t0=3600.0)(WEIGHT, DRAWS), WEIGHT)


def test_drift_is_a_power_of_time_with_an_exponent_for_every_cell():
    times = [1e2, 1e4, 1e6, 3e7]
    decays = [Drift(0.05, 0.02, t)(torch.ones_like(WEIGHT), DRAWS).double().log() for t in times]
    exponents = [-decay / math.log(t / 20) for decay, t in zip(decays, times, strict=True)]
    for a, b in itertools.combinations(exponents, 2):  # float32's 2^-23 of a decay, over ln(100 / 20) = 1.6
        torch.testing.assert_close(a, b, rtol=0, atol=2e-7)
    nu = exponents[-1].flatten()
    assert nu.min() == 0  # cells do not gain conductance: N(0.05, 0.02²) is below 0 for 0.6 % of them
    assert (nu == 0).double().mean().item() == pytest.approx(stats.norm.cdf(-2.5), rel=4 / math.sqrt(0.0062 * N))
    kept = nu[nu > 1e-6].numpy()
    assert stats.kstest(kept, stats.truncnorm(-2.5, math.inf, 0.05, 0.02).cdf).pvalue > 1e-4


def test_drift_without_spread_is_one_factor():
    drifted = Drift(0.06, 0.0, 3600.0)(WEIGHT, DRAWS)
    torch.testing.assert_close(drifted, WEIGHT * (3600 / 20) ** -0.06, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda v: Proportional(v), "sigma_dev"),
        (lambda v: ColumnGain(v), "column gain sigma"),
        (lambda v: Drift(v, 0.0, 1.0), "drift nu"),
        (lambda v: Drift(0.0, v, 1.0), "drift nu_sigma"),
        (lambda v: Drift(0.0, 0.0, v), "drift seconds"),
        (lambda v: Drift(0.0, 0.0, 1.0, t0=v), "drift t0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_parameters_of_errors_are_checked(make, field):
    for value in (-0.1, math.nan, math.inf, *([0.0] if field == "drift t0" else [])):
        with pytest.raises(InputError, match=f"^{field}: found {value}, expected .*$"):
            make(value)


def test_draws_are_the_callers_own_and_the_same_again():
    like = torch.empty(3, 4)
    first = Draws(0, 0, "w").normal("device", like)
    kept = first.clone()
    first.mul_(0.0)
    assert Draws(0, 0, "w").normal("device", like).equal(kept)
    assert Draws(0, 0, "w").normal("device", (3, 4)).equal(kept)
