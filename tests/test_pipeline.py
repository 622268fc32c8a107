"""The whole DAG on tiny random models: what it promises to write, and that a kill costs one point at most."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from romer.chips.pcm import Pcm
from romer.store import verify
from tests.test_cli import one_line, romer

ABLATED = "ablate/table4/qwen3/85"


def snakemake(results: Path, *arguments) -> subprocess.Popen:
    """Snakemake on the smoke profile, in a process group of its own."""
    config = ["--config", "profile=smoke", f"results={results}"]
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *config]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    root = Path(__file__).parents[1]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *arguments], cwd=root, env=env, start_new_session=True, **streams)


def finish(process: subprocess.Popen) -> str:
    """Output of a process that must succeed."""
    output, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def results(smoke_results) -> Path:
    """results/smoke of a finished run."""
    return smoke_results / "smoke"


def test_contract_of_the_output(results):
    records = pd.read_parquet(results / "records.parquet")
    columns = "model chip temperature_c method options task metric realisation value tokens cells run_id".split()
    assert list(records.columns)[: len(columns)] == columns  # those of lm-eval's scores have more
    # Clean once, two realisations of everything else; of the joint map one.
    assert len(records[records.task == "ppl:heldout"]) == 4 * (1 + 2 * 10)
    assert len(records[records.task == "ppl:ablation"]) == 1 + 2 * (1 + 5 + 5) + 5 * 5
    assert set(records.task) >= {f"ppl:{name}" for name in ("choice", "methods", "budget", "read", "chips")}
    probes = {"routing": 4, "transfer": 4, "unnoised": 4, "parts": 2 * 3, "perturbed": 3 + 4 + 4}
    assert {task: len(records[records.task == f"ppl:{task}"]) for task in probes} == probes
    key = ["model", "chip", "temperature_c", "method", "options", "task", "metric", "realisation", "tokens"]
    assert not records.duplicated(key).any()
    scaled = records[records.task == "ppl:scaled"]
    assert scaled.groupby("tokens").size().tolist() == [6, 12]  # of the frontier, in pairs; of the probe
    marks = records[records.task.str.startswith("lm_eval:")]
    assert len(marks.drop_duplicates(["method", "realisation"])) == 1 + 2 * 10 and marks.task.nunique() == 5
    named = "table1 table2 table3 table4 table4_map comparisons costs fig3 fig3_causes models calibration routing"
    for name in named.split():
        assert all((results / "tables" / f"{name}.{kind}").stat().st_size for kind in ("csv", "md", "tex"))
    for name in ("fig2", "fig3", "fig3_causes", "fig5", "front", "table4_map"):
        assert all((results / "figures" / f"{name}.{kind}").stat().st_size for kind in ("png", "svg"))
    for kind in ("html", "md"):
        assert "The capital of France is" in (results / "figures" / f"fig1.{kind}").read_text()
    choice = json.loads((results / "frontier/table1/olmoe/80/choice.json").read_text())
    assert set(choice) == {"home", "pcm/25", "pcm/25/read_seconds=0.01"}
    for place, chosen in choice.items():  # block and share of the projection, then the affine step and copies
        chip = place.partition("/")[0].replace("home", "table1")
        options = records.options[(records.task == "ppl:choice") & (records.chip == chip)].map(json.loads)
        own = [o for o in options if o["read_seconds"] == chosen.get("read_seconds", Pcm.read_seconds)]
        tried = {json.dumps({k: o[k] for k in chosen}) for o in own}
        assert len(tried) in (7, 9, 13) and json.dumps(chosen) in tried
    ledger = pd.read_csv(results / "claims" / "claims.csv")
    assert len(ledger) >= 20 and (ledger.basis == "measured").any() and (results / "claims" / "claims.html").exists()
    runs = {folder.name.rpartition("-")[2] for folder in (results / "wandb").glob("offline-run-*")}
    assert runs >= set(records.run_id)  # every point has its own


def test_parts_of_the_frontier_are_put_together_by_the_whole(results, smoke_results):
    """By hand, with a part that is measured beforehand: the same records as in one go, and its points are used."""
    settings = ["frontier", "profile=smoke", "model=olmoe", "chip=table1", "temperature=80", f"results={smoke_results}"]
    points = results / "points" / "frontier" / "table1-olmoe-80"
    only = "profile.frontier.only={places: [pcm/25], realisations: [0], experiments: [choice, chips]}"
    done = romer(*settings, only)
    assert done.returncode == 0, done.stderr
    assert len(list(points.iterdir())) >= 7 + 4 and not (results / "selected" / "frontier").exists()
    process = romer(*settings)
    assert process.returncode == 0, process.stderr
    assert not points.exists()
    (alone,) = (results / "selected/frontier/table1/olmoe/80").glob("*/records.parquet")
    key = ["task", "chip", "method", "options", "realisation"]
    found, expected = (
        pd.read_parquet(path).set_index(key).sort_index()
        for path in (alone, results / "frontier/table1/olmoe/80/records.parquet")
    )
    pd.testing.assert_series_equal(found.value, expected.value)
    assert "places: found 'rram_a/25'" in one_line(romer(*settings, "profile.frontier.only.places=[rram_a/25]"))
    assert "n_replace: found 2.5, expected int" in one_line(romer(*settings, "profile.frontier.choice.n_replace=[2.5]"))


def test_calibration_meets_its_target(results):
    chips = ("table1", "table4", "pcm", "neurram")  # other tests calibrate further ones by hand
    files = [f for chip in chips for f in results.glob(f"calibrate/{chip}/*/*/calibration.json")]
    fits = [json.loads(f.read_text()) for f in files]
    assert len(fits) == 4 + 1 + 2
    for fit in fits:
        assert abs(fit["kl"] / fit["kl_target"] - 1) < 0.02 and fit["evaluations"] <= 12
        assert fit["sigma_low"] <= fit["sigma_dev"] <= fit["sigma_high"]


def test_measured_chips_are_compared_with_their_noise_model(results):
    """A chip's own simulation is the target, and what one number cannot tell is reported beside it."""
    for chip, converted in (("pcm", False), ("neurram", True)):
        (folder,) = (results / "calibrate" / chip).glob("*/*")
        fit = json.loads((folder / "calibration.json").read_text())
        assert fit["kl_chip_model"] > 0 and fit["layer_distance"] > 0
        layers = pd.read_csv(folder / "layers.csv")
        assert set(layers.source) == {"chip", "noise model"} and (layers.relative_error > 0).all()
        assert (folder / "ranges.safetensors").exists() == converted == (fit["adc"] is not None)


