"""W&B runs as they really land on disk, read back with wandb's own inspector, and what happens when wandb fails."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import romer
from romer.errors import InputError
from romer.tracking import Tracker, run_id

PACKAGE = Path(romer.__file__).parent
INPUTS = {"plan": "ab" * 32}


def isolated(code: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Runs code with `tracker(mode)` in a process that has no W&B settings or credentials of the user's."""
    preamble = (
        "import sys; from pathlib import Path; from romer.tracking import Tracker\n"
        "tracker = lambda mode: Tracker(mode, Path('results/wandb'))\n"
        "run = lambda t, i: t.run('evaluate', f'n{i}', 'olmoe', {'i': i}, ['table1'], {'i': i})\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC"))}
    environment |= {"HOME": str(folder), "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, *flags, "-c", preamble + code]
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def inspect(run: Path) -> dict[str, list[dict]]:
    """The records of an offline run by type, as `wandb leet inspect` reads them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    records: dict[str, list[dict]] = {}
    for record in map(json.loads, done.stdout.splitlines()):
        records.setdefault(record["type"], []).append(record[record["type"]])
    return records


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> tuple[Path, list[str], str]:
    """A folder with the runs of one process, what it printed (their ids) and its stderr.

    The first run is computed twice; the second fails while a third is open.
    """
    folder = tmp_path_factory.mktemp("offline")
    code = f"""
import random; state = random.getstate()
t = tracker("offline")
for attempt in (0, 1):
    with t.run("evaluate", "first", "olmoe", {{"inputs": {INPUTS!r}}}, ["table1"], {{"i": 0}}) as r:
        r.log({{"ppl": 6.5 + attempt}})
        r.summary({{"recovered": 0.25}})
    print(r.id)
with t.run("evaluate", "third", "qwen3", {{}}, [], {{"i": 2}}) as outer:
    try:
        with t.run("evaluate", "second", "qwen3", {{}}, [], {{"i": 1}}) as r:
            r.log({{"ppl": 7.5}})
            raise ArithmeticError
    except ArithmeticError:
        print(r.id, outer.id, t.mode, random.getstate() == state)
"""
    done = isolated(code, folder)
    assert done.returncode == 0, done.stderr
    return folder / "results" / "wandb", done.stdout.split(), done.stderr


def test_every_point_of_a_process_is_a_run_and_a_repeated_one_replaces_itself(offline):
    folder, (id, again, second, third, *rest), stderr = offline
    assert id == again and [id, second, third] == [run_id("evaluate", {"i": i}) for i in range(3)]
    assert sorted(run.name.split("-")[3] for run in folder.glob("offline-run-*")) == sorted([id, second, third])
    assert rest == ["offline", "True"] and stderr == ""  # silent, and the global generator is untouched


def test_the_offline_file_holds_group_job_type_config_and_metrics(offline):
    folder, (id, *_), _ = offline
    (path,) = folder.glob(f"offline-run-*-{id}*")
    records = inspect(path)
    (run,) = records["run"]
    assert (run["run_id"], run["display_name"], run["project"]) == (id, "first", "romer")
    assert (run["run_group"], run["job_type"], run["tags"]) == ("olmoe", "evaluate", ["table1"])
    assert run["config"]["update"]["inputs"] == INPUTS
    assert [row["item"]["ppl"] for row in records["history"]] == [7.5]  # of the second time
    assert any(s["update"].get("recovered") == 0.25 for s in records["summary"])
    assert records["exit"] == [{"exit_code": 0}]
    assert "stats" not in records and "environment" not in records
    assert not [file for file in path.rglob("*") if file.is_file() and file.parent.name not in ("logs", path.name)]


def test_a_point_that_fails_is_a_failed_run(offline):
    folder, (_, _, id, *_), _ = offline
    (path,) = folder.glob(f"offline-run-*-{id}*")
    records = inspect(path)
    assert records["exit"] == [{"exit_code": 1}] and records["history"][0]["item"]["ppl"] == 7.5


def test_an_id_depends_on_stage_and_identity_not_on_order():
    assert run_id("s", {"a": 1, "b": 2}) == run_id("s", {"b": 2, "a": 1})
    assert len({run_id("s", {"a": 1}), run_id("t", {"a": 1}), run_id("s", {"a": 2})}) == 3
    assert len(run_id("s", {})) == 16


def test_disabled_does_not_import_wandb_and_writes_nothing(tmp_path):
    code = """
with run(tracker("disabled"), 0) as r:
    r.log({"ppl": 1.0})
    r.summary({"x": 1})
print(r.id, "wandb" in sys.modules)
"""
    done = isolated(code, tmp_path)
    assert done.stdout.split() == [run_id("evaluate", {"i": 0}), "False"], done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("mode", "before", "inside"),
    [
        ("online", "", ""),  # without credentials
        ("offline", "Path('results').write_text('a file where the folder should be')", ""),
        ("offline", "sys.modules['wandb'] = None  # as if it were not installed", ""),
        ("offline", "", "r.log({1: 1.0})"),
    ],
)
def test_a_failure_of_wandb_is_one_line_and_the_job_goes_on(tmp_path, mode, before, inside):
    code = f"""
{before}
t = tracker("{mode}")
for i in range(3):
    with run(t, i) as r:
        {inside}
        r.log({{"ppl": 1.0}})
        r.summary({{"x": 1}})
print("done", t.mode)
"""
    done = isolated(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "done disabled\n"), done.stderr
    assert done.stderr.startswith("romer: W&B failed, going on without it (") and done.stderr.count("\n") == 1


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="found 'dryrun', expected one of online, offline, disabled"):
        Tracker("dryrun", Path("wandb"))
    with pytest.raises(InputError, match="expected a folder named wandb"):
        Tracker("disabled", Path("results"))
    with pytest.raises(InputError, match="identity of a s run: .*finite"):
        run_id("s", {"sigma_dev": float("nan")})


def test_no_other_module_imports_wandb():
    importers = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "wandb" for name in names):
                importers.add(file.name)
    assert importers == {"tracking.py"}
