"""Chips: what was measured on one, at one temperature, as the errors that a simulation puts into a model.

    chip = build(section, "olmoe", 80)          # section: a mapping as in conf/chip/<name>.yaml
    noise = NoiseModel(errors=chip.errors, adc=Converter(chip.adc, ranges) if chip.adc else None)

A chip is known at one or several levels: its cells (a table of measured conductances, or the PCM model), its columns
(gain and residual of matrix-vector products), its ADC, and end to end (the KL divergence that it causes in a model,
measured or implied by a published table). docs/chips.md says how to bring one.
"""

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from romer import published
from romer.adc import Adc
from romer.chips.formats import CELL_TABLE, COLUMN_TABLE, MVM
from romer.chips.formats import CELLS as CELLS_FILE
from romer.chips.measurements import CellTable, ColumnErrors, end_to_end_target, read_cells, read_end_to_end, read_mvm
from romer.chips.pcm import Pcm
from romer.errors import InputError
from romer.noise import ColumnGain, Conductance, Draws, Drift, Error

DATA = Path(__file__).parent / "data"
ABSOLUTE_ZERO_C = -273.15
NAME = r"[A-Za-z0-9][\w.-]*"
LEVELS = ("published", "cells", "pcm", "drift", "columns", "end_to_end", "adc")


@dataclass(frozen=True, eq=False)
class MeasuredCells:
    """Cells with the mean shift and spread that a table gives at one temperature, linear between its conductances.

    g_us, mean_us, sigma_us: float32 [G], µS. Calling it turns target conductances (µS, float32, any shape, within the
    table's range) into those that act: G + mean(G) + σ(G) ε with Gaussian ε. Not cut off at 0: a column adds up the
    table's two moments, and a cut would change both at the low conductances where most cells are.
    """

    g_us: torch.Tensor
    mean_us: torch.Tensor
    sigma_us: torch.Tensor

    def __call__(self, target: torch.Tensor, draws: Draws, kind: str) -> torch.Tensor:
        lines = [v.to(target.device) for v in self._lines]
        below = self._interval(target).flatten()
        start, mean, mean_slope, sigma, sigma_slope = (v.index_select(0, below).view_as(target) for v in lines)
        along = target - start
        mean = mean.addcmul_(mean_slope, along)
        return sigma.addcmul_(sigma_slope, along).mul_(draws.shared(f"{kind} cell", target)).add_(mean).add_(target)

    @functools.cached_property
    def _lines(self) -> tuple[torch.Tensor, ...]:
        """Of every interval between conductances: where it starts, mean and σ there, and their slopes [G - 1]."""
        step = self.g_us.diff()
        start, mean, sigma = (v[:-1] for v in (self.g_us, self.mean_us, self.sigma_us))
        return start, mean, self.mean_us.diff() / step, sigma, self.sigma_us.diff() / step

    @functools.cached_property
    def _bins(self) -> tuple[torch.Tensor, float] | None:
        """(interval in which each of many equal bins begins, bins per µS), where no bin has two conductances in it."""
        low, high = self.g_us[0].item(), self.g_us[-1].item()
        count = int((high - low) / self.g_us.diff().min().item()) + 2
        if count > 2**16:
            return None
        edges = low + (high - low) / count * torch.arange(count, dtype=torch.float64)
        inside = (torch.searchsorted(self.g_us.double(), edges, right=True) - 1).clamp(0, len(self.g_us) - 2)
        return inside.int(), count / (high - low)

    def _interval(self, target: torch.Tensor) -> torch.Tensor:
        """int32: the interval of each target. A table of bins, which is five times as fast as a search."""
        if self._bins is None:
            found = torch.searchsorted(self.g_us.to(target.device), target.contiguous(), right=True) - 1
            return found.clamp_(0, len(self.g_us) - 2).int()
        inside, density = self._bins
        place = ((target - self.g_us[0].item()) * density).int().clamp_(0, len(inside) - 1).flatten()
        found = inside.to(target.device).index_select(0, place)
        next_start = self.g_us.to(target.device)[1:].index_select(0, found)
        return (found + (target.flatten() >= next_start)).clamp_(max=len(self.g_us) - 2).int().view_as(target)


@dataclass(frozen=True)
class Chip:
    """A chip at one temperature.

    errors: of its arrays, in order; adc: None for ideal converters; kl_target: nats per token that it causes in the
    model, None where only a simulation of `errors` and `adc` can tell; layer_error: relative error of each layer where
    it was measured; notes: what a reader must know, e.g. that a temperature lies between measured ones.
    """

    name: str
    temperature_c: float
    errors: tuple[Error, ...] = ()
    adc: Adc | None = None
    kl_target: float | None = None
    layer_error: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


