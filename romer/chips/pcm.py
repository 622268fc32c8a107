"""Phase-change memory as measured on an array of a million cells (Joshi et al. 2020, DOI 10.1038/s41467-020-16108-9;
the formulas as in Nandakumar et al. 2019, DOI 10.1109/ICECS46596.2019.8964852).

    cells = Pcm(seconds=3600)
    noise = NoiseModel(errors=(Conductance(cells, 0.0, Pcm.G_MAX_US, compensate=True),))

Programming spread, drift and read noise of a cell, by its target conductance; measured at room temperature. Powers are
exponentials of logarithms here, because the last bit of torch's pow depends on a number's place in its tensor.
"""

import math
from dataclasses import dataclass

import torch

from romer.errors import InputError
from romer.noise import Draws


@dataclass(frozen=True)
class Pcm:
    """seconds: t after programming, at least T_REFERENCE, when drift is first read; read: whether reads add noise;
    reading: names a further read, with noise of its own; read_seconds: how long a read takes, at most T_REFERENCE: what
    is faster than a read averages out, and of its 1/f noise the slow part stays.

    Calling it turns target conductances (µS, float32, any shape) into those that are read, never below 0.
    """

    seconds: float = 20.0
    read: bool = True
    reading: str = ""
    read_seconds: float = 250e-9  # s, of a read in a matrix-vector product

    G_MAX_US = 25.0  # µS, the largest conductance that was programmed
    T_REFERENCE = 20.0  # s, of the read that the programming spread refers to
    TEMPERATURE_C = 25.0  # "room temperature"; the source has no other

    def __post_init__(self):
        if not self.T_REFERENCE <= self.seconds < math.inf:
            raise InputError(f"pcm seconds: found {self.seconds}, expected at least {self.T_REFERENCE:g}")
        if not 0 < self.read_seconds <= self.T_REFERENCE:
            found = f"read_seconds: found {self.read_seconds}"
            raise InputError(f"{found}, expected more than 0 and at most {self.T_REFERENCE:g}")

    def __call__(self, target: torch.Tensor, draws: Draws, kind: str) -> torch.Tensor:
        g = (target / self.G_MAX_US).clamp(min=1e-6)  # of the full range; a reset cell has a logarithm, too
        conductance = (target + self.programming_sigma(g) * draws.shared(f"{kind} programming", target)).clamp(min=0)
        if self.seconds > self.T_REFERENCE:
            nu = self.drift_mean(g) + self.drift_sigma(g) * draws.shared(f"{kind} drift", target)
            conductance = conductance * (-math.log(self.seconds / self.T_REFERENCE) * nu.clamp(min=0)).exp()
        if self.read:
            sigma = conductance * self.read_q(g) * self.read_time(self.seconds, self.read_seconds)
            conductance = (conductance + sigma * draws.shared(f"{kind} read{self.reading}", target)).clamp(min=0)
        return conductance

    def decay(self, target: torch.Tensor) -> torch.Tensor:
        """What drift leaves of target conductances (µS, any shape) on average, by their mean ν: 1 at T_REFERENCE."""
        g = (target / self.G_MAX_US).clamp(min=1e-6)
        return (-math.log(self.seconds / self.T_REFERENCE) * self.drift_mean(g)).exp()

    def read_sigma(self, target: torch.Tensor) -> torch.Tensor:
        """µS, standard deviation of a read's own noise over cells of target conductances (µS, any shape), before a read
        is cut off at 0.

        It goes with the root mean square of what was programmed (a Gaussian cut off at 0) and has drifted.
        """
        g = (target / self.G_MAX_US).clamp(min=1e-6)
        sigma = self.programming_sigma(g).clamp(min=1e-6)
        z = target / sigma
        density = (-(z.square()) / 2).exp() / math.sqrt(2 * math.pi)
        square = (target.square() + sigma.square()) * torch.special.ndtr(z) + target * sigma * density
        spread = ((math.log(self.seconds / self.T_REFERENCE) * self.drift_sigma(g)) ** 2).exp()  # of drift, in the rms
        gathered = self.read_time(self.seconds, self.read_seconds)
        return square.sqrt() * self.decay(target) * spread * self.read_q(g) * gathered

    @staticmethod
    def programming_sigma(g: torch.Tensor) -> torch.Tensor:
        """µS, of g = G / 25 µS."""
        return (-1.1731 * g**2 + 1.9650 * g + 0.26348).clamp(min=0)

    @staticmethod
    def drift_mean(g: torch.Tensor) -> torch.Tensor:
        """Mean of ν, of g = G / 25 µS."""
        return (-0.0155 * g.log() + 0.0244).clamp(0.049, 0.1)

    @staticmethod
    def drift_sigma(g: torch.Tensor) -> torch.Tensor:
        """Spread of ν over cells, of g = G / 25 µS."""
        return (-0.0125 * g.log() - 0.0059).clamp(0.008, 0.045)

    @staticmethod
    def read_q(g: torch.Tensor) -> torch.Tensor:
        """Q of the 1/f read noise, of g = G / 25 µS."""
        return (0.0088 * (-0.65 * g.log()).exp()).clamp(max=0.2)

    @staticmethod
    def read_time(seconds: float, read_seconds: float) -> float:
        """sqrt(ln((t + t_r) / (2 t_r))): what 1/f noise has gathered at t in a read of t_r."""
        return math.sqrt(max(math.log((seconds + read_seconds) / (2 * read_seconds)), 0.0))
