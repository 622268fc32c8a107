"""What the project stands on: pins that agree, formatted and linted sources, nothing unsafe, nothing of one machine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
UNSAFE = re.compile(
    r"^\s*(import|from)\s+\w*pickle|\w+_pickle\(|allow_pickle\s*=\s*True|torch\.load\(|trust_remote_code\W+True",
    re.MULTILINE,
)


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a tool of this environment in the repository root."""
    command = [str(Path(sys.executable).parent / tool), *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def requirements() -> list[str]:
    """The lines of requirements.txt that are pins, in order."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_requirement_is_pinned_and_torch_comes_first():
    assert requirements()[0].startswith("torch==")
    assert [line for line in requirements() if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)] == []


def test_conda_and_pip_install_the_same_versions():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip_section,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert sorted(pip_section) == sorted(requirements())


def test_the_package_names_the_same_requirements():
    assert sorted(pyproject()["project"]["dependencies"]) == sorted(line.split("==")[0] for line in requirements())


def test_every_subpackage_is_in_the_wheel():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "romer").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders} | {"romer.conf"}
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize(
    "command",
    [
        "ruff check romer tests",
        "ruff format --check romer tests",
        "snakefmt --check Snakefile workflow",
        "snakemake --lint",
    ],
)
def test_sources_are_formatted_and_linted(command):
    result = run(*command.split())
    assert result.returncode == 0, result.stdout


def test_the_paper_profile_can_be_dry_run(tmp_path):
    result = run("snakemake", "--config", "profile=paper", f"results={tmp_path}", "-n", "--quiet", "--", "all")
    assert result.returncode == 0, result.stdout
    assert not list(tmp_path.iterdir())


def test_no_source_names_a_path_of_one_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # In pieces, so that this file is no hit. A letter before the slash makes it part of a URL or of a relative path.
    pattern = "(^|[^[:alnum:].])/" + "work/|bash" + "_jobs"
    # --untracked: also what is not committed yet, but not what .gitignore leaves out.
    result = subprocess.run(["git", "grep", "--untracked", "-nIE", pattern], cwd=ROOT, text=True, capture_output=True)
    assert (result.returncode, result.stdout) == (1, ""), result.stdout + result.stderr  # 1: no hit


def test_nothing_loads_code_with_data():
    sources = sorted((ROOT / "romer").rglob("*.py"))
    hits = [f"{path}: {match.group().strip()}" for path in sources for match in UNSAFE.finditer(path.read_text())]
    assert hits == []
