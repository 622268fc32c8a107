"""A chip's cost sheet: what one operation of an analog accelerator takes, with the unit in every field's name.

    sheet = ChipSheet.load(yaml.safe_load(open("conf/hardware/hermes.yaml")))

conf/hardware holds the sheets of published chips, each figure with its source; a chip of one's own is one more file.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields

from romer.errors import InputError


@dataclass(frozen=True)
class ChipSheet:
    """Geometry, times, energies and areas of a chip's tiles and of the digital parts beside them.

    tile_rows, tile_columns: cells of an array; rows_per_weight, columns_per_weight: cells that one signed weight takes
    (1 and 1 where a differential pair sits inside a unit cell); input_cycles: passes of an MVM with bit-serial inputs;
    mvm_time_ns, mvm_energy_nj: one MVM of a tile with all its passes, the energy with whatever of DACs and ADCs is
    not stated apart; dac_energy_pj: per row and pass; adc_energy_pj, shift_add_energy_pj: per conversion, one a column
    and pass.

    digital_units, digital_unit_ops_per_ns, digital_op_energy_pj: elementwise units; mac_units, mac_unit_macs_per_ns,
    mac_energy_pj: arrays of multipliers for attention and for weights that stay digital; buffer_energy_pj_per_byte: one
    read or write; network_energy_pj_per_byte, network_latency_ns: a transfer between tiles and units; dram_*: weights
    that stay digital and embeddings; static_w: power of the whole chip besides its tiles, tile_static_uw: of one
    tile, busy or not; tile_area_mm2: of one tile with its converters, None where it is not published.

    Raises InputError for a value of the wrong kind or sign.
    """

    name: str
    tile_rows: int
    tile_columns: int
    rows_per_weight: int
    columns_per_weight: int
    input_cycles: int
    mvm_time_ns: float
    mvm_energy_nj: float
    dac_energy_pj: float
    adc_energy_pj: float
    shift_add_energy_pj: float
    digital_units: int
    digital_unit_ops_per_ns: float
    digital_op_energy_pj: float
    mac_units: int
    mac_unit_macs_per_ns: float
    mac_energy_pj: float
    buffer_energy_pj_per_byte: float
    network_energy_pj_per_byte: float
    network_latency_ns: float
    dram_energy_pj_per_byte: float
    dram_bandwidth_gb_per_s: float
    static_w: float
    tile_static_uw: float
    tile_area_mm2: float | None = None

    def __post_init__(self):
        for field in fields(self):
            value, where = getattr(self, field.name), f"hardware {self.name}: {field.name}"
            if field.type is str or (value is None and field.name == "tile_area_mm2"):
                continue
            if field.type is int:
                if type(value) is not int or value < 1:
                    raise InputError(f"{where}: found {value!r}, expected a positive integer")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{where}: found {value!r}, expected a number")
            elif value < 0 or (value == 0 and field.name in POSITIVE):
                bound = "a positive number" if field.name in POSITIVE else "a number of at least 0"
                raise InputError(f"{where}: found {value!r}, expected {bound}")
        for side, per in (("tile_rows", "rows_per_weight"), ("tile_columns", "columns_per_weight")):
            if getattr(self, per) > getattr(self, side):
                found = getattr(self, per)
                raise InputError(f"hardware {self.name}: {per}: found {found}, expected at most {side}")

    @classmethod
    def load(cls, values: Mapping) -> "ChipSheet":
        """The sheet of a mapping (a YAML file's). Raises InputError that names a missing or unknown field."""
        if not isinstance(values, Mapping):
            raise InputError(f"hardware: found a {type(values).__name__}, expected a mapping of a sheet's fields")
        name, known = values.get("name", "without a name"), {field.name: field for field in fields(cls)}
        if unknown := sorted(map(str, set(values) - set(known))):
            raise InputError(f"hardware {name}: {unknown[0]}: unknown field, expected one of {', '.join(known)}")
        if missing := [f for f, field in known.items() if f not in values and field.default is MISSING]:
            raise InputError(f"hardware {name}: {missing[0]}: missing, expected a value")
        return cls(**values)

    @property
    def weight_rows(self) -> int:
        """Inputs of a tile."""
        return self.tile_rows // self.rows_per_weight

    @property
    def weight_columns(self) -> int:
        """Outputs of a tile."""
        return self.tile_columns // self.columns_per_weight


POSITIVE = {"mvm_time_ns", "digital_unit_ops_per_ns", "mac_unit_macs_per_ns", "dram_bandwidth_gb_per_s"}
