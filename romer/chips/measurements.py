"""Measurements of a chip, at three levels: single cells, matrix-vector products (MVM), and a whole language model.

    table = CellTable.from_cells(read_cells("cells.csv"), "mychip")     # or CellTable.read("derived.csv")
    g_us, mean_delta_us, sigma_us = table.at(60)                        # interpolated unless table.measured(60)
    columns = ColumnErrors.from_mvm(read_mvm("mvm.csv"), "mychip")      # or ColumnErrors.read("columns.csv")
    gain_std, residual_std = columns.at(25)
    kl, layer_std = end_to_end_target(read_end_to_end("kl.csv"), "kl.csv", "olmoe", 25)

docs/chips.md describes the files; `romer.chips.formats` reads them, and refuses whatever does not belong.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from romer.chips.formats import (
    CELL_TABLE,
    CELLS,
    COLUMN_TABLE,
    END_TO_END,
    MVM,
    check_frame,
    csv_text,
    number_text,
    read_csv,
    refuse,
)
from romer.errors import InputError

MIN_CELLS = 10  # the standard deviation of ten reads has itself a relative standard error of 24 %
MIN_MVM_ROWS = 3  # gain and offset leave one degree of freedom for the residual


def _at(name: str, measured: Sequence[float], values: np.ndarray, temperature_c: float, extrapolate: bool):
    """values [T, ...] at a temperature, on the straight line through the two neighbouring measured ones."""
    if not math.isfinite(temperature_c) or not (extrapolate or measured[0] <= temperature_c <= measured[-1]):
        known = f"{measured[0]:g} to {measured[-1]:g} C" if len(measured) > 1 else f"{measured[0]:g} C"
        raise InputError(f"chip {name}: found {temperature_c:g} C, expected a temperature within the measured {known}")
    if len(measured) == 1:
        return values[0].copy()
    i = min(max(bisect.bisect_right(measured, temperature_c) - 1, 0), len(measured) - 2)
    weight = (temperature_c - measured[i]) / (measured[i + 1] - measured[i])
    return (1 - weight) * values[i] + weight * values[i + 1]  # exact at both ends


def read_cells(path: str | Path) -> pd.DataFrame:
    """The cell level: one row for every read of a cell, with `temperature_c`, `g_target_us` and `g_read_us`.

    Raises InputError, as all readers here do, for a missing file, a wrong header or a value that does not belong.
    """
    return read_csv(path, CELLS)


def read_mvm(path: str | Path) -> pd.DataFrame:
    """The MVM level: one row for every output of a column, with `temperature_c`, `column`, `y_ideal`, `y_measured`.

    y_ideal is the product in exact arithmetic, y_measured what the chip returned, in any unit: a gain and an offset are
    fitted. Raises InputError.
    """
    return read_csv(path, MVM)


def read_end_to_end(path: str | Path) -> pd.DataFrame:
    """The end-to-end level: one row for every (model, temperature), with `model`, `temperature_c`, `kl` and
    `layer_error_std`.

    kl: mean KL(p_clean ‖ p_chip) of the next-token distributions in nats per token; layer_error_std: a tuple with each
    layer's output error relative to its clean norm (root mean square over tokens), None where it was not measured
    (empty in the file, or no such column). Raises InputError, also for a (model, temperature) that occurs
    twice.
    """
    frame = read_csv(path, END_TO_END, optional=("layer_error_std",))
    twice = frame.duplicated(["model", "temperature_c"])
    if twice.any():
        row = frame[twice].iloc[0]
        found = f"{row.model} at {row.temperature_c:g} C again"
        refuse(path, int(twice.argmax()) + 1, "temperature_c", found, "one row for each model and temperature")
    return frame


def end_to_end_target(
    frame: pd.DataFrame, path: str | Path, model: str, temperature_c: float
) -> tuple[float, tuple[float, ...] | None]:
    """(KL in nats per token, relative error of each layer or None) of a model at a measured temperature.

    frame: from `read_end_to_end(path)`. Raises InputError, naming what exists, for a model or temperature without row.
    """
    rows = frame[frame["model"] == model]
    if rows.empty:
        raise InputError(
            f"{path}: column 'model': no row {model!r}, expected one of {', '.join(frame['model'].unique())}"
        )
    found = rows[rows["temperature_c"] == temperature_c]
    if found.empty:
        known = ", ".join(f"{t:g}" for t in sorted(rows["temperature_c"]))
        raise InputError(
            f"{path}: column 'temperature_c': no row {temperature_c:g} for model {model}, expected one of {known}"
        )
    return float(found["kl"].iloc[0]), found["layer_error_std"].iloc[0]


@dataclass(frozen=True, eq=False)
class CellTable:
    """Error of programmed cells by temperature and conductance: what the simulator reads.

    name: of the chip; temperature_c: the measured temperatures, ascending, T of them; g_us: the target conductances in
    microsiemens, ascending, G of them, the same at every temperature; mean_delta_us, sigma_us: mean and standard
    deviation of (read - target) in microsiemens, float64 [T, G]; cells: reads behind each entry, int64 [T, G].
    """

    name: str
    temperature_c: tuple[float, ...]
    g_us: tuple[float, ...]
    mean_delta_us: np.ndarray  # [T, G]
    sigma_us: np.ndarray  # [T, G]
    cells: np.ndarray  # [T, G]

    @classmethod
    def read(cls, path: str | Path) -> "CellTable":
        """The derived table of a CSV file, one row for every (temperature, conductance); the chip's name is the file's.

        Raises InputError that names the row where temperatures descend, conductances do not ascend, or the conductances
        of one temperature are not those of the first.
        """
        frame = read_csv(path, CELL_TABLE)
        temperatures: list[float] = []
        grid: list[float] = []  # conductances of the first temperature
        block: list[float] = []  # and of the present one
        for row, (t, g) in enumerate(zip(frame["temperature_c"], frame["g_us"], strict=True), 1):
            if not temperatures or t != temperatures[-1]:
                if temperatures and t < temperatures[-1]:
                    refuse(path, row, "temperature_c", f"{t:g} after {temperatures[-1]:g}", "ascending temperatures")
                cls._whole(path, row, block, grid)
                temperatures.append(t)
                block = []
            if block and g <= block[-1]:
                refuse(path, row, "g_us", f"{g:g} after {block[-1]:g}", "ascending conductances")
            block.append(g)
            if len(temperatures) == 1:
                grid = block
            elif grid[len(block) - 1 : len(block)] != [g]:
                same = f"{grid[len(block) - 1]:g}" if len(block) <= len(grid) else f"only {len(grid)} conductances"
                refuse(path, row, "g_us", f"{g:g}", f"{same}, as at {temperatures[0]:g} C")
        cls._whole(path, len(frame) + 1, block, grid)
        shape = (len(temperatures), len(grid))
        arrays = (frame[c].to_numpy().reshape(shape) for c in ("mean_delta_us", "sigma_us", "cells"))
        return cls(Path(path).stem, tuple(temperatures), tuple(grid), *arrays)

    @staticmethod
    def _whole(path, row: int, block: list[float], grid: list[float]) -> None:
        if len(block) < len(grid):
            refuse(path, row, "g_us", "the end of a temperature", f"{grid[len(block)]:g}, as at the first temperature")

    def to_csv_text(self) -> str:
        """The text of a file that `read` reads back to equal numbers."""
        rows = (
            [number_text(v) for v in (t, g, self.mean_delta_us[i, j], self.sigma_us[i, j], self.cells[i, j])]
            for i, t in enumerate(self.temperature_c)
            for j, g in enumerate(self.g_us)
        )
        return csv_text(CELL_TABLE, rows)

    @classmethod
    def from_cells(cls, frame: pd.DataFrame, name: str, bins: int = 32) -> "CellTable":
        """The table of single reads (the columns of `read_cells`): mean and standard deviation (n - 1) of read - target
        for every temperature and target.

        With more than `bins` distinct targets, neighbours are pooled in `bins` groups of equally many targets, whose
        conductance is their mean; each read is still compared with its own target. Every temperature must have the
        same targets, since the table is interpolated between temperatures at equal conductance: anything else is
        refused. Raises InputError for that, and for fewer than 10 reads in a group.
        """
        check_frame(frame, CELLS, name)
        targets = np.unique(frame["g_target_us"])
        for t, rows in frame.groupby("temperature_c"):
            if len(missing := np.setdiff1d(targets, rows["g_target_us"])):
                expected = "the same targets at all temperatures"
                raise InputError(f"{name}: column 'g_target_us': no row {missing[0]:g} at {t:g} C, expected {expected}")
        if bins < 1:
            raise InputError(f"{name}: found {bins} bins, expected at least 1")
        groups = np.array_split(targets, min(bins, len(targets)))
        group = np.repeat(np.arange(len(groups)), [len(g) for g in groups])  # of every target
        group = group[np.searchsorted(targets, frame["g_target_us"])]
        delta = frame["g_read_us"].to_numpy() - frame["g_target_us"].to_numpy()
        grouped = pd.Series(delta).groupby([frame["temperature_c"].to_numpy(), group])
        g_us = tuple(float(g.mean()) for g in groups)
        cells, mean, sigma = (getattr(grouped, statistic)().unstack() for statistic in ("size", "mean", "std"))
        temperatures = tuple(map(float, cells.index))
        for i, j in np.argwhere(cells.to_numpy() < MIN_CELLS):
            found = f"{cells.iat[i, j]} rows at {temperatures[i]:g} C and {g_us[j]:g} microsiemens"
            raise InputError(f"{name}: column 'g_read_us': found {found}, expected at least {MIN_CELLS}")
        return cls(name, temperatures, g_us, mean.to_numpy(), sigma.to_numpy(), cells.to_numpy())

    def at(self, temperature_c: float, extrapolate: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(g_us, mean_delta_us, sigma_us) at a temperature, float64 [G] each, in microsiemens.

        Linear between the two neighbouring measured temperatures. Raises InputError outside their range, unless
        `extrapolate`: then the line through the nearest two goes on, with sigma clipped at 0.
        """
        mean = _at(self.name, self.temperature_c, self.mean_delta_us, temperature_c, extrapolate)
        sigma = _at(self.name, self.temperature_c, self.sigma_us, temperature_c, extrapolate)
        return np.array(self.g_us), mean, np.maximum(sigma, 0.0)

    def measured(self, temperature_c: float) -> bool:
        """Whether the temperature is a measured one. At any other, `at` is an interpolation, and its user says so."""
        return temperature_c in self.temperature_c


