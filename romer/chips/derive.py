"""The derived tables of the measured chips in romer/chips/data, from the published measurements.

    python -m romer.chips.derive /path/to/rram_relaxation                     # rram_a.csv, rram_b.csv
    python -m romer.chips.derive /path/to/rram_relaxation --neurram mvm.json  # and neurram.csv

`rram_a`, `rram_b`: technologies A and B of github akashlevy/RRAM-Relaxation-Master-Model (MIT), `data/techA` and
`data/techB`: 16 384 RRAM cells each, programmed to 32 levels, read, baked at 100, 140, 180, 220 or 260 C for 4500 to
7200 s and read again, with a new programming before every bake. A level's target is the median of all its reads right
after programming. These reads are the rows at 25 C (five programmings of each cell, pooled: spread of programming,
stuck cells included); the reads after a bake are the rows at its temperature (that spread and the relaxation during
the bake). sigma is the plain standard deviation although the data have heavy tails, from stuck cells: excess kurtosis
at 25 C is 33 at level 0 and 2.3 at level 31 of technology A (22 and 1.0 of B), and 385 at a level where one of 2560
reads is far off.

`neurram`: columns of the NeuRRAM chip (Wan et al. 2022, Nature 608:504, DOI 10.1038/s41586-022-04992-8), from the
outputs of two notebooks in `cifar10_resnet` of github weierwan/Neurram_48core at 2ed5f8d; see `neurram_columns`.
"""

import argparse
import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from romer.chips.formats import COLUMN_TABLE, csv_text, number_text
from romer.chips.measurements import CellTable
from romer.errors import InputError
from romer.store import write_atomic

DATA = Path(__file__).parent / "data"
ROOM_C = 25.0  # the sources say "room temperature"
LEVELS = 32
RRAM = {"rram_a": ("techA", 1), "rram_b": ("techB", 2)}  # folder, and the step between the addresses of two levels
BAKE = ("address", "seconds", "resistance_ohm", "conductance_s", "bake_c")  # the columns of bake.tsv.gz, no header
DECIMALS_US = 4  # of a table: 0.1 nS, far below every sigma
NEURRAM_RMS = 0.6  # of the ideal outputs, see `neurram_columns`


def rram_cells(path: str | Path, step: int) -> pd.DataFrame:
    """A bake.tsv.gz as the cell-level format: `temperature_c`, `g_target_us`, `g_read_us`, one row a read.

    step: the level of a cell is (address // step) % 32. Raises InputError for a file that is missing or has another
    content: each (address, bake temperature) has one read at 0 s and one after the bake.
    """
    try:
        bake = pd.read_csv(path, sep="\t", names=BAKE, dtype=float, index_col=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: found {error}, expected gzipped rows of {', '.join(BAKE)}") from None
    programmed = bake["seconds"] == 0
    reads = programmed.groupby([bake["address"], bake["bake_c"]]).agg(["size", "sum"])
    if bake.isna().any(axis=None) or not ((reads["size"] == 2) & (reads["sum"] == 1)).all():
        raise InputError(f"{path}: expected two reads of each address and bake_c, one of them at seconds = 0")
    level = bake["address"].astype(int) // step % LEVELS
    g_read_us = bake["conductance_s"] * 1e6
    g_target_us = level.map(g_read_us[programmed].groupby(level[programmed]).median())
    temperature_c = bake["bake_c"].where(~programmed, ROOM_C)
    return pd.DataFrame({"temperature_c": temperature_c, "g_target_us": g_target_us, "g_read_us": g_read_us})


def rram_table(folder: str | Path, name: str) -> CellTable:
    """The table of `rram_a` or `rram_b` from the folder that holds techA and techB, rounded to 0.1 nS.

    Raises InputError as `rram_cells` does.
    """
    technology, step = RRAM[name]
    table = CellTable.from_cells(rram_cells(Path(folder) / technology / "bake.tsv.gz", step), name, bins=LEVELS)
    g_us = tuple(round(g, DECIMALS_US) for g in table.g_us)
    mean, sigma = np.round(table.mean_delta_us, DECIMALS_US), np.round(table.sigma_us, DECIMALS_US)
    return replace(table, g_us=g_us, mean_delta_us=mean, sigma_us=sigma)


def neurram_columns(path: str | Path) -> pd.DataFrame:
    """Gain and residual of 64 + 16 columns of NeuRRAM: `temperature_c`, `column`, `gain`, `residual_std`.

    path: a JSON file with what the notebooks printed for each column: `cifar10_layer_full_slope` and
    `cifar10_layer_full_resid_std` (cifar10_resnet_chip_inference.ipynb, cell 59), `finetune_layer_full` with `slope`
    and `resid_std` (forward_finetune_chip_inference.ipynb, cell 71), cells counted from 0.

    gain: the slope over the mean slope of its layer. The notebooks divide the residual's standard deviation by the
    slope, so it has the unit of the ideal output; here it is divided by the rms of the ideal output too. That rms is
    not printed. NEURRAM_RMS = 0.6 (within 10 %) was read off the scatter plots of the next cells, for both layers:
    extent, spread and area of the points, each compared with simulated plots of normal outputs, give 0.55 to 0.63.
    25 C is an assumption: room temperature. Raises InputError for a file that lacks a number.
    """
    try:
        found = json.loads(Path(path).read_bytes())
        finetune = found["finetune_layer_full"]
        layers = {
            "cifar10": (found["cifar10_layer_full_slope"], found["cifar10_layer_full_resid_std"]),
            "finetune": (finetune["slope"], finetune["resid_std"]),
        }
        rows = [
            (ROOM_C, f"{layer}_{i}", slope / np.mean(slopes), residual / NEURRAM_RMS)
            for layer, (slopes, residuals) in layers.items()
            for i, (slope, residual) in enumerate(zip(slopes, residuals, strict=True))
        ]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: found {error!r}, expected the slopes and residuals of two layers in JSON") from None
    return pd.DataFrame(rows, columns=list(COLUMN_TABLE)).round(6)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: writes the tables. Bad input is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m romer.chips.derive", description="derived tables of chips")
    parser.add_argument("rram_relaxation", type=Path, help="the folder with techA/bake.tsv.gz and techB/bake.tsv.gz")
    parser.add_argument("--neurram", type=Path, help="JSON of the printed slopes and residuals")
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the tables (default: the package's)")
    options = parser.parse_args(arguments)
    try:
        texts = {name: rram_table(options.rram_relaxation, name).to_csv_text() for name in RRAM}
        if options.neurram:
            rows = neurram_columns(options.neurram).itertuples(index=False)
            fields = ([number_text(r[0]), r.column, number_text(r.gain), number_text(r.residual_std)] for r in rows)
            texts["neurram"] = csv_text(COLUMN_TABLE, fields)
    except InputError as error:
        print(f"romer.chips.derive: {error}", file=sys.stderr)
        sys.exit(2)
    for name, text in texts.items():
        write_atomic(options.output / f"{name}.csv", text)


if __name__ == "__main__":
    main()
