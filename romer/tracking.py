"""Weights & Biases: one run per point, never the reason why a job fails. No other module imports wandb.

    tracker = Tracker("offline", Path("results/wandb"))
    with tracker.run("evaluate", name, group="olmoe", config=config, tags=["table1"], identity=key) as run:
        run.log({"ppl": 6.1})
        run.summary({"recovered": 0.4})

    wandb leet results/wandb                              # dashboards on this machine
    wandb sync results/wandb/offline-run-*                # or online

wandb 0.31.0, measured on one core: import and first run 1 s, each further run 0.01 s (0.1 s with a list of installed
packages, left out here). With `reinit="create_new"` each run has a file of its own, also while another is open.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from romer.errors import InputError
from romer.store import canonical_json, sha256

MODES = ("online", "offline", "disabled")
INIT_TIMEOUT_S = 30.0  # wandb's default is 90, a job without a network would wait so long
FINISH_TIMEOUT_S = 60.0  # wandb's default is to wait for the upload for ever


def run_id(stage: str, identity: Mapping) -> str:
    """The run's id, 16 hex digits: the same for the same stage and identity on every machine.

    Raises InputError when the identity is no plain JSON.
    """
    text = canonical_json({"stage": stage, "identity": identity}, f"identity of a {stage} run")
    return sha256(text)[:16]


class Run:
    """One W&B run, or nothing where tracking is off. id: see `run_id`."""

    def __init__(self, id: str, tracker: "Tracker", wandb_run):
        self.id = id
        self._tracker = tracker
        self._run = wandb_run

    def log(self, metrics: Mapping) -> None:
        """Appends one step to the run's history."""
        if self._run is not None and self._tracker.mode != "disabled":
            self._tracker.attempt(lambda: self._run.log(dict(metrics)))

    def configure(self, values: Mapping) -> None:
        """Adds to the run's configuration what was not known when it was opened."""
        if self._run is not None and self._tracker.mode != "disabled":
            self._tracker.attempt(lambda: self._run.config.update(dict(values), allow_val_change=True))

    def summary(self, values: Mapping) -> None:
        """Sets values that describe the whole run."""
        if self._run is not None and self._tracker.mode != "disabled":
            self._tracker.attempt(lambda: self._run.summary.update(dict(values)))


class Tracker:
    """Opens runs in one mode: online, offline or disabled (wandb is then not even imported).

    folder: where runs land, named `wandb` because wandb insists on that name; project, entity: W&B's own. The first
    exception of wandb is reported as one line on stderr, and the tracker is disabled from then on.
    Raises InputError for an unknown mode or a folder of another name.
    """

    def __init__(self, mode: str, folder: Path, project: str = "romer", entity: str | None = None):
        if mode not in MODES:
            raise InputError(f"tracking.mode: found '{mode}', expected one of {', '.join(MODES)}")
        self.folder = Path(folder).resolve()
        if self.folder.name != "wandb":
            raise InputError(f"tracking.folder: found '{folder}', expected a folder named wandb, as in results/wandb")
        self.mode = mode
        self.project = project
        self.entity = entity

    @contextmanager
    def run(
        self, stage: str, name: str, group: str, config: Mapping, tags: Sequence[str], identity: Mapping
    ) -> Iterator[Run]:
        """A run for the length of the block; an exception of the block marks it as failed and goes on upwards.

        stage: the job type; group: the model; config: what the point depends on, with the hashes of its inputs;
        identity: what makes it the same point when it is computed again. An offline run that ends well replaces earlier
        ones of its id. Raises InputError when the identity is no plain JSON.
        """
        id = run_id(stage, identity)
        wandb_run = None
        if self.mode != "disabled":
            wandb_run = self.attempt(lambda: self._start(id, stage, name, group, config, tags))
        exit_code = 1
        try:
            yield Run(id, self, wandb_run)
            exit_code = 0
        finally:
            if wandb_run is not None:
                self.attempt(lambda: self._finish(id, wandb_run, exit_code))

    def attempt(self, call: Callable):
        """call(), or None when that fails: the first failure is reported and disables the tracker."""
        try:
            return call()
        except Exception as error:  # whatever it is, the job is worth more than its dashboard
            if self.mode != "disabled":
                self.mode = "disabled"
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"romer: W&B failed, going on without it ({reason})", file=sys.stderr)
            return None

    def _start(self, id: str, stage: str, name: str, group: str, config: Mapping, tags: Sequence[str]):
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder.parent, os.W_OK):  # wandb would quietly write to the system's temporary folder
            raise PermissionError(f"{self.folder.parent} is not writable")
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            login_timeout=INIT_TIMEOUT_S,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
        )
        return wandb.init(
            reinit="create_new",
            mode=self.mode,
            dir=str(self.folder.parent),
            project=self.project,
            entity=self.entity,
            id=id,
            name=name,
            group=group,
            job_type=stage,
            tags=list(tags),
            config=dict(config),
            settings=settings,
        )

    def _finish(self, id: str, wandb_run, exit_code: int) -> None:
        wandb_run.finish(exit_code=exit_code)
        if self.mode == "offline" and exit_code == 0:
            kept = Path(wandb_run.dir).parent
            for run in self.folder.glob(f"offline-run-*-{id}*"):
                if run != kept:  # two runs with one id would overwrite each other when they are synced
                    shutil.rmtree(run, ignore_errors=True)