@dataclass(frozen=True, eq=False)
class ColumnErrors:
    """Errors of matrix-vector products by temperature, dimensionless.

    name: of the chip; temperature_c: the measured temperatures, ascending, T of them; gain_std: standard deviation
    over columns of gain / mean gain; residual_std: root mean square over columns of what a gain and an offset leave,
    relative to the rms of gain x ideal output; float64 [T] both; columns: how many there are behind them, int64 [T].
    """

    name: str
    temperature_c: tuple[float, ...]
    gain_std: np.ndarray  # [T]
    residual_std: np.ndarray  # [T]
    columns: np.ndarray  # [T]

    @classmethod
    def read(cls, path: str | Path) -> "ColumnErrors":
        """From a CSV file of fitted columns: `temperature_c`, `column`, `gain` (in any unit), `residual_std`
        (relative).

        The chip's name is the file's. Raises InputError, also for a column that occurs twice at a temperature.
        """
        frame = read_csv(path, COLUMN_TABLE)
        if (twice := frame.duplicated(["temperature_c", "column"])).any():
            row = int(twice.argmax())
            refuse(path, row + 1, "column", f"{frame['column'][row]!r} again", "each column once per temperature")
        return cls._from_columns(frame, Path(path).stem, path)

    @classmethod
    def from_mvm(cls, frame: pd.DataFrame, name: str) -> "ColumnErrors":
        """From single outputs (the columns of `read_mvm`), by `fit_columns`. Raises InputError."""
        return cls._from_columns(fit_columns(frame, name), name, name)

    @classmethod
    def _from_columns(cls, frame: pd.DataFrame, name: str, source: str | Path) -> "ColumnErrors":
        columns = frame.groupby("temperature_c")["column"].size()
        if (columns < 2).any():
            found = f"1 column at {columns.index[columns < 2][0]:g} C"
            raise InputError(f"{source}: column 'column': found {found}, expected at least 2 to compare gains")
        gain = frame["gain"] / frame.groupby("temperature_c")["gain"].transform("mean")
        residual = (frame["residual_std"] ** 2).groupby(frame["temperature_c"]).mean() ** 0.5
        spread = gain.groupby(frame["temperature_c"]).std().to_numpy()
        return cls(name, tuple(map(float, columns.index)), spread, residual.to_numpy(), columns.to_numpy())

    def at(self, temperature_c: float, extrapolate: bool = False) -> tuple[float, float]:
        """(gain_std, residual_std) at a temperature, linear between the two neighbouring measured ones.

        Raises InputError outside their range, unless `extrapolate`: then the line through the nearest two goes on,
        clipped at 0; of a single temperature the values stand for all.
        """
        both = np.stack([self.gain_std, self.residual_std], axis=1)  # [T, 2]
        gain_std, residual_std = np.maximum(_at(self.name, self.temperature_c, both, temperature_c, extrapolate), 0.0)
        return float(gain_std), float(residual_std)

    def measured(self, temperature_c: float) -> bool:
        """Whether the temperature is a measured one."""
        return temperature_c in self.temperature_c


