"""Eq. 4: what a converter does to a partial sum, where its range comes from, and what decides its noise."""

import dataclasses
import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from romer.adc import FORMS, Adc, Converter, Range, RangeFinder, gaussian, hashed, mix, quantise, step, uniform
from romer.errors import InputError
from romer.noise import key_of

N = 200_000
Y = 4 * torch.rand(N, generator=torch.Generator().manual_seed(5)) - 2  # twice as wide as V_REF, which is ±1
V_REF = 2.0
KEY = key_of(0, 0, "layer.q_proj", 0, "adc")


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def converter(v_ref=(V_REF,), rms=None, inputs=1.0, **fields) -> Converter:
    """A converter with one product, `p`."""
    v_ref = torch.tensor(v_ref)
    return Converter(Adc(**fields), {"p": Range(v_ref, v_ref / 6 if rms is None else torch.tensor(rms), inputs)})


@pytest.mark.parametrize("bits", [2, 6, 8, 12])
def test_quantise_rounds_to_the_codes_of_its_bits(bits):
    out, delta, top = quantise(Y, V_REF, bits), step(V_REF, bits), 2 ** (bits - 1) - 1
    codes = out.double() / delta
    assert (codes - codes.round()).abs().max() < 1e-3  # float32: 24 bits for codes of at most 11
    assert set(codes.round().int().unique().tolist()) == set(range(-top, top + 1))
    inside = Y.abs() <= V_REF / 2
    assert (out - Y).abs()[inside].max() <= delta / 2 + 2**-23  # the rounding of y / Δ and of code · Δ, below 1
    torch.testing.assert_close(out[~inside], Y[~inside].sign() * top * delta, rtol=2**-22, atol=0)  # clipped
    assert torch.equal(quantise(out, V_REF, bits), out)  # idempotent
    assert torch.equal(quantise(-Y, V_REF, bits), -out)  # odd
    assert (quantise(Y.sort().values, V_REF, bits).diff() >= 0).all()  # monotone


