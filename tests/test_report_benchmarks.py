"""Table 2 against numbers worked out by hand, and figure 1 showing texts as they are."""

import re

import pandas as pd
import pytest

from romer import published
from romer.errors import InputError
from romer.report.benchmarks import caption2, figure1, table2, write_table2


def score(method, realisation, value, task="piqa", metric="acc", temperature_c=80.0, **changes):
    row = dict(model="deepseek", chip="table2", temperature_c=temperature_c, method=method, options="{}")
    row |= dict(task=f"lm_eval:{task}", metric=metric, realisation=realisation, value=value, tokens=900, cells=1.0)
    row |= dict(stderr=0.05, items=100, items_total=1838, task_version="1.0", task_hash="a" * 64, few_shot=0)
    return row | dict(lm_eval="0.4.13", run_id="x") | changes


PIQA = [score("clean", -1, 0.7), score("vanilla", 0, 0.5), score("vanilla", 1, 0.6)]
PIQA += [score("romer", 0, 0.55), score("romer", 1, 0.67), score("ours", 0, 0.6)]
LEADS = dict(task="wikipedia_leads", metric="word_perplexity", items=20, items_total=20, stderr=None)
WORDS = [score("clean", -1, 30.0, **LEADS), score("vanilla", 0, 40.0, **LEADS), score("vanilla", 1, 44.0, **LEADS)]
OTHERS = [score("clean", -1, 0.9, metric="acc_norm"), score("vanilla", 0, 0.1, model="olmoe")]


def frame(*groups):
    return pd.DataFrame([row for group in groups for row in group])


@pytest.fixture
def table():
    return table2(frame(PIQA, WORDS, OTHERS), published.load("table2"))


def line(table, temperature, method):
    found = table[(table["", "temperature_c"] == temperature) & (table["", "method"] == method)]
    assert len(found) == 1
    return found.iloc[0]


def test_measured_stands_beside_published(table):
    romer = line(table, 80, "romer")["PIQA %"]
    assert romer["mean"] == pytest.approx(61) and romer["realisations"] == 2
    assert romer["low"] == pytest.approx(55) and romer["high"] == pytest.approx(67)
    assert romer["item_stderr"] == pytest.approx(5) and romer["published"] == 77.7
    assert romer["difference"] == pytest.approx(6)  # 5 and 7 points, each within a realisation
    assert romer["difference_low"] == pytest.approx(5) and romer["difference_high"] == pytest.approx(7)
    clean = line(table, 80, "clean")["PIQA %"]
    assert clean["mean"] == pytest.approx(70) and clean["realisations"] == 0 and pd.isna(clean["difference"])
    assert clean["published"] == 79.8
    words = line(table, 80, "vanilla")["Wikipedia leads word ppl"]
    assert words["mean"] == 42 and pd.isna(words["item_stderr"]) and words["published"] == 28.36


def test_what_only_one_side_has_is_empty_on_the_other(table):
    assert pd.isna(line(table, 25, "romer")["PIQA %", "mean"])
    assert pd.isna(line(table, 80, "ours")["PIQA %", "published"])
    assert pd.isna(line(table, 80, "romer")["Wikipedia leads word ppl", "mean"])
    assert "LAMBADA ppl" not in table.columns  # nobody measured it
    assert list(table[table["", "temperature_c"] == 25]["", "method"]) == list(
        published.load("table2").query("temperature == 25")["method"]
    )


def test_files(table, tmp_path):
    paths = write_table2(table, tmp_path, caption2(frame(PIQA, WORDS), "models: tiny"))
    assert {p.name for p in paths} == {"table2.csv", "table2.md", "table2.tex"}
    flat = pd.read_csv(tmp_path / "table2.csv")
    row = flat[(flat.temperature_c == 80) & (flat.method == "romer")].iloc[0]
    assert row["PIQA %.mean"] == pytest.approx(61) and row["PIQA %.published"] == 77.7
    text = (tmp_path / "table2.md").read_text()
    assert "61.00 [55.00, 67.00] ± 5.00 | 77.7 |" in text
    assert "paper WikiText-2 ppl" in text and "| WikiText" not in text  # leads never bear WikiText's name
    assert (tmp_path / "table2.tex").read_text().count(r"\\") == len(table) + 1


def test_caption_says_what_was_measured():
    text = caption2(frame(PIQA, WORDS), "models: tiny")
    for part in ("lm-eval 0.4.13", "0-shot", "piqa v1.0, acc, the first 100 of 1838 items", "models: tiny"):
        assert part in text
    assert "wikipedia_leads v1.0, word_perplexity, all 20 items" in text and "WikiText-2's" in text
    assert "WikiText" not in caption2(frame(PIQA), "models: tiny") and "1/2 realisations" in text


@pytest.mark.parametrize("change", [{"items": 50}, {"task_hash": "b" * 64}, {"lm_eval": "0.4.12"}, {"few_shot": 5}])
def test_different_items_are_not_mixed(change):
    with pytest.raises(InputError, match=next(iter(change))):
        table2(frame(PIQA, [score("romer", 2, 0.5, **change)]), published.load("table2"))


def test_bad_records_are_named():
    with pytest.raises(InputError, match="more than once"):
        table2(frame(PIQA, [score("romer", 1, 0.5)]), published.load("table2"))
    with pytest.raises(InputError, match="options"):
        table2(frame(PIQA, [score("romer", 2, 0.5, options='{"n_replace": 4}')]), published.load("table2"))
    with pytest.raises(InputError, match="piqa acc, romer at 80.0 C is nan"):
        table2(frame(PIQA, [score("romer", 2, float("nan"))]), published.load("table2"))
    with pytest.raises(InputError, match="task_hash"):
        table2(frame(PIQA).drop(columns="task_hash"), published.load("table2"))
    with pytest.raises(InputError, match="no benchmark"):
        table2(frame(PIQA), published.load("table2"), model="qwen3")


def test_figure1_shows_texts_as_they_are(tmp_path):
    nasty = "<b>bold</b> | pipe\n\\end *star*\x07"
    rows = [{"method": "clean", "factor": 0, "sigma_dev": 0.0, "prompt": "A & B", "text": "fine"}]
    rows += [
        {"method": m, "factor": f, "sigma_dev": 0.05 * f, "prompt": p, "text": nasty}
        for p in ("A & B", "C")
        for f in (1, 4)
        for m in ("vanilla", "romer")
    ]
    page, markdown = figure1(rows, tmp_path, "Figure 1. <x>")
    page, markdown = page.read_text(), markdown.read_text()
    assert page.count("<tr>") == 2 + len(rows) and "<b>" not in page and "&lt;b&gt;bold" in page and "A &amp; B" in page
    lines = [x for x in markdown.splitlines() if x.startswith("| σ")]
    assert len(lines) == 8 and "σ = 0.2 (4x)" in markdown
    for text in lines:
        assert len(re.findall(r"(?<!\\)\|", text)) == 4 and r"\<b\>" in text and "⏎" in text and "\x07" not in text
    with pytest.raises(InputError, match="no continuations"):
        figure1([], tmp_path, "")
