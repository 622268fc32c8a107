"""Perplexity and KL against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from romer.errors import InputError
from romer.evaluate.perplexity import kl_divergence, log_probabilities, perplexity, predicted, windows
from romer.noise import NoiseModel
from romer.programming import program


def direct(model, ids, window: int) -> float:
    """exp of the mean cross-entropy, one window at a time, from the model's logits in float64."""
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - window + 1, window):
            row = ids[start : start + window]
            z = model(row[None]).logits[0].double()
            losses += F.cross_entropy(z[:-1], row[1:], reduction="none").tolist()
    assert len(losses) == predicted(len(ids), window)
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("window", [2, 50, 128])
def test_perplexity_is_its_definition(model, ids, window):
    text = ids[:20] if window == 2 else ids
    assert perplexity(model, text, window) == pytest.approx(direct(model, text, window), rel=1e-5)


def test_batches_do_not_matter(model, ids):
    clean = log_probabilities(model, ids, 32)
    with program(model, NoiseModel(0.1)):
        values = [perplexity(model, ids, 32, batch) for batch in (1, 3, 8, 100)]
        divergences = [kl_divergence(model, ids, clean, 32, batch) for batch in (1, 3, 8, 100)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)
    assert divergences == pytest.approx([divergences[0]] * 4, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(olmoe, ids):
    olmoe.lm_head.weight.zero_()
    assert perplexity(olmoe, ids, 32) == pytest.approx(64, rel=1e-6)


def test_windows_are_contexts_of_their_own(olmoe, ids):
    """Text before the window changes nothing, and what does not fill a window is left out."""
    whole = log_probabilities(olmoe, ids, 64)
    torch.testing.assert_close(log_probabilities(olmoe, ids[64:128], 64)[0], whole[1], atol=1e-4, rtol=1e-4)
    assert perplexity(olmoe, ids[:150], 64) == pytest.approx(perplexity(olmoe, ids[:128], 64), rel=1e-6)
    assert torch.equal(windows(ids[:150], 64).flatten(), ids[:128])
    assert predicted(150, 64) == 126


def test_log_probabilities_are_of_the_predicted_tokens(olmoe, ids):
    found = log_probabilities(olmoe, ids, 32)
    assert found.shape == (8, 31, 64) and found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(8, 31), atol=1e-5, rtol=0)
    chosen = found.gather(-1, ids.view(8, 32)[:, 1:, None])
    assert math.exp(-chosen.double().mean()) == pytest.approx(perplexity(olmoe, ids, 32), rel=1e-6)


def test_kl_is_its_definition_and_not_symmetric(model, ids):
    clean = log_probabilities(model, ids, 32)
    with program(model, NoiseModel(0.1)):
        noisy = log_probabilities(model, ids, 32)
        found = kl_divergence(model, ids, clean, 32)
    p, q = clean.double(), noisy.double()
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    backwards = kl_divergence(model, ids, noisy, 32)
    assert backwards == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-4)
    assert found > 0 and backwards > 0 and abs(found - backwards) > 1e-5 * found


def test_kl_of_a_model_with_itself_is_zero_and_grows_with_the_noise(olmoe, ids):
    clean = log_probabilities(olmoe, ids, 32)
    assert kl_divergence(olmoe, ids, clean, 32) == 0
    values = []
    for sigma in (0.01, 0.03, 0.1):
        with program(olmoe, NoiseModel(sigma)):
            values.append(kl_divergence(olmoe, ids, clean, 32))
    assert 0 < values[0] < values[1] < values[2]
    assert kl_divergence(olmoe, ids, clean, 32) == 0


def test_gradients_are_not_kept(olmoe, ids):
    olmoe.requires_grad_(True)
    assert not log_probabilities(olmoe, ids, 64).requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_broken_has_no_perplexity(olmoe, ids, value):
    olmoe.lm_head.weight[3, 3] = value
    with pytest.raises(FloatingPointError, match="perplexity is"):
        perplexity(olmoe, ids, 32)


@pytest.mark.parametrize("window", [0, 1, 257])
def test_a_window_that_does_not_fit_is_refused(olmoe, ids, window):
    with pytest.raises(InputError, match=f"window: found {window} for a text of 256 tokens, expected 2 ≤ window ≤ 256"):
        perplexity(olmoe, ids, window)


@pytest.mark.parametrize("batch", [0, -1, 1.5])
def test_a_batch_that_is_none_is_refused(olmoe, ids, batch):
    with pytest.raises(InputError, match=f"batch: found {batch}, expected an integer of at least 1"):
        perplexity(olmoe, ids, 32, batch)
