"""ROMER: what analog compute-in-memory hardware does to mixture-of-experts language models, and what mends it.

import romer
model, tokenizer = romer.load_model("results/standin/standin/olmoe/checkpoint")
activation = romer.profile(model, ids).magnitude
plan = romer.ReplacementPlan.fit(activation, n_replace=4)
with romer.program(model, romer.NoiseModel(sigma_dev=0.1), realisation=0):
    with romer.apply(model, plan=plan, calibration=romer.RouterCalibration("iqr", strength=0.2)):
        romer.perplexity(model, ids)
"""

import gc

_collecting = gc.isenabled()
gc.disable()  # while thousands of modules are loaded, collecting between them takes a fifth of the time

from romer.errors import InputError
from romer.evaluate.perplexity import kl_divergence, log_probabilities, perplexity
from romer.models import load_model
from romer.noise import NoiseModel
from romer.placement import Placement, coverage
from romer.profiling import Profile, profile
from romer.programming import program
from romer.replacement import ReplacementPlan
from romer.routing import RouterCalibration, apply

if _collecting:
    gc.enable()
del gc

__all__ = [
    "InputError",
    "NoiseModel",
    "Placement",
    "Profile",
    "ReplacementPlan",
    "RouterCalibration",
    "apply",
    "coverage",
    "kl_divergence",
    "load_model",
    "log_probabilities",
    "perplexity",
    "profile",
    "program",
]
