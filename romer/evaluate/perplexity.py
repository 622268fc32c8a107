"""Token perplexity and the KL divergence between two states of a model, on non-overlapping windows.

    reference = log_probabilities(model, ids, window=512)          # clean
    with program(model, noise, realisation=0):
        perplexity(model, ids, window=512)
        kl_divergence(model, ids, reference, window=512)

Every window is a context of its own, without a BOS token; its first token is context only and is not predicted.
"""

import math

import torch

from romer.errors import InputError


def windows(ids: torch.Tensor, window: int) -> torch.Tensor:
    """Tokens [T] as [T // window, window]; the rest is left out. Raises InputError when there is not one whole
    window."""
    if window < 2 or len(ids) < window:
        raise InputError(f"window: found {window} for a text of {len(ids)} tokens, expected 2 ≤ window ≤ {len(ids)}")
    return ids[: len(ids) // window * window].view(-1, window)


def predicted(tokens: int, window: int) -> int:
    """How many of `tokens` tokens are predicted when they are read in windows."""
    return tokens // window * (window - 1)


def _chunks(model: torch.nn.Module, ids: torch.Tensor, window: int, batch: int):
    """(log-probabilities [b, window - 1, V] float32, their targets [b, window - 1]) of `batch` windows at a time."""
    if type(batch) is not int or batch < 1:
        raise InputError(f"batch: found {batch!r}, expected an integer of at least 1")
    for rows in windows(ids, window).split(batch):
        rows = rows.to(model.device)
        logits = model(rows, use_cache=False).logits[:, :-1]
        yield logits.float().log_softmax(-1), rows[:, 1:]


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor, window: int = 512, batch: int = 2) -> float:
    """exp of the mean negative log-likelihood of the predicted tokens (nats, float64 sum).

    Raises FloatingPointError when the result is not finite.
    """
    total, count = 0.0, 0
    for logp, target in _chunks(model, ids, window, batch):
        total -= logp.gather(-1, target[..., None]).double().sum().item()
        count += target.numel()
    value = math.exp(min(total / count, 700.0)) if math.isfinite(total) else math.nan
    if not math.isfinite(value):
        raise FloatingPointError(f"perplexity is {value}: the model's log-likelihood is {-total}")
    return value


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, ids: torch.Tensor, window: int = 512, batch: int = 2) -> torch.Tensor:
    """log p of every predicted position: float32 [windows, window - 1, V]. Large: V times 4 bytes a token."""
    return torch.cat([logp for logp, _ in _chunks(model, ids, window, batch)])


@torch.no_grad()
def kl_divergence(
    model: torch.nn.Module, ids: torch.Tensor, reference: torch.Tensor, window: int = 512, batch: int = 2
) -> float:
    """KL(p_reference ‖ p_model) in nats, mean over predicted tokens; reference as `log_probabilities` returns it."""
    total, start = 0.0, 0
    for logp, _ in _chunks(model, ids, window, batch):
        expected = reference[start : start + len(logp)]
        total += torch.nn.functional.kl_div(logp, expected, log_target=True, reduction="sum").item()
        start += len(logp)
    return total / (reference.shape[0] * reference.shape[1])