def test_every_parameter_is_accounted_for(results):
    found = [
        file for stage in ("evaluate", "hardware/*", "generate") for file in results.glob(f"{stage}/*/*/*/coverage.csv")
    ]
    assert {"hardware", "generate"} < {str(file.relative_to(results)).partition("/")[0] for file in found}
    for file in found:
        rows = pd.read_csv(file, keep_default_na=False)
        quality = json.loads((results / "standin" / file.parts[-3] / "quality.json").read_text())
        assert (rows.groupby(["method", "options"])["count"].sum() == quality["parameters"]).all()
        assert (rows.analog == (rows.analog_count > 0)).all() and (rows.analog == (rows.encoding != "")).all()
        plain = rows[rows.method == "vanilla"]
        assert plain[plain.kind == "routed expert"].analog.all() and not rows[rows.kind == "embedding"].analog.any()


def test_coverage_says_what_each_method_keeps_digital(results):
    folder = results / "evaluate/table1/olmoe/80"
    rows = pd.read_csv(folder / "coverage.csv", keep_default_na=False).set_index("method")
    assert not rows.loc["clean"].analog.any() and not rows.loc["digital_router"].query("kind == 'router'").analog.any()
    assert set(rows.loc["average"].query("analog").encoding) == {"plain, replicated"}
    costs = pd.read_csv(folder / "cost.csv").set_index("method")
    total = rows.loc["vanilla"].analog_count.sum()
    for method in ("vanilla", "digital_router", "digital_experts"):
        assert 1 - rows.loc[method].analog_count.sum() / total == pytest.approx(costs.loc[method, "digital"])


