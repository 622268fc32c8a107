"""`romer <stage> [hydra arguments]`: one Hydra application per stage of the pipeline.

Bad input is one line on stderr and exit code 2, whether Hydra or the stage finds it.
"""

import gc
import importlib
import os
import sys
from pathlib import Path

from romer.errors import InputError

STAGES = {
    "text": "documents for calibration and evaluation, split and checked for overlap",
    "standin": "the model itself: carved stand-in, tiny random model, or a checkpoint of the hub",
    "calibrate": "sigma_dev that meets a chip's KL target",
    "profile": "expert activation, clean and noisy (eq. 6)",
    "plan": "n, lambda and the replacement plan, chosen on calibration text",
    "evaluate": "perplexity of every method on held-out text, or tasks of lm-eval by hand (task=piqa,arc_easy)",
    "ablate": "the n and lambda grids of table 4",
    "probe": "what breaks under noise, and whether the cure works where it was not fitted",
    "frontier": "what methods take back for which cells and digital numbers, and romer_plus elsewhere",
    "benchmark": "tasks of lm-evaluation-harness for every method (table 2)",
    "generate": "prompts continued by the clean, the noisy and the mended model (figure 1)",
    "hardware": "time, energy and area of every method on a chip (table 3)",
    "report": "records, tables and figures",
}
MERGED = ("method", "task")  # groups of which one job takes several choices
SWEEPS = {"-m", "--multirun", "hydra.mode=MULTIRUN"}


def conf_folder() -> Path:
    """The configuration tree: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").exists():
            return folder
    raise InputError(f"conf: no config.yaml in {package / 'conf'} or {package.parent / 'conf'}")


def check_choices(arguments: list[str]) -> list[str]:
    """The arguments, with every choice of a configuration group quoted: Hydra takes temperature=25 for a number.

    Several choices of a group in MERGED become Hydra's list, one job with all of them; in a sweep, a job each. Raises
    InputError where the group has no such choice: one line that lists them.
    """
    checked, sweep = [], bool(SWEEPS & set(arguments))
    for argument in arguments:
        group, _, value = argument.partition("=")
        folder = conf_folder() / group
        if value.startswith("~/"):  # Hydra's grammar has no tilde
            argument = f"{group}={Path(value).expanduser()}"
        if group and value and "(" not in value and folder.is_dir() and not group.startswith("hydra"):
            choices = sorted(f.stem for f in folder.glob("*.yaml"))
            wanted = [choice.strip(" '\"") for choice in value.split(",")]
            if unknown := [choice for choice in wanted if choice not in choices]:
                raise InputError(f"{group}: found {unknown[0]!r}, expected one of {', '.join(choices)}")
            quoted = ",".join(f"'{choice}'" for choice in wanted)
            together = group in MERGED and len(wanted) > 1 and not sweep
            argument = f"{group}=[{quoted}]" if together else f"{group}={quoted}"
        checked.append(argument)
    return checked


def main() -> None:
    """Entry point of the console script."""
    stage, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if stage in ("", "-h", "--help"):
        print("usage: romer <stage> [--help] [-m] [group=choice[,choice]] [key=value]\n")
        print("\n".join(f"  {name:10} {text}" for name, text in STAGES.items()))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, so that its errors become one line here
    try:
        if stage not in STAGES:
            raise InputError(f"stage: found {stage!r}, expected one of {', '.join(STAGES)}")
        sys.argv = [f"romer {stage}", *check_choices(arguments)]
        application = importlib.import_module(f"romer.stages.{stage}")
        gc.freeze()  # collections need not look through half a million objects of modules each time,
        application.main()
        gc.freeze()  # nor the interpreter when it ends, which takes it 2 s
    except Exception as error:
        if not isinstance(error, InputError) and not type(error).__module__.startswith(("hydra", "omegaconf")):
            raise
        print(f"romer {stage}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
