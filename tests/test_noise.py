"""Eq. 2: the distribution of the device errors, and that nothing but their key decides them."""

import math
import os
import subprocess
import sys

import pytest
import torch
from scipy import stats

from romer.errors import InputError
from romer.noise import NoiseModel, generator, slot_name

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
