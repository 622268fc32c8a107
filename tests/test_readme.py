"""What the README shows works: its library example runs, its files and commands exist."""

import re
from pathlib import Path

from romer.cli import STAGES, conf_folder

README = Path(__file__).parents[1] / "README.md"


def test_library_example_runs(smoke_results, capsys, monkeypatch):
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.S)[1]
    shown = "results/standin/standin/olmoe/checkpoint"
    assert shown in example
    monkeypatch.chdir(README.parent)
    exec(example.replace(shown, str(smoke_results / "smoke/standin/olmoe/checkpoint")), {})
    assert float(capsys.readouterr().out) > 1


def test_commands_name_stages_and_choices_that_exist():
    text = README.read_text()
    for stage in re.findall(r"`romer (\w+)`", text) + re.findall(r"^    romer (\w+)", text, re.M):
        assert stage in STAGES
    for group, choices in re.findall(r"\b(model|temperature|method|chip|profile|task)=([\w,]+)", text):
        for choice in choices.split(","):
            assert (conf_folder() / group / f"{choice}.yaml").exists(), (group, choice)


def test_every_file_that_is_linked_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("http") or (README.parent / target).exists(), target
