"""The text that models are calibrated and evaluated on: documents with a licence each, split by document.

    corpus = wikipedia()                                    # or wikitext(folder)
    split = split_documents(corpus)                         # calibration | evaluation | distillation, no 10-gram shared
    ids = token_stream(tokenizer, split.evaluation, 4096)   # one stream, cut into windows by the caller

The split is a hash of the document's id, so it does not depend on order or on the other documents. A calibration or
distillation document that shares any run of ten words with an evaluation document is dropped and counted.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from romer.errors import InputError
from romer.packages import PIQA_TRAIN, WIKIPEDIA_LEADS, read_member

PIQA_ITEMS = 6000  # of PIQA's training split are in the stand-ins' text: about a quarter of its tokens
OVERLAP_WORDS = 10  # two texts overlap when they share a run of this many words
SEPARATOR = "\n\n"  # between two documents of a stream


@dataclass(frozen=True)
class Document:
    """id: unique, stable over runs; part: where it comes from; text: what a model reads."""

    id: str
    part: str
    text: str


@dataclass(frozen=True)
class Split:
    """Documents by use. dropped: how many were taken out because they overlapped with the evaluation documents."""

    evaluation: tuple[Document, ...]
    calibration: tuple[Document, ...]
    distillation: tuple[Document, ...]
    dropped: int


def wikipedia() -> list[Document]:
    """Lead paragraphs of Wikipedia's level-4 vital articles, in English (CC BY-SA 4.0)."""
    articles = json.loads(read_member(WIKIPEDIA_LEADS))
    return [
        Document(f"wikipedia:{a['title']}", "wikipedia", f"{a['title']}\n{a['extract'].strip()}")
        for a in articles.values()
        if a.get("extract", "").strip()
    ]


def piqa_train() -> list[Document]:
    """Goal and right solution of every PIQA training item (AFL-3.0), in the benchmark's own prompt format."""
    documents = {}
    for line in gzip.decompress(read_member(PIQA_TRAIN)).splitlines():
        doc = json.loads(line)["doc"]
        solution = doc["sol2"] if doc["label"] else doc["sol1"]
        documents[doc["index"]] = f"Question: {doc['goal']}\nAnswer: {solution}"
    return [Document(f"piqa_train:{i}", "piqa_train", text) for i, text in sorted(documents.items())]


def unseen_questions(reference: set[int]) -> tuple[list[Document], int]:
    """(PIQA's training questions that no stand-in was made from, in a random order; how many were left out because they
    share ten words with the reference)."""
    found = sorted(piqa_train()[PIQA_ITEMS:], key=lambda d: _share(d, "order"))
    kept = apart(found, reference)
    return kept, len(found) - len(kept)


def in_turns(*kinds: Sequence[Document]) -> list[Document]:
    """Documents of several kinds, each in its order, the next one of the kind with fewest characters so far: a prefix
    has as much of every kind, up to a document. Ends where it would take one of a kind that has no more."""
    found, lengths, rest = [], [0] * len(kinds), [iter(kind) for kind in kinds]
    while (document := next(rest[kind := lengths.index(min(lengths))], None)) is not None:
        found.append(document)
        lengths[kind] += len(document.text)
    return found


def wikitext(folder: str | Path) -> list[Document]:
    """A WikiText directory of the user's: `*test*` becomes evaluation, `*valid*` or `*train*` calibration text.

    Files are WikiText's own: articles start at a line ` = Title = `. Raises InputError when the folder or a split of it
    is missing.
    """
    folder = Path(folder)
    documents = []
    for use, patterns in {"evaluation": ("*test*",), "calibration": ("*valid*", "*train*")}.items():
        files = [f for p in patterns for f in sorted(folder.glob(p)) if f.is_file()]
        if not files:
            raise InputError(f"data.wikitext_dir: {folder} has no file matching {' or '.join(patterns)}")
        try:
            text = files[0].read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"data.wikitext_dir: {files[0]} is not UTF-8 text ({error.reason})") from None
        documents += wikitext_articles(text, use)
    return documents