def test_a_further_bit_halves_the_error():
    y = Y[Y.abs() < V_REF / 2]
    rms = [(quantise(y, V_REF, bits) - y).double().square().mean().sqrt().item() for bits in range(4, 13)]
    for bits, value in zip(range(4, 13), rms, strict=True):  # the mean square of n errors varies by sqrt(0.8 / n)
        assert abs(value / (step(V_REF, bits) / math.sqrt(12)) - 1) < 2 * math.sqrt(0.8 / len(y))
    assert (quantise(y, V_REF, 24) - y).abs().max() <= 2**-24  # Δ/2 and a rounding, both half a float32 step below 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_converted_in_float32(dtype):
    """Codes of 10 bits do not fit bfloat16's 8, those of 12 bits not float16's 11."""
    bits, x = {torch.bfloat16: 10, torch.float16: 12}[dtype], Y.to(dtype)
    sent = converter(inputs=1.0, dac_bits=bits).inputs(x, Range(torch.ones(1), torch.ones(1), 1.0))
    assert sent.dtype == dtype and torch.equal(sent, quantise(x.float(), 2.0, bits).to(dtype))


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("level", [0.0, 0.3, 40.0])
def test_uniform_is_eq_4_and_never_clips(bits, level):
    found, delta = converter(form="uniform", bits=bits), step(V_REF, bits)
    y = torch.full((N // 100, 100), level)
    e = (found.product("p", y[:, :1], torch.ones(100, 1), KEY, torch.arange(len(y))).double() - y).flatten()
    assert abs(e.mean()) < 4 * delta / math.sqrt(12 * N)
    assert abs(e.std() - delta / math.sqrt(12)) < 4 * delta / math.sqrt(12) * math.sqrt(0.2 / N)  # kurtosis 1.8
    assert e.abs().max() <= delta / 2 + level * 2**-23
    assert stats.kstest(e.numpy(), "uniform", (-delta / 2, delta)).pvalue > 1e-4


def tiles(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [50, 20] and w [7, 20] in eighths, so that every partial sum is exact in float32."""
    numbers = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-8, 9, shape, generator=numbers) / 8 for shape in ((50, 20), (7, 20)))
    return x, w


@pytest.mark.parametrize("dac_bits", [None, 4])
def test_a_product_is_the_sum_of_its_tiles_as_converted(dac_bits):
    (x, w), v_ref, bits = tiles(), np.float32([3.3, 2.13, 1.7]), 6  # no ties; 20 inputs: tiles of 8, 8 and 4
    found = converter(v_ref.tolist(), inputs=0.9, bits=bits, tile_rows=8, dac_bits=dac_bits)
    sent = x.double().numpy()
    if dac_bits:
        delta = 2 * 0.9 / 15
        sent = (sent / delta).round().clip(-7, 7) * delta
    expected = np.zeros((50, 7))
    for tile, cut in enumerate(np.split(np.arange(20), [8, 16])):
        delta = v_ref[tile].astype(float) / 63
        expected += (sent[:, cut] @ w.double().numpy()[:, cut].T / delta).round().clip(-31, 31) * delta
    y = found.product("p", x, w, KEY, torch.arange(50))
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-5)  # float32's sum; one code is worth 0.03
    assert np.abs(expected - (x @ w.T).numpy()).max() > 0.1  # clipping and rounding are seen


def test_an_array_that_holds_all_inputs_is_one_tile():
    (x, w), rows = tiles(), torch.arange(50)
    for tile_rows in (20, 21, 256):
        y = converter((5.0,), bits=6, tile_rows=tile_rows).product("p", x, w, KEY, rows)
        assert torch.equal(y, quantise(x @ w.T, 5.0, 6))
    assert not torch.equal(converter((5.0, 5.0), bits=6, tile_rows=19).product("p", x, w, KEY, rows), y)


def test_tiles_are_converted_with_noise_of_their_own():
    """Also the tiles that a KV cache adds beyond those of calibration."""
    found, rows = converter((1.0, 1.0), form="uniform", tile_rows=1), torch.arange(N // 100)
    zero = torch.zeros(len(rows), 100)
    drawn = [found.convert(zero, found.ranges["p"], tile, KEY, rows) for tile in range(4)]
    for a, b in itertools.combinations(drawn, 2):
        assert abs(correlation(a, b)) < 4 / math.sqrt(N)
    x = torch.zeros(len(rows), 2)
    both = found.product("p", x, torch.zeros(100, 2), KEY, rows)
    torch.testing.assert_close(both, drawn[0] + drawn[1], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_residual_is_relative_to_the_rms_of_the_partial_sums(form):
    found = converter((2.0,), rms=(0.25,), form=form, bits=16, residual=0.2)
    y = torch.zeros(N // 100, 100)
    e = found.convert(y, found.ranges["p"], 0, KEY, torch.arange(len(y))).double().flatten()
    sigma = 0.2 * 0.25  # Δ = 3e-5 adds 2e-8 of it
    assert abs(e.mean()) < 4 * sigma / math.sqrt(N) and abs(e.std() / sigma - 1) < 4 / math.sqrt(2 * N)
    assert stats.kstest(e.numpy(), "norm", (0, sigma)).pvalue > 1e-4


def test_residual_and_rounding_are_independent():
    hashes = hashed(KEY, torch.arange(N // 100), 100)
    normal, flat = gaussian(mix(hashes)), uniform(hashes)
    for a, b in itertools.product((normal, normal.abs()), (flat, (flat - 0.5).abs())):
        assert abs(correlation(a, b)) < 4 / math.sqrt(N)


def test_mix_is_the_finaliser_of_splitmix64():
    """The reference's first outputs for the seed 1234567, whose state grows by the golden gamma."""
    state = torch.tensor([(1234567 + i * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for i in range(1, 5)])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [x % 2**64 for x in mix(state).tolist()] == expected
    near = torch.cat([torch.arange(-N, N), torch.arange(N) << 40, torch.arange(N) * -(2**33) - 1])
    near = near.unique()
    assert mix(near).unique().numel() == near.numel()


def test_hashes_are_uniform_and_normal():
    hashes = hashed(KEY, torch.arange(N // 100), 100)
    u, z = uniform(hashes).flatten(), gaussian(hashes).flatten()
    assert u.dtype == z.dtype == torch.float32 and u.min() >= 0 and u.max() < 1 and z.isfinite().all()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("draw", [uniform, gaussian])
def test_hashes_of_keys_rows_and_columns_are_independent(draw):
    rows = torch.arange(N // 100 + 1)
    base = draw(hashed(KEY, rows, 101))
    others = [
        draw(hashed(key_of(*part), rows, 101))  # realisation, tensor, replica, seed
        for part in ((0, 1, "layer.q_proj", 0, "adc"), (0, 0, "layer.k_proj", 0, "adc"))
        + ((0, 0, "layer.q_proj", 1, "adc"), (1, 0, "layer.q_proj", 0, "adc"))
    ]
    for a, b in [(base, x) for x in others] + [(base[1:], base[:-1]), (base[:, 1:], base[:, :-1])]:
        assert abs(correlation(a, b)) < 4 / math.sqrt(N)
    assert abs(correlation(base.mean(0)[1:], base.mean(0)[:-1])) < 4 / math.sqrt(100)  # nor do columns share an offset
    assert base.mean(0).std() < base.std() / math.sqrt(len(rows)) * (1 + 4 / math.sqrt(2 * 101))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_converted_alike_whatever_else_is_in_the_batch(form):
    found, rows = converter(form=form, residual=0.1), torch.randperm(500, generator=torch.Generator().manual_seed(0))
    y = Y[: 500 * 40].view(500, 40)
    whole = found.convert(y, found.ranges["p"], 0, KEY, rows)
    for part in ([3], [499, 0, 7], range(100, 300)):
        part = torch.tensor(part)
        assert torch.equal(found.convert(y[part], found.ranges["p"], 0, KEY, rows[part]), whole[part])
    assert not torch.equal(found.convert(y, found.ranges["p"], 0, KEY, rows + 500), whole)  # the rows do decide


def test_the_hashes_never_change():
    drawn = hashed(10**30, torch.tensor([0, 1, -5, 2**62]), 3)
    assert hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:16] == "6a79e93f53c39317"


@pytest.mark.parametrize("percentile", [50.1, 90.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_ranges_are_percentiles_within_one_percent(percentile, scale):
    y = scale * torch.randn(40, 5000, generator=torch.Generator().manual_seed(2))
    finder = RangeFinder(Adc(percentile=percentile))
    for part in y.split(7):
        assert torch.equal(finder.note("p", 0, part), part)
    finder.note("p", "input", y)
    found = finder.ranges()["p"]
    exact = np.quantile(y.abs().numpy(), percentile / 100, method="inverted_cdf")
    for value in (found.v_ref.item() / 2, found.inputs):  # the upper edge of a bin of e^0.01; its log is in float32
        assert exact * (1 - 1e-5) < value < exact * math.exp(0.01) * (1 + 1e-5)
    if percentile < 99.9:  # where neighbours are closer than the bin
        assert abs(found.v_ref.item() / 2 / y.abs().flatten().quantile(percentile / 100) - 1) < 0.0102
    torch.testing.assert_close(found.rms.double(), y.double().square().mean().sqrt()[None], rtol=1e-6, atol=0)


def test_ranges_depend_neither_on_order_nor_on_batches():
    x, w = Y[:40_000].view(2000, 20), Y[-140:].view(7, 20)

    def ranges(order, size):
        finder = RangeFinder(Adc(tile_rows=8, percentile=99))
        for part in order.split(size):
            y = finder.product("p[3]", x[part], w, KEY, part)
            torch.testing.assert_close(y, x[part] @ w.T, rtol=0, atol=1e-5)  # float32's sums of 20 terms below 4
        return finder.ranges()

    base, *others = (
        ranges(order, size)
        for order, size in (
            (torch.arange(2000), 2000),
            (torch.arange(2000), 9),
            (torch.randperm(2000, generator=torch.Generator().manual_seed(1)), 300),
        )
    )
    assert list(base) == ["p"] and base["p"].v_ref.shape == base["p"].rms.shape == (3,)
    for other in others:
        assert torch.equal(other["p"].v_ref, base["p"].v_ref) and other["p"].inputs == base["p"].inputs
        torch.testing.assert_close(other["p"].rms, base["p"].rms, rtol=1e-6, atol=0)


def test_tiles_and_products_have_ranges_of_their_own():
    finder, x = RangeFinder(Adc(tile_rows=4)), torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    x[:, 4:] *= 10
    for slot in (0, 1):  # the slots of a layer share theirs
        finder.product(f"experts.down_proj[{slot}]", x * (1 + slot), torch.eye(8), KEY, torch.arange(300))
    finder.product("q_proj", x, torch.eye(8), KEY, torch.arange(300))
    found = finder.ranges()
    assert list(found) == ["experts.down_proj", "q_proj"]
    assert (found["q_proj"].v_ref[1] / found["q_proj"].v_ref[0]).item() == pytest.approx(10, rel=0.3)
    largest = 2 * 2 * x.abs().max().item()
    assert found["experts.down_proj"].v_ref[1].item() == pytest.approx(largest, rel=0.02)
    assert Converter(Adc(), found).range_of("experts.down_proj[7]") is found["experts.down_proj"]


def message(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_product_that_calibration_did_not_see_is_refused():
    found = message(converter().product, "layer.k_proj[3]", torch.ones(1, 4), torch.ones(2, 4), KEY, torch.arange(1))
    assert found.startswith("adc: no calibrated range for layer.k_proj;")


def test_ranges_of_other_tiles_are_refused():
    """20 inputs in tiles of 4 are five partial sums; ranges of two tiles of 16 say nothing about them."""
    x, w = tiles()
    assert "p" in message(converter((1.0, 1.0), tile_rows=4).product, "p", x, w, KEY, torch.arange(50))


@pytest.mark.parametrize(
    "field, values",
    {
        "bits": [1, 25, 8.0, True, "8", None],
        "dac_bits": [1, 25, 7.5, "8"],
        "form": ["round", None],
        "tile_rows": [0, -1, 2.5, "256", True],
        "percentile": [50, 100.1, math.nan, "99", None],
        "residual": [-0.1, math.nan, math.inf, "0.1", None],
    }.items(),
)
def test_every_field_is_checked(field, values):
    for value in values:
        found = message(Adc, **{field: value})
        assert found.startswith(f"adc.{field}: found ") and str(value) in found
    assert dataclasses.asdict(Adc()) | {"bits": 6} == dataclasses.asdict(Adc(bits=6))
