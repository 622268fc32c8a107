"""The configuration: every choice composes, and a sweep runs every combination once."""

import itertools
import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from romer import InputError, methods
from romer.cli import conf_folder
from romer.evaluate.benchmarks import STOCK
from romer.stages.forms import check_forms
from romer.stages.standin import recipe_of

GROUPS = ("profile", "model", "chip", "temperature", "method", "task", "tracking")


def composed(*overrides):
    """The configuration with these overrides, resolved."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
        OmegaConf.to_container(config, resolve=True)
        return config


@pytest.mark.parametrize(
    "group, choice", [(g, f.stem) for g in GROUPS for f in sorted((conf_folder() / g).glob("*.yaml"))]
)
def test_every_choice_composes(group, choice):
    assert composed(f"{group}='{choice}'")


def test_every_file_of_the_tree_starts_with_its_purpose():
    for file in conf_folder().rglob("*.yaml"):
        assert file.read_text().startswith("# "), file


@pytest.mark.parametrize("profile", ["smoke", "standin", "paper"])
def test_profiles_have_what_their_models_need(profile):
    config = composed(f"profile={profile}")
    for name in (*config.profile.models, *config.profile.reference_models):
        assert config.profile.source in composed(f"model={name}").model
    assert set(config.profile.evaluated_chips) | set(config.profile.ablated_chips) == set(config.profile.chips)


def settings(section, key):
    """(name, value) of everything below a mapping that is not null."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from settings(value, f"{key}.{name}")
        elif value is not None:
            yield f"{key}.{name}", value


@pytest.mark.parametrize("profile", ["smoke", "standin", "paper"])
def test_settings_have_the_form_of_their_file(profile):
    config = OmegaConf.to_container(composed(f"profile={profile}"), resolve=True)
    check_forms(config)
    sections = [name for name in ("profile", "text", "placement", "workload", "standin") if name in config]
    checked = [found for section in sections for found in settings(config[section], section)]
    assert len(checked) > 60
    for key, value in checked:
        if key != "standin.work" and key != "profile.name":
            wrong = {"a": 1} if isinstance(value, list) else [value]
            changed = OmegaConf.create(config)
            OmegaConf.update(changed, key, wrong, merge=False)
            with pytest.raises(InputError, match=f"^{key}: found .*, expected "):
                check_forms(OmegaConf.to_container(changed))


@pytest.mark.parametrize(
    "override, message",
    [
        ("profile.plan.n_replace=3", "profile.plan.n_replace: found 3, expected a list"),
        ("profile.plan.strength=[weak]", r"profile.plan.strength[0]: found 'weak', expected a number"),
        ("profile.realisations=2.5", "profile.realisations: found 2.5, expected a whole number"),
        ("profile.realisations=null", "profile.realisations: found None, expected a whole number"),
        ("profile.window=true", "profile.window: found True, expected a whole number"),
        ("profile.frontier.antithetic=1", "profile.frontier.antithetic: found 1, expected true or false"),
        ("profile.frontier.limits=2", "profile.frontier.limits: found 2, expected a mapping"),
        ("profile.frontier.chips=[[pcm]]", r"profile.frontier.chips[0]: found ['pcm'], expected a list of 2"),
        ("profile.frontier.chips=[[pcm,warm]]", r"profile.frontier.chips[0][1]: found 'warm', expected a number"),
        ("profile.plan.realisations=0", "profile.plan.realisations: found 0, expected at least 1"),
        ("profile.frontier.choice.elsewhere=0", "profile.frontier.choice.elsewhere: found 0, expected at least 1"),
        ("results=12", "results: found 12, expected text"),
    ],
)
def test_another_form_is_named(override, message):
    config = OmegaConf.to_container(composed(override), resolve=True)
    with pytest.raises(InputError) as error:
        check_forms(config)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "override",
    [
        "profile.benchmark.items=null",
        "profile.plan.n_replace=[]",
        "profile.frontier.chips=[[pcm,80.5]]",
        "profile.frontier.elsewhere=0",
    ],
)
def test_what_a_setting_may_be_as_well(override):
    check_forms(OmegaConf.to_container(composed(override), resolve=True))


def test_method_files_mirror_the_registry():
    files = {f.stem for f in (conf_folder() / "method").glob("*.yaml")} - {"all"}
    assert set(composed("method=all").method) <= files
    for name in files:
        assert list(composed(f"method={name}").method) == [methods.get(name).name]


def test_task_files_are_the_known_tasks():
    assert {f.stem for f in (conf_folder() / "task").glob("*.yaml")} - {"heldout"} == set(STOCK)
    assert composed().task == composed("task=heldout").task == {"name": "heldout"}
    both = composed("task=['piqa','arc_easy']", "profile.benchmark.items=7", "task.tasks.arc_easy=null").task
    assert both == {"tasks": {"piqa": 7, "arc_easy": None}}


def test_stand_ins_differ_in_what_matters():
    structures = [
        recipe_of(composed(f"model={m}").model.standin).structure for m in ("olmoe", "qwen3", "qwen15", "deepseek")
    ]
    assert {s.norm_topk_prob for s in structures} == {True, False}
    assert {bool(s.shared_neurons) for s in structures} == {True, False}
    assert {s.gated_shared for s in structures} == {True, False}
    assert all(s.shared_neurons + s.n_experts * s.expert_neurons == 1536 for s in structures)


def test_multirun_evaluates_every_combination(smoke_results, tmp_path):
    from tests.test_cli import romer

    sweep = ["model=olmoe,qwen3", "method=vanilla,romer", "temperature=80"]
    common = ["profile=smoke", f"results={smoke_results}", "tracking=disabled", f"hydra.sweep.dir={tmp_path}"]
    done = romer("evaluate", "-m", *sweep, *common)
    assert done.returncode == 0, done.stderr
    for model, method in itertools.product(("olmoe", "qwen3"), ("vanilla", "romer")):
        (found,) = (smoke_results / "smoke/selected/evaluate/table1" / model / "80").glob(f"{method}-*/manifest.json")
        config = json.loads(found.read_text())["config"]
        assert config["model"]["name"] == model and list(config["method"]) == [method]
