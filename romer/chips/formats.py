"""The quantities that a file of measurements may hold, and how such a file is read: one line for whatever is wrong.

    frame = read_csv("cells.csv", CELLS)        # a DataFrame with exactly these columns, every value checked

Units are part of the column names: _c degrees Celsius, _us microsiemens. Files are UTF-8 CSV with a header row, their
columns in any order, nothing else in them. The first row below the header is row 1.
"""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from romer.errors import InputError

LARGEST = 1e30  # what is larger in magnitude leaves float32 as soon as it is computed with


def _number(minimum: float = -math.inf, excluded: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not abs(value) <= LARGEST or value < minimum or (excluded and value == minimum) or "_" in text:
            raise ValueError
        return value

    return parse


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


def _label(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text.strip()


def _numbers(text: str) -> tuple[float, ...] | None:
    return tuple(map(_number(0.0), text.split(";"))) if text.strip() else None


COLUMNS: dict[str, tuple[str, Callable]] = {  # name -> (what is expected in it, how its text is read)
    "temperature_c": ("a temperature in degrees Celsius, at least -273.15", _number(-273.15)),
    "g_target_us": ("a conductance in microsiemens, at least 0", _number(0.0)),
    "g_read_us": ("a conductance in microsiemens, at least 0", _number(0.0)),
    "g_us": ("a conductance in microsiemens, at least 0", _number(0.0)),
    "mean_delta_us": ("a difference of conductances in microsiemens", _number()),
    "sigma_us": ("a standard deviation in microsiemens, at least 0", _number(0.0)),
    "cells": ("a number of cells, at least 1", _count),
    "column": ("the name or number of a column of the array", _label),
    "y_ideal": ("the product in exact arithmetic, a finite number up to 1e30", _number()),
    "y_measured": ("the chip's output, a finite number up to 1e30", _number()),
    "gain": ("a gain above 0", _number(0.0, excluded=True)),
    "residual_std": ("a residual relative to the rms of the ideal output, at least 0", _number(0.0)),
    "model": ("the name of a model", _label),
    "kl": ("a KL divergence in nats per token, above 0", _number(0.0, excluded=True)),
    "layer_error_std": ("a relative error per layer, at least 0, joined by ';', or nothing", _numbers),
}
CELLS = ("temperature_c", "g_target_us", "g_read_us")
CELL_TABLE = ("temperature_c", "g_us", "mean_delta_us", "sigma_us", "cells")
MVM = ("temperature_c", "column", "y_ideal", "y_measured")
COLUMN_TABLE = ("temperature_c", "column", "gain", "residual_std")
END_TO_END = ("model", "temperature_c", "kl", "layer_error_std")


def refuse(path, row: int, column: str, found: str, expected: str) -> NoReturn:
    """Raises the InputError for one value."""
    raise InputError(f"{path}: row {row}, column '{column}': found {found}, expected {expected}")


def read_csv(path: str | Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of a CSV file, each value read as `COLUMNS` says; an absent optional column reads as if it were empty.

    Raises InputError, one line with file, row and column, for whatever else is there, or not there.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        found = "a directory" if isinstance(error, IsADirectoryError) else "no such file"
        raise InputError(f"{path}: {found}, expected a CSV file with the columns {', '.join(columns)}") from None
    except (csv.Error, OSError, ValueError) as error:  # ValueError: bytes that are no UTF-8, a NUL in the path
        raise InputError(f"{path}: cannot be read ({error}), expected a CSV file in UTF-8") from None
    while rows and not rows[-1]:  # blank lines at the end
        rows.pop()
    header = [name.strip() for name in rows[0]] if rows else []
    wanted = f"expected the columns {', '.join(columns)}, separated by commas"
    for name in columns:
        if name not in header and name not in optional:
            found = ", ".join(header) or "an empty header"
            raise InputError(f"{path}: header row: column '{name}' is missing in {found}; {wanted}")
        if header.count(name) > 1:
            raise InputError(f"{path}: header row: column '{name}' occurs {header.count(name)} times; {wanted}")
    for name in header:
        if name not in columns:
            raise InputError(f"{path}: header row: column '{name}' is unknown; {wanted}")
    if len(rows) == 1:
        raise InputError(f"{path}: row 1, column '{header[0]}': found the end of the file, expected measurements")
    values: dict[str, list] = {name: [] for name in columns}
    for row, fields in enumerate(rows[1:], 1):
        if len(fields) != len(header):
            at = header[min(len(fields), len(header) - 1)]
            refuse(path, row, at, f"{len(fields)} fields", f"{len(header)}, one for each column of the header")
        by_name = dict(zip(header, fields, strict=True))
        for name in columns:
            expected, parse = COLUMNS[name]
            try:
                values[name].append(parse(by_name.get(name, "")))
            except ValueError:
                refuse(path, row, name, repr(by_name[name][:40]), expected)
    return pd.DataFrame({name: pd.Series(value, dtype=_dtype(value)) for name, value in values.items()})


def _dtype(values: list):
    return type(values[0]) if isinstance(values[0], float | int) else object  # None stays None


def number_text(value: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(float(value)).removesuffix(".0")


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The file's text; the fields are numbers and labels that need no quotes."""
    return "\n".join([",".join(columns), *(",".join(row) for row in rows)]) + "\n"


def check_frame(frame: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    """Raises InputError unless the frame, which need not come from `read_csv`, has rows of finite numbers."""
    for column in columns:
        expected, parse = COLUMNS[column]
        if column not in frame or frame.empty:
            raise InputError(f"{name}: column '{column}' has no rows, expected {expected}")
        if parse is not _label:
            bad = ~np.isfinite(pd.to_numeric(frame[column], errors="coerce").to_numpy(float))
            if bad.any():
                refuse(name, int(bad.argmax()) + 1, column, repr(frame[column].iloc[bad.argmax()]), expected)
