"""The published tables are read as printed, and their noise levels follow from them."""

import math

import pytest

from romer import published
from romer.errors import InputError

CELLS = [  # as printed in the paper: clean, vanilla
    ("table1", "qwen3", 25, 14.87, 15.16),
    ("table1", "deepseek", 80, 10.64, 12.49),
    ("table1", "olmoe", 80, 10.48, 13.13),
    ("table1", "qwen15", 80, 10.85, 11.72),
    ("table2", "deepseek", 25, 18.94, 23.83),
    ("table2", "deepseek", 80, 18.94, 28.36),
    ("table3", "qwen3", 85, 14.87, 27.5),
    ("table3", "olmoe", 85, 10.48, 35.3),
    ("table4", "qwen3", 25, 10.83, 11.61),
    ("table4", "qwen3", 85, 10.83, 24.87),
]


@pytest.mark.parametrize("table, model, temperature_c, clean, vanilla", CELLS)
def test_the_target_is_the_log_ratio_of_the_printed_numbers(table, model, temperature_c, clean, vanilla):
    assert published.baselines(table, model, temperature_c) == (clean, vanilla)
    assert published.kl_target(table, model, temperature_c) == pytest.approx(math.log(vanilla) - math.log(clean))


@pytest.mark.parametrize(
    "table, cells", [("table1", 14 * 6), ("table2", 14 * 7), ("table3", 4 * 11), ("table4", 49 * 4), ("figure3", 2 * 4)]
)
def test_tables_are_whole(table, cells):
    frame = published.load(table)
    assert frame.size == cells
    assert frame.isna().sum().sum() == (table == "table4")  # its clean row has no setting


def test_every_temperature_has_a_positive_target_that_grows_with_temperature():
    found = {(t, m): published.temperatures(t, m) for t in ("table1", "table3") for m in ("olmoe", "qwen15", "qwen3")}
    found |= {("table2", "deepseek"): published.temperatures("table2", "deepseek")}
    found |= {("table4", "qwen3"): published.temperatures("table4", "qwen3")}
    assert found["table1", "olmoe"] == (25, 80) and found["table3", "qwen3"] == (85,)
    assert found["table4", "qwen3"] == (25, 45, 65, 85)
    for (table, model), temperatures in found.items():
        targets = [published.kl_target(table, model, t) for t in temperatures]
        assert targets[0] > 0 and targets == sorted(targets)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("table5", "olmoe", 25), "'table5'.*table1, table2, table3, table4"),
        (("table1", "mixtral", 25), "table1.*'mixtral'.*qwen3, deepseek, olmoe, qwen15"),
        (("table4", "olmoe", 25), "table4.*'olmoe'.*qwen3$"),
        (("table1", "olmoe", 85), "table1.*85.*olmoe.*25, 80"),
    ],
)
def test_what_does_not_exist_is_named_beside_what_does(arguments, message):
    with pytest.raises(InputError, match=message):
        published.kl_target(*arguments)