def test_lineage_is_recorded_and_verified(results):
    manifest = verify(results / "evaluate/table1/olmoe/80")
    for stage in ("standin", "text", "calibrate", "plan"):
        folder = {"text": "text", "standin": "standin/olmoe"}.get(stage, f"{stage}/table1/olmoe/80")
        assert manifest.inputs[stage] == verify(results / folder).digest


def test_no_document_is_read_for_both_fitting_and_reporting(results):
    ids = {
        use: {json.loads(line)["id"] for line in (results / "text" / f"{use}.jsonl").read_text().splitlines()}
        for use in ("calibration", "evaluation")
    }
    assert all(ids.values()) and not ids["calibration"] & ids["evaluation"]
    about = json.loads((results / "text" / "about.json").read_text())
    assert about["overlapping_calibration_documents"] == 0


def test_artifacts_of_different_texts_are_not_mixed(smoke_results, tmp_path):
    """A plan that was made from another text is refused, whatever its own bytes say."""
    shutil.copytree(smoke_results, tmp_path / "results", symlinks=True)
    overrides = ["profile=smoke", f"results={tmp_path / 'results'}", "tracking=disabled", "model=olmoe"]
    assert romer("text", *overrides, "text.evaluation=0.3").returncode == 0
    line = one_line(romer("evaluate", *overrides, "method=vanilla", "temperature=80"))
    assert "made from another text" in line


def test_vanilla_and_romer_share_their_noise(results):
    """n and λ act on routing alone: paired by realisation, methods differ less than realisations do."""
    records = pd.read_parquet(results / "evaluate/table1/deepseek/80/records.parquet")
    wide = records[records.realisation >= 0].pivot(index="realisation", columns="method", values="value")
    assert (wide["romer"] - wide["vanilla"]).abs().max() < wide["vanilla"].max() - wide["vanilla"].min()


@pytest.mark.parametrize("sigma", ["-0.1", "abc"])
def test_sigma_that_is_none(smoke, sigma):
    line = one_line(romer("evaluate", *smoke("deepseek", "80"), "method=vanilla", f"noise.sigma_dev={sigma}"))
    assert "sigma_dev" in line and sigma in line


def test_more_replaced_than_half(smoke):
    line = one_line(romer("evaluate", *smoke("deepseek", "80"), "method=romer", "method.romer.n_replace=33"))
    assert "n_replace" in line and "33" in line and "32" in line  # deepseek: E = 64


def test_second_run_has_nothing_to_do(smoke_results):
    assert "Nothing to be done" in finish(snakemake(smoke_results, "--", "all"))


def test_killed_ablation_resumes(smoke_results):
    """Killed with some points done, the job repeats none of them, and records and tables are the same bytes."""
    root = smoke_results / "smoke"
    before = {f: (root / f).read_bytes() for f in ("records.parquet", "tables/table4.csv", "tables/table4.md")}
    for folder in (ABLATED, "tables", "figures"):
        shutil.rmtree(root / folder)
    (root / "records.parquet").unlink()
    points = root / "points" / "ablate" / ABLATED.removeprefix("ablate/").replace("/", "-")
    process = snakemake(smoke_results, "--", "all")
    deadline = time.monotonic() + 400
    while len(list(points.glob("*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {f: f.stat().st_mtime_ns for f in points.glob("*.json")}
    assert 5 <= len(done) < 48 and not (root / ABLATED).exists()
    finish(snakemake(smoke_results, "--unlock"))
    finish(snakemake(smoke_results, "--", "all"))
    log = (root / "logs" / f"{ABLATED}.log").read_text()
    assert f"{len(done)} of 48 points were finished before" in log
    assert not points.exists()
    assert {f: (root / f).read_bytes() for f in before} == before