def wikitext_articles(text: str, use: str) -> list[Document]:
    """The articles of a WikiText file; each starts at a line ` = Title = `. use: evaluation | calibration."""
    articles = re.split(r"\n(?= = [^=\n]+ = \n)", text)
    return [Document(f"{use}:{i}", "wikitext", a.strip()) for i, a in enumerate(articles) if a.strip()]


def _share(document: Document, purpose: str) -> float:
    """A number in [0, 1) that depends on the document's id and the purpose alone."""
    return int.from_bytes(hashlib.sha256(f"{purpose}|{document.id}".encode()).digest()[:8], "big") / 2**64


def ngrams(text: str, words: int = OVERLAP_WORDS) -> set[int]:
    """Hashes of all runs of `words` words (case and punctuation ignored)."""
    found = re.findall(r"\w+", text.lower())
    return {hash(tuple(found[i : i + words])) for i in range(len(found) - words + 1)}


def runs(texts: Iterable[str]) -> set[int]:
    """Hashes of all runs of ten words in any of the texts: what documents are held against."""
    return set().union(*map(ngrams, texts))


def apart(documents: Iterable[Document], reference: set[int]) -> list[Document]:
    """The documents that share no run of ten words with the reference (of `runs`)."""
    return [d for d in documents if reference.isdisjoint(ngrams(d.text))]


def overlap(documents: Iterable[Document], reference: set[int]) -> int:
    """How many documents share a run of ten words with the reference (of `runs`)."""
    return sum(not reference.isdisjoint(ngrams(d.text)) for d in documents)


def split_documents(documents: Sequence[Document], evaluation: float = 0.2, calibration: float = 0.1) -> Split:
    """Split by document: shares `evaluation` and `calibration` by the hash of the id, the rest for distillation.

    WikiText documents go where their own split says. PIQA's training items only ever serve distillation. Every group is
    in the order of another hash, so that a prefix of it is a random sample of all its parts.
    """
    groups: dict[str, list[Document]] = {"evaluation": [], "calibration": [], "distillation": []}
    for d in sorted(documents, key=lambda d: _share(d, "order")):
        if d.part == "wikitext":
            groups[d.id.split(":")[0]].append(d)
        elif d.part == "wikipedia" and _share(d, "split") < evaluation + calibration:
            groups["evaluation" if _share(d, "split") < evaluation else "calibration"].append(d)
        else:
            groups["distillation"].append(d)
    reference = runs(d.text for d in groups["evaluation"])
    dropped = 0
    for use in ("calibration", "distillation"):
        kept = apart(groups[use], reference)
        dropped += len(groups[use]) - len(kept)
        groups[use] = kept
    return Split(*(tuple(groups[g]) for g in ("evaluation", "calibration", "distillation")), dropped)


def token_stream(tokenizer, documents: Sequence[Document], tokens: int | None = None) -> torch.Tensor:
    """The documents, joined by a blank line and tokenised without special tokens: int64 [tokens].

    Raises InputError when the documents hold fewer than `tokens` tokens.
    """
    ids: list[int] = []
    for start in range(0, len(documents), 64):  # in chunks, so that a short stream does not tokenise the whole corpus
        text = "".join(d.text + SEPARATOR for d in documents[start : start + 64])
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokens is not None and len(ids) >= tokens:
            return torch.tensor(ids[:tokens])
    if tokens is not None:
        raise InputError(f"text: {tokens} tokens were asked for, the {len(documents)} documents hold {len(ids)}")
    return torch.tensor(ids)


def wikitext_hub(name: str, subset: str, revision: str) -> list[Document]:
    """WikiText's test and validation splits from the hub (pinned revision). Raises InputError when they cannot be
    had."""
    from datasets import load_dataset

    found = []
    for use, split in {"evaluation": "test", "calibration": "validation"}.items():
        try:
            rows = load_dataset(name, subset, split=split, revision=revision)["text"]
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"dataset {name}/{subset}: neither in the hub's cache nor to be had ({reason})") from None
        found += wikitext_articles("".join(rows), use)
    return found
