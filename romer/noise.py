"""Device noise of analog arrays, eq. 2-3 of the ROMER paper (arXiv:2605.11800): w̃ = w (1 + ε), ε ~ N(0, σ_dev²).

    noise = NoiseModel(sigma_dev=0.1)
    w_noisy = noise.realise("model.layers.0.self_attn.q_proj.weight", w, realisation=3)

A realisation is one programming of the arrays. Its draws come from generators keyed by (seed, realisation, tensor,
replica, kind), never from the global one, so they depend on nothing else: not on the order of the tensors, not on
batches, processes or other libraries. A fused 3-D experts tensor holds one array per expert, each with a generator of
its own, so an expert slot can be reprogrammed by itself.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

from romer.errors import InputError


def generator(seed: int, realisation: int, tensor: str, replica: int, kind: str) -> np.random.Generator:
    """The generator of one key: Philox under a 128-bit hash (torch's CPU generator reads 32 bits of its seed)."""
    key = f"{seed}|{realisation}|{tensor}|{replica}|{kind}".encode()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(key).digest()[:16], "big")))


@dataclass(frozen=True)
class NoiseModel:
    """Eq. 2 with its parameter.

    sigma_dev: relative standard deviation of a programmed weight (dimensionless, ≥ 0); seed: of the project's draws.
    Raises InputError for a σ that is negative or not finite.
    """

    sigma_dev: float
    seed: int = 0

    def __post_init__(self):
        if not math.isfinite(self.sigma_dev) or self.sigma_dev < 0:
            raise InputError(f"sigma_dev: found {self.sigma_dev}, expected a finite number ≥ 0")

    def epsilon(self, name: str, shape: torch.Size, realisation: int, replica: int = 0) -> torch.Tensor:
        """ε of one array: float32 of `shape` on the CPU, N(0, σ_dev²)."""
        normal = generator(self.seed, realisation, name, replica, "device").standard_normal(tuple(shape), np.float32)
        return self.sigma_dev * torch.from_numpy(normal)

    def realise(self, name: str, weight: torch.Tensor, realisation: int, replica: int = 0) -> torch.Tensor:
        """The noisy weight as programmed, in the weight's dtype; the noise is applied in float32 before the cast.

        weight: [out, in], or [E, out, in] for fused experts (one array per expert). σ_dev = 0 returns the weight
        bitwise.
        """
        if self.sigma_dev == 0:
            return weight.clone()
        if weight.dim() == 3:
            return torch.stack(
                [self.realise(slot_name(name, i), w, realisation, replica) for i, w in enumerate(weight)]
            )
        epsilon = self.epsilon(name, weight.shape, realisation, replica).to(weight.device)
        return (weight.float() * (1.0 + epsilon)).to(weight.dtype)  # eq. 2


def slot_name(name: str, slot: int) -> str:
    """The array of one expert slot of the fused tensor `name`."""
    return f"{name}[{slot}]"
