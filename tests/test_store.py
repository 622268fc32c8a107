"""Artifacts and points: whole or not there at all, equal for equal content, and every damage is named."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from romer import store
from romer.errors import InputError
from romer.store import MANIFEST, Points, artifact, canonical_json, digest, file_sha256, verify, write_atomic

CONFIG = {"model": "olmoe", "temperature_c": 25, "lambda": [0.1, 0.2]}
INPUTS = {"plan": "0" * 64}
KEY = {"method": "romer", "realisation": 3}


def write_example(path: Path, text: str = "a,b\n1,2\n") -> Path:
    with artifact(path, inputs=INPUTS, config=CONFIG, seeds={"noise": 7}) as folder:
        (folder / "rows.csv").write_text(text)
        (folder / "layers").mkdir()
        (folder / "layers" / "0.bin").write_bytes(b"\0\1")
    return path


def killed(code: str, cwd: Path) -> None:
    """Runs code in a process of its own that must end by SIGKILL, sent by itself through `die()`."""
    preamble = "import os, signal; from romer.store import *; die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
    environment = os.environ | {"PYTHONPATH": str(Path(store.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", preamble + code], cwd=cwd, env=environment)
    assert done.returncode == -signal.SIGKILL


def test_two_runs_give_identical_manifests(tmp_path):
    first, second = write_example(tmp_path / "a"), write_example(tmp_path / "b" / "c")
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()
    assert digest(first) == digest(second) != digest(write_example(tmp_path / "d", "a,b\n1,3\n"))


def test_the_digest_depends_on_the_names_of_the_files(tmp_path):
    for name in ("a", "b"):
        with artifact(tmp_path / name, inputs={}, config={}) as folder:
            (folder / name).write_text("same")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_manifest_records_content_inputs_configuration_and_code(tmp_path):
    path = write_example(tmp_path / "a")
    manifest = verify(path)
    rows = {"sha256": file_sha256(path / "rows.csv"), "size": 8}
    assert manifest.files["rows.csv"] == rows and set(manifest.files) == {"rows.csv", "layers/0.bin"}
    assert (manifest.inputs, manifest.config, manifest.code) == (INPUTS, CONFIG, store.code_version())
    record = json.loads((path / MANIFEST).read_text())
    assert record["seeds"] == {"noise": 7} and {"python", "torch", "transformers", "romer"} == set(record["versions"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "rows.csv").unlink(), "rows.csv: missing"),
        (lambda p: (p / "layers" / "1.bin").touch(), "layers/1.bin: extra"),
        (lambda p: (p / "layers" / "0.bin").write_bytes(b"\0\2"), "layers/0.bin: changed"),
        (lambda p: (p / "link").symlink_to("rows.csv"), "'link' is a link"),
        (lambda p: (p / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda p: (p / MANIFEST).write_text("{"), "manifest.json: damaged"),
        (lambda p: (p / MANIFEST).write_text("[]"), "manifest.json: damaged"),
        (lambda p: (p / MANIFEST).write_text('{"files": {}}'), "manifest.json: field 'inputs' is missing"),
        (
            lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace("olmoe", "qwen3")),
            "field 'config' was changed",
        ),
    ],
)
def test_verify_names_what_is_wrong(tmp_path, damage, message):
    path = write_example(tmp_path / "a")
    damage(path)
    with pytest.raises(InputError, match=message):
        verify(path)


def test_verify_overlooks_the_file_that_snakemake_adds(tmp_path):
    path = write_example(tmp_path / "a")
    before = digest(path)
    (path / ".snakemake_timestamp").touch()
    assert digest(path) == before


def test_a_failing_block_leaves_the_old_artifact_and_nothing_else(tmp_path):
    path = write_example(tmp_path / "a")
    before = digest(path)
    with pytest.raises(KeyboardInterrupt), artifact(path, inputs={}, config={}) as folder:
        (folder / "rows.csv").write_text("half")
        raise KeyboardInterrupt
    assert digest(path) == before and os.listdir(tmp_path) == ["a"]


def test_an_artifact_is_replaced_as_a_whole(tmp_path):
    path = write_example(tmp_path / "a")
    with artifact(path, inputs={}, config={}) as folder:
        (folder / "other.csv").write_text("new")
        assert set(verify(path).files) == {"rows.csv", "layers/0.bin"}  # readers see the old one until the end
    assert set(verify(path).files) == {"other.csv"} and os.listdir(tmp_path) == ["a"]


def test_what_is_no_artifact_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(InputError, match="found a file|not replaced"), artifact(path, inputs={}, config={}):
            pytest.fail("the block ran")
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("inputs", "config", "message"),
    [
        ({"plan": "plan.json"}, {}, "input 'plan' is 'plan.json'"),
        ({}, {"x": float("nan")}, "config: .*finite"),
        ({}, {"x": Path("y")}, "config: found a PosixPath"),
    ],
)
def test_malformed_inputs_and_configuration_are_refused_before_the_work(tmp_path, inputs, config, message):
    with pytest.raises(InputError, match=message), artifact(tmp_path / "a", inputs=inputs, config=config):
        pytest.fail("the block ran")
    assert not os.listdir(tmp_path)


def test_a_killed_writer_leaves_the_old_artifact_and_the_next_one_cleans_up(tmp_path):
    path = write_example(tmp_path / "a")
    before = digest(path)
    killed("with artifact('a', inputs={}, config={}) as f:\n  (f / 'x').write_text('half')\n  die()", tmp_path)
    assert digest(path) == before and len(os.listdir(tmp_path)) == 2
    with artifact(tmp_path / "b", inputs={}, config={}):
        pass
    assert len(os.listdir(tmp_path)) == 3  # another artifact's leftovers are not its business
    write_example(path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_the_temporary_folder_of_a_living_process_is_left_alone(tmp_path):
    with artifact(tmp_path / "a", inputs={}, config={}) as first:
        (first / "x").write_text("1")
        with artifact(tmp_path / "a", inputs={}, config={}):
            assert (first / "x").read_text() == "1"


def test_write_atomic_killed_half_way_keeps_the_old_file(tmp_path):
    write_atomic(tmp_path / "x.json", "old")
    killed("import romer.store\nos.replace = lambda *a: die()\nwrite_atomic('x.json', 'new')", tmp_path)
    assert (tmp_path / "x.json").read_text() == "old"
    write_atomic(tmp_path / "x.json", b"newer")
    assert (tmp_path / "x.json").read_text() == "newer" and os.listdir(tmp_path) == ["x.json"]


def test_write_atomic_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "folder", "text")
    assert os.listdir(tmp_path) == ["folder"]


def test_code_version_depends_on_names_and_contents(tmp_path):
    def version(folder: str, files: dict) -> str:
        package = tmp_path / folder / "romer"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()  # the package's own imports everything
        for name in ("errors.py", "store.py"):
            (package / name).write_bytes((Path(store.__file__).parent / name).read_bytes())
        for name, text in files.items():
            (package / name).write_text(text)
        command = [sys.executable, "-c", "from romer.store import code_version; print(code_version())"]
        # In that folder, so that this copy of the package is the one that is imported.
        return subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=True).stdout

    assert version("a", {"x.py": "1", "notes.txt": "1"}) == version("b", {"x.py": "1", "notes.txt": "2"})
    assert len({version("c", {"x.py": "1"}), version("d", {"x.py": "2"}), version("e", {"y.py": "1"})}) == 3


def test_a_point_comes_back_exactly_with_its_order(tmp_path):
    value = {"rows": [{"ppl": 0.1 + 0.2, "method": "romer"}, {"ppl": 1e-300, "n": 2**60}], "a": None, "ok": True}
    Points(tmp_path / "p").put(KEY, value)
    found = Points(tmp_path / "p").get({"realisation": 3, "method": "romer"})
    assert json.dumps(found) == json.dumps(value)  # the text also compares the order of the columns
    assert Points(tmp_path / "p").get(KEY | {"realisation": 4}) is None


def test_a_point_of_other_code_or_another_key_is_computed_again(tmp_path, monkeypatch):
    points = Points(tmp_path)
    points.put(KEY, {"ppl": 1.0})
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"key": KEY | {"realisation": 4}}))
    assert points.get(KEY) is None
    file.write_text(json.dumps(record))
    assert points.get(KEY) == {"ppl": 1.0}
    monkeypatch.setattr(store, "code_version", lambda: "f" * 64)
    assert points.get(KEY) is None


def test_a_damaged_point_counts_as_missing(tmp_path):
    points = Points(tmp_path)
    points.put(KEY, {"ppl": 12.5, "text": "Aé"})
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-9], b"[]", b"{}", b"\xff\xfe", whole.replace(b"12.5", b"12.6")):
        file.write_bytes(damaged)
        assert points.get(KEY) is None, damaged
    file.write_bytes(whole)
    assert points.get(KEY) == {"ppl": 12.5, "text": "Aé"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rows": [{"ppl": 1.0}, {"ppl": float("nan")}]}, r"point .*romer.*value\['rows'\]\[1\]\['ppl'\] is nan"),
        ({"ppl": float("-inf")}, r"point .*romer.*value\['ppl'\] is -inf"),
        ({"file": Path("x")}, "point .*romer.* found a PosixPath"),
        ({"loads": {0: 1.0}}, "point .*romer.* changes when stored"),
        ({"shape": (2, 3)}, "point .*romer.* changes when stored"),
    ],
)
def test_values_that_json_would_change_are_refused_and_named(tmp_path, value, message):
    with pytest.raises(InputError, match=message):
        Points(tmp_path / "p").put(KEY, value)
    assert not (tmp_path / "p").exists()


def test_points_outlive_a_killed_job_and_clear_deletes_them_alone(tmp_path):
    killed("p = Points('p')\np.put({'i': 0}, {'x': 1})\nos.replace = lambda *a: die()\np.put({'i': 1}, {})", tmp_path)
    points = Points(tmp_path / "p")
    assert points.get({"i": 0}) == {"x": 1} and points.get({"i": 1}) is None
    points.put({"i": 2}, {"x": 3})
    points.clear([{"i": 0}, {"i": 1}])  # one that was never finished is no error
    assert points.get({"i": 0}) is None and points.get({"i": 2}) == {"x": 3}  # another job's point stays


def test_clearing_the_last_point_takes_the_folder_along(tmp_path):
    points = Points(tmp_path / "p")
    points.put({"i": 0}, {"x": 1})
    points.clear([{"i": 0}])
    points.clear([{"i": 0}])
    assert not (tmp_path / "p").exists()


def test_canonical_json_is_one_text_for_equal_values():
    assert canonical_json({"b": [1, 2.5], "a": "é"}, "x") == canonical_json({"a": "é", "b": (1, 2.5)}, "x")


def test_file_sha256_is_the_known_one_and_names_a_missing_file(tmp_path):
    (tmp_path / "x").write_text("abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(InputError, match="nowhere: no such file"):
        file_sha256(tmp_path / "nowhere")
