"""Eq. 2 beside CrossSim's proportional device and aihwkit's multiplicative weight noise, as one table.

    python benchmarks/peers/device_noise.py > benchmarks/peers/device_noise.csv

The same matrix is programmed by both sides through their public interfaces. Two definitions are compared:

weight   every weight has one relative error, (w̃ - w) / w: eq. 2. CrossSim does so where a zero weight is a zero
         conductance (infinite on/off ratio), as one cell of a pair is then silent.
pair     both cells of a pair have a relative error and a smallest conductance of a tenth of the largest,
         (w̃ - w) / max|w|: CrossSim's default, our `Conductance` with proportional cells.
"""

import math
import sys

import numpy as np
import torch
from scipy import stats
from table import write

from romer.noise import Conductance, Draws, NoiseModel

try:
    from aihwkit.nn import AnalogLinear
    from aihwkit.simulator.configs import TorchInferenceRPUConfig, WeightModifierType
    from simulator import AnalogCore, CrossSimParameters
except ImportError as error:
    sys.exit(f"{error}: pip install --no-deps aihwkit==1.1.0, and CrossSim 3.2.0 as in benchmarks/peers/README.md")

SIZE = 512  # a tile of aihwkit; SIZE² weights
WEIGHT_STD = 0.02  # of a typical transformer's initialisation
SIGMAS = (0.02, 0.1, 0.3)  # small, typical, and one at which some cells reach zero
ON_OFF_RATIO = 10  # CrossSim's default, Rmax / Rmin
G_MAX_US = 25.0  # cancels


def crosssim(weight: torch.Tensor, sigma: float, infinite_on_off_ratio: bool) -> torch.Tensor:
    """The weight as CrossSim's balanced core holds it after programming with `NormalProportionalDevice`."""
    parameters = CrossSimParameters()
    device = parameters.xbar.device
    device.infinite_on_off_ratio = infinite_on_off_ratio
    device.Rmin, device.Rmax = 1e3, 1e3 * ON_OFF_RATIO
    device.programming_error.enable = True
    device.programming_error.model = "NormalProportionalDevice"
    device.programming_error.magnitude = sigma
    return torch.from_numpy(np.asarray(AnalogCore(weight.numpy(), parameters).get_matrix(), np.float32))


def aihwkit(weight: torch.Tensor, sigma: float) -> torch.Tensor:
    """The weight that aihwkit's torch tile multiplies with in training under `MULT_NORMAL`: its product with I."""
    config = TorchInferenceRPUConfig()
    config.forward.is_perfect = True
    config.modifier.type = WeightModifierType.MULT_NORMAL
    config.modifier.std_dev = sigma
    layer = AnalogLinear(SIZE, SIZE, bias=False, rpu_config=config)
    layer.set_weights(weight)
    return layer.train()(torch.eye(SIZE)).detach().T


def proportional_pair(sigma: float) -> NoiseModel:
    """Our differential pairs with a relative error of each cell and an on/off ratio of ON_OFF_RATIO."""

    def cells(target: torch.Tensor, draws: Draws, kind: str) -> torch.Tensor:
        return (target * (1 + sigma * draws.normal(kind, target))).clamp(min=0)

    return NoiseModel(errors=(Conductance(cells, G_MAX_US / ON_OFF_RATIO, G_MAX_US),))


def row(case: str, sigma: float, peer: str, weight: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> dict:
    """Two programmed weights compared; the standard errors are of the difference of two samples."""
    unit = weight.double() if case == "weight" else weight.abs().max().double()
    errors = [((noisy.double() - weight) / unit).flatten().numpy() for noisy in (ours, theirs)]
    std = [e.std() for e in errors]
    kurtosis = stats.kurtosis(errors[0], fisher=False)
    ks = stats.ks_2samp(*errors, method="asymp")
    size = weight.abs().flatten().numpy()
    correlation = [np.corrcoef((n - weight).abs().flatten().numpy(), size)[0, 1] for n in (ours, theirs)]
    flipped = [((n * weight) < 0).double().mean().item() for n in (ours, theirs)]
    return {
        "case": case,
        "sigma": sigma,
        "peer": peer,
        "cells": weight.numel(),
        "ours_mean": errors[0].mean(),
        "peer_mean": errors[1].mean(),
        "mean_se": math.hypot(*std) / math.sqrt(weight.numel()),
        "ours_std": std[0],
        "peer_std": std[1],
        "std_se": math.hypot(*std) * math.sqrt((kurtosis - 1) / (4 * weight.numel())),
        "ks": ks.statistic,
        "ks_p": ks.pvalue,
        "ours_correlation": correlation[0],  # of |w̃ - w| with |w|
        "peer_correlation": correlation[1],
        "ours_flipped": flipped[0],  # share of weights that changed their sign
        "peer_flipped": flipped[1],
    }


def main() -> None:
    weight = WEIGHT_STD * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    np.random.seed(0)  # CrossSim draws from numpy's global generator, aihwkit from torch's
    torch.manual_seed(0)
    rows = []
    for sigma in SIGMAS:
        ours = NoiseModel(sigma).realise("weight", weight, realisation=0)
        rows.append(row("weight", sigma, "CrossSim", weight, ours, crosssim(weight, sigma, True)))
        rows.append(row("weight", sigma, "aihwkit", weight, ours, aihwkit(weight, sigma)))
        ours = proportional_pair(sigma).realise("weight", weight, realisation=0)
        rows.append(row("pair", sigma, "CrossSim", weight, ours, crosssim(weight, sigma, False)))
    write(rows, ("CrossSim", "aihwkit", "torch"), "seed 0")


if __name__ == "__main__":
    main()