def build(section: Mapping, model: str, temperature_c: float) -> Chip:
    """The chip of a configuration section at a temperature in °C, for a model.

    Raises InputError, in one line, for an unknown level or setting, for files that do not hold what they should, for a
    temperature outside the measured ones, and for a section that says nothing.
    """
    name = section.get("name", "chip")
    if not re.fullmatch(NAME, str(name)):  # results are written to a folder of this name
        raise InputError(
            f"chip.name: found {name!r}, expected letters, digits, '_', '-' and '.', a letter or digit first"
        )
    if not ABSOLUTE_ZERO_C <= temperature_c < math.inf:
        raise InputError(f"chip {name}: found {temperature_c:g} C, expected a temperature of at least -273.15 C")
    unknown = set(section) - {*LEVELS, "name", "models", "temperatures"}
    if unknown:
        raise InputError(f"chip {name}: unknown setting {sorted(unknown)[0]!r}, expected {', '.join(LEVELS)}")
    given = {level: section[level] for level in LEVELS if section.get(level) is not None}
    if not given:
        raise InputError(f"chip {name}: nothing is given, expected one of {', '.join(LEVELS)}")
    if len(given.keys() & {"published", "end_to_end"}) == 2 or len(given.keys() & {"cells", "pcm"}) == 2:
        raise InputError(f"chip {name}: found {', '.join(given)}, expected one target and one kind of cells at most")
    if "pcm" in given and "drift" in given:
        raise InputError(f"chip {name}: found drift beside pcm, whose cells drift by themselves; expected one of them")
    notes: list[str] = []
    adc = _settings(name, "adc", given["adc"], ADC) if "adc" in given else None
    errors: list[Error] = []
    if "cells" in given:
        errors.append(_cells(name, given["cells"], temperature_c, notes))
    if "pcm" in given:
        errors.append(_pcm(name, given["pcm"], temperature_c))
    if "drift" in given:
        errors.append(Drift(**_settings(name, "drift", given["drift"], DRIFT)))
    if "columns" in given:
        if adc is None:
            raise InputError(
                f"chip {name}: columns leave a residual at each conversion: set chip.adc, e.g. {{bits: 8}}"
            )
        gain, residual = _columns(name, given["columns"], temperature_c, notes)
        errors.append(ColumnGain(gain, adc["tile_rows"]))
        adc["residual"] = residual if adc["residual"] is None else adc["residual"]
    target, layer_error = None, None
    if "published" in given:
        target = published.kl_target(given["published"], model, temperature_c)
    if "end_to_end" in given:
        path = files(section)["end_to_end"]
        target, layer_error = end_to_end_target(read_end_to_end(path), path, model, temperature_c)
    if adc is not None:
        adc = Adc(**adc | {"residual": adc["residual"] or 0.0})
    return Chip(name, temperature_c, tuple(errors), adc, target, layer_error, tuple(notes))


# The settings of each level: (type, default); REQUIRED ones have none.
REQUIRED = object()
NUMBER = (int, float)
MAPPING = {"scaling": (str, "tensor"), "compensate": (bool, False), "zero": (str, "low")}
CELLS = {"table": (str, REQUIRED), "g_min_us": (NUMBER, None), "g_max_us": (NUMBER, None), "extrapolate": (bool, False)}
CELLS |= MAPPING
PCM = {"seconds": (NUMBER, Pcm.seconds), "read": (bool, True), "g_max_us": (NUMBER, Pcm.G_MAX_US)}
PCM |= MAPPING | {"compensate": (bool, True)}
COLUMNS = {"table": (str, REQUIRED), "extrapolate": (bool, False)}
DRIFT = {"nu": (NUMBER, REQUIRED), "nu_sigma": (NUMBER, 0.0), "seconds": (NUMBER, REQUIRED), "t0": (NUMBER, Drift.t0)}
ADC = {
    "bits": (int, Adc.bits),
    "form": (str, Adc.form),
    "tile_rows": (int, Adc.tile_rows),
    "percentile": (NUMBER, Adc.percentile),
    "dac_bits": (int, None),
    "residual": (NUMBER, None),
}