def fit_columns(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """y_measured = gain · y_ideal + offset + residual by least squares, for every temperature and column.

    frame: the columns of `read_mvm`. Returns `temperature_c`, `column`, `gain` (in units of y_measured / y_ideal) and
    `residual_std` (n - 2 degrees of freedom, relative to the rms of gain · y_ideal). Raises InputError for fewer than 3
    rows of a column, for a constant y_ideal, and for a gain that is not positive.
    """
    check_frame(frame, MVM, name)
    rows = []
    for (t, column), part in frame.groupby(["temperature_c", "column"], sort=True):
        ideal, measured = part["y_ideal"].to_numpy(float), part["y_measured"].to_numpy(float)
        where = f"of column {column} at {t:g} C"
        if len(part) < MIN_MVM_ROWS:
            raise InputError(
                f"{name}: column 'y_ideal': found {len(part)} rows {where}, expected at least {MIN_MVM_ROWS}"
            )
        if np.ptp(ideal) == 0:
            raise InputError(f"{name}: column 'y_ideal': found only {ideal[0]:g} in all rows {where}, expected a range")
        unit = np.abs(ideal).max()  # so that no square leaves the numbers' range, whatever the unit
        centred = (ideal - ideal.mean()) / unit
        gain = centred @ measured / (centred @ centred) / unit
        if not 0 < gain < math.inf:
            raise InputError(f"{name}: column 'y_measured': found a gain of {gain:g} in the rows {where}, expected > 0")
        residual = (measured - measured.mean()) / gain / unit - centred
        residual_std = math.sqrt(residual @ residual / (len(part) - 2) / np.mean((ideal / unit) ** 2))
        rows.append((t, column, gain, residual_std))
    return pd.DataFrame(rows, columns=list(COLUMN_TABLE))
