"""Whether the settings of a run have the form that the files of conf/ give them: found before the work, by name."""

import yaml

from romer.cli import conf_folder
from romer.errors import InputError

NULLABLE = ("profile.benchmark.items",)  # settings that may be null where a profile has a value
DRAWN = ("", "profiling.", "plan.", "benchmark.", "frontier.choice.")  # sections that need a realisation or more
POSITIVE = (*(f"profile.{section}realisations" for section in DRAWN), "profile.frontier.choice.elsewhere")
FORMS = {  # of a setting where it is defined: what may stand for it, and in words
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "text"),
    list: (list, "a list"),
    tuple: (list, "a list"),
    dict: (dict, "a mapping"),
}


def check_forms(config: dict) -> None:
    """Raises InputError for a setting of conf/config.yaml or of its profile that has another form than there: a number
    for a list, text for a number, a fraction for a whole number, no realisation where there must be one. What is null
    there, or refers to another setting, may be anything."""
    folder = conf_folder()
    forms = yaml.safe_load((folder / "config.yaml").read_text())
    if (file := folder / "profile" / f"{config['profile']['name']}.yaml").exists():
        forms["profile"] = yaml.safe_load(file.read_text())
    for section, form in forms.items():
        if section in config:
            _check_form(section, config[section], form)


def _check_form(key: str, found, form) -> None:
    if form is None or isinstance(form, str) and "${" in form or found is None and key in NULLABLE:
        return
    accepted, words = FORMS[type(form)]
    if not isinstance(found, accepted) or isinstance(found, bool) and not isinstance(form, bool):
        raise InputError(f"{key}: found {found!r}, expected {words}")
    if key in POSITIVE and found < 1:
        raise InputError(f"{key}: found {found}, expected at least 1")
    if isinstance(form, dict):
        for name in (name for name in form if name in found):
            _check_form(f"{key}.{name}", found[name], form[name])
    if isinstance(form, tuple):
        if len(found) != len(form):
            raise InputError(f"{key}: found {found!r}, expected {words} of {len(form)}")
        for i, (value, like) in enumerate(zip(found, form, strict=True)):
            _check_form(f"{key}[{i}]", value, like)
    if isinstance(form, list) and form:
        for i, value in enumerate(found):
            _check_form(f"{key}[{i}]", value, _of_list(form[0]))


def _of_list(value):
    """What may be in a list whose first element this is: any numbers where it is one, rows like it where it is one."""
    if isinstance(value, list):
        return tuple(map(_of_list, value))
    return float(value) if type(value) is int else value