def _settings(chip: str, level: str, given: str | Mapping, known: Mapping) -> dict:
    """A level's settings, complete. A bare name or path stands for its table. Raises InputError for any other thing."""
    if isinstance(given, str) and "table" in known:
        given = {"table": given}
    if not isinstance(given, Mapping):
        raise InputError(f"chip {chip}: {level}: found {given!r}, expected {', '.join(known)}")
    if unknown := sorted(map(str, set(given) - set(known))):
        raise InputError(f"chip {chip}: {level}: unknown setting {unknown[0]!r}, expected {', '.join(known)}")
    found = {}
    for name, (kind, default) in known.items():
        value = given.get(name)
        value = default if value is None else value
        if value is REQUIRED:
            raise InputError(f"chip {chip}: {level}: {name} is missing, expected {', '.join(known)}")
        is_bool, wanted = isinstance(value, bool), kind is bool
        if value is not None and (is_bool != wanted or not isinstance(value, kind)):
            word = "a number" if kind is NUMBER else kind.__name__
            raise InputError(f"chip {chip}: {level}.{name}: found {value!r}, expected {word}")
        found[name] = value
    return found


def files(section: Mapping) -> dict[str, Path]:
    """The files that a section reads, by level. Raises InputError for a level that is no table."""
    chip, found = section.get("name", "chip"), {}
    for level, known in (("cells", CELLS), ("columns", COLUMNS), ("end_to_end", {"table": (str, REQUIRED)})):
        if section.get(level) is not None:
            found[level] = table_path(_settings(chip, level, section[level], known)["table"])
    return found


def table_path(name: str) -> Path:
    """A table of the package by its name, or a user's file by its path."""
    path = DATA / f"{name}.csv"
    return path if path in DATA.iterdir() else Path(os.path.expanduser(name))


def _is_derived(path: Path, derived: Sequence[str], single: Sequence[str]) -> bool:
    """Whether a file is a derived table rather than single measurements: it has more of the former's columns.

    False where it cannot be read, so that its reader says what is wrong.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = {name.strip() for name in file.readline().split(",")}
    except (OSError, ValueError):
        return False
    return len(header & set(derived)) > len(header & set(single))


def _between(table: CellTable | ColumnErrors, temperature_c: float, notes: list[str]) -> None:
    if not table.measured(temperature_c):
        known = ", ".join(f"{t:g}" for t in table.temperature_c)
        notes.append(f"{table.name}: {temperature_c:g} C is interpolated or extrapolated from {known} C")


def _cells(chip: str, given: str | Mapping, temperature_c: float, notes: list[str]) -> Conductance:
    o = _settings(chip, "cells", given, CELLS)
    path = table_path(o["table"])
    derived = _is_derived(path, CELL_TABLE, CELLS_FILE)
    table = CellTable.read(path) if derived else CellTable.from_cells(read_cells(path), o["table"])
    table = replace(table, name=o["table"])
    grid, mean, sigma = (torch.tensor(v, dtype=torch.float32) for v in table.at(temperature_c, o["extrapolate"]))
    _between(table, temperature_c, notes)
    low, high = table.g_us[0], table.g_us[-1]
    g_min, g_max = (low if o["g_min_us"] is None else o["g_min_us"]), (high if o["g_max_us"] is None else o["g_max_us"])
    if not low <= g_min < g_max <= high:
        raise InputError(
            f"{path}: column {'g_us' if derived else 'g_target_us'!r}: found {low:g} to {high:g} µS, expected the"
            f" conductance range g_min_us to g_max_us of chip {chip} within it, found {g_min:g} to {g_max:g} µS"
        )
    return Conductance(MeasuredCells(grid, mean, sigma), g_min, g_max, *(o[name] for name in MAPPING))


def _pcm(chip: str, given: Mapping, temperature_c: float) -> Conductance:
    o = _settings(chip, "pcm", given, PCM)
    if temperature_c != Pcm.TEMPERATURE_C:
        raise InputError(f"chip {chip}: found {temperature_c:g} C, expected the measured {Pcm.TEMPERATURE_C:g} C")
    if o["g_max_us"] > Pcm.G_MAX_US:
        raise InputError(f"chip {chip}: pcm.g_max_us: found {o['g_max_us']}, expected at most {Pcm.G_MAX_US}")
    return Conductance(Pcm(o["seconds"], o["read"]), 0.0, o["g_max_us"], *(o[name] for name in MAPPING))


def _columns(chip: str, given: str | Mapping, temperature_c: float, notes: list[str]) -> tuple[float, float]:
    o = _settings(chip, "columns", given, COLUMNS)
    path = table_path(o["table"])
    derived = _is_derived(path, COLUMN_TABLE, MVM)
    table = ColumnErrors.read(path) if derived else ColumnErrors.from_mvm(read_mvm(path), o["table"])
    table = replace(table, name=o["table"])
    _between(table, temperature_c, notes)
    return table.at(temperature_c, o["extrapolate"])
