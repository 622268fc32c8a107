"""Our PCM cells beside aihwkit's `PCMLikeNoiseModel` and CrossSim's `PCMJoshi`, as one table.

    python benchmarks/peers/pcm.py [seed] > benchmarks/peers/pcm.csv

CELLS cells of one target conductance each, after programming, after drift, and as read; aihwkit counts its time from
our reference read (t_inference = t - 20 s). Each comparison is made twice: with our definition, and with ours changed
to aihwkit's in the two points where they differ (`as_aihwkit`), which leaves the formulas and the draws to compare.
"""

import math
import sys

import numpy as np
import torch
from scipy import stats
from table import write

from romer.chips.pcm import Pcm
from romer.noise import Draws

try:
    from aihwkit.inference import PCMLikeNoiseModel
    from simulator import AnalogCore, CrossSimParameters
except ImportError as error:
    sys.exit(f"{error}: pip install --no-deps aihwkit==1.1.0, and CrossSim 3.2.0 as in benchmarks/peers/README.md")

CELLS = 1_000_000
CONDUCTANCES_US = (0.0, 1.0, 5.0, 12.5, 20.0, 25.0)  # 0: of most cells of a pair, the other one carries the weight
SECONDS = (60.0, 3600.0, 31_536_000.0)  # a minute, an hour, a year
PLUS = "plus"


def as_aihwkit(seconds: float, read: bool, target: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Our cells by aihwkit's definitions: a negative ν changes its sign, and Q follows the programmed conductance."""
    g = target / Pcm.G_MAX_US
    programmed = Pcm(Pcm.T_REFERENCE, read=False)(target, draws, PLUS)
    nu = (Pcm.drift_mean(g) + Pcm.drift_sigma(g) * draws.normal(f"{PLUS} drift", target)).abs()
    drifted = programmed * (seconds / Pcm.T_REFERENCE) ** -nu
    if not read:
        return drifted
    q = Pcm.read_q((programmed / Pcm.G_MAX_US).clamp(min=1e-6))
    noise = drifted * q * Pcm.read_time(seconds, Pcm.read_seconds) * draws.normal(f"{PLUS} read", target)
    return (drifted + noise).clamp(min=0)


def aihwkit(seconds: float, read: bool, target: torch.Tensor) -> torch.Tensor:
    """Conductances of aihwkit's model at `seconds` after programming."""
    model = PCMLikeNoiseModel(g_max=Pcm.G_MAX_US, read_noise_scale=float(read))
    programmed = model.apply_programming_noise_to_conductance(target)
    if seconds == Pcm.T_REFERENCE and not read:
        return programmed
    nu = model.generate_drift_coefficients(target)
    return model.apply_drift_noise_to_conductance(programmed, nu, seconds - model.t_0)


def crosssim(target: torch.Tensor) -> torch.Tensor:
    """Conductances that CrossSim programs by a fit of its own to Fig. 3b of Joshi et al. 2020."""
    parameters = CrossSimParameters()
    device = parameters.xbar.device
    device.Rmin, device.infinite_on_off_ratio = 1e6 / Pcm.G_MAX_US, True
    device.programming_error.enable = True
    device.programming_error.model = "PCMJoshi"
    weight = (target / Pcm.G_MAX_US)[None]
    weight = torch.cat([weight, torch.ones(1, 1)], 1)  # the array's largest weight is at G_MAX_US
    (core,) = AnalogCore(weight.numpy(), parameters).cores[0]
    return torch.from_numpy(core.core_pos.matrix)[0, :-1] * Pcm.G_MAX_US  # the positive cell of each pair


def row(quantity: str, seconds: float, peer: str, definition: str, g_us: float, ours, theirs) -> dict:
    """Two samples of conductances (µS); standard errors are of the difference of their means and of their stds."""
    ours, theirs = ours.double().numpy(), theirs.double().numpy()
    mean_se = math.hypot(ours.std(), theirs.std()) / math.sqrt(CELLS)
    std_se = math.hypot(*(x.std() * math.sqrt((stats.kurtosis(x, fisher=False) - 1) / 4) for x in (ours, theirs)))
    std_se /= math.sqrt(CELLS)
    return {
        "quantity": quantity,
        "seconds": int(seconds),
        "g_us": g_us,
        "peer": peer,
        "definition": definition,
        "ours_mean": ours.mean(),
        "peer_mean": theirs.mean(),
        "mean_se": mean_se,
        "mean_difference_percent": 100 * (ours.mean() / theirs.mean() - 1),
        "mean_z": (ours.mean() - theirs.mean()) / mean_se,
        "ours_std": ours.std(),
        "peer_std": theirs.std(),
        "std_se": std_se,
        "std_difference_percent": 100 * (ours.std() / theirs.std() - 1),
        "std_z": (ours.std() - theirs.std()) / std_se,
    }


def main(seed: int = 0) -> None:
    torch.manual_seed(seed)  # aihwkit draws from torch's global generator, CrossSim from numpy's
    np.random.seed(seed)
    rows = []
    for g_us in CONDUCTANCES_US:
        target, start = torch.full((CELLS,), g_us), Pcm.T_REFERENCE
        programmed = Pcm(start, read=False)(target, Draws(seed, len(rows), "cells"), PLUS)
        rows.append(row("programmed", start, "aihwkit", "ours", g_us, programmed, aihwkit(start, False, target)))
        rows.append(row("programmed", start, "CrossSim", "ours", g_us, programmed, crosssim(target)))
        for seconds in SECONDS:
            for quantity, read in (("drifted", False), ("read", True)):
                theirs, draws = aihwkit(seconds, read, target), Draws(seed, len(rows), "cells")
                ours = Pcm(seconds, read)(target, draws, PLUS)
                rows.append(row(quantity, seconds, "aihwkit", "ours", g_us, ours, theirs))
                ours = as_aihwkit(seconds, read, target, draws)
                rows.append(row(quantity, seconds, "aihwkit", "aihwkit's", g_us, ours, theirs))
    write(rows, ("aihwkit", "CrossSim", "torch"), f"{CELLS} cells; seed {seed}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
