"""What every stage has in common: the composed configuration, where artifacts lie, the model, its text, its W&B run.

@application
def main(job: Job): ...        # a Hydra application on conf/config.yaml
"""

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import hydra
import pandas as pd
import torch
import transformers
from omegaconf import DictConfig, OmegaConf

from romer import NoiseModel, load_model, text
from romer.cli import conf_folder
from romer.errors import InputError
from romer.evaluate.sweep import Point
from romer.programming import Placement, coverage
from romer.store import Points, artifact, verify
from romer.tracking import Run, Tracker

CALIBRATION_REALISATIONS = (
    1000  # fitting sees realisations from here on, reports see those from 0: never the same noise
)


class Job:
    """One run of a stage: its configuration `cfg` and the hashes of the artifacts that it has read so far
    (`inputs`)."""

    def __init__(self, stage: str, cfg: DictConfig):
        self.stage, self.cfg = stage, cfg
        self.config = OmegaConf.to_container(cfg, resolve=True)
        self.inputs: dict[str, str] = {}
        self.lineage: dict[str, str] = {}  # what the inputs themselves were made from
        self.opened: Run | None = None
        self.root = Path(cfg.results) / cfg.profile.name
        self.tracker = Tracker(cfg.tracking.mode, self.root / "wandb", cfg.tracking.project, cfg.tracking.entity)
        self.placement = Placement(cfg.placement.rule, cfg.placement.router)
        self.root.mkdir(parents=True, exist_ok=True)  # an unwritable place is found before the work, not after
        torch.manual_seed(0)  # nothing may depend on it; a run that does is at least the same twice

    def say(self, message: str) -> None:
        """Progress, with the time of day, on stdout (Snakemake's log)."""
        print(f"{time.strftime('%H:%M:%S')} {self.stage} {self.where}: {message}", flush=True)

    @property
    def settings(self) -> dict:
        """What every value of this job depends on besides its inputs and its point."""
        cfg = self.config
        return {key: cfg[key] for key in ("seed", "dtype", "noise", "placement")} | {"window": cfg["profile"]["window"]}

    @property
    def where(self) -> str:
        """model, chip and temperature of this job, as a relative path; the model alone where a stage has no chip."""
        cfg = self.cfg
        if self.stage in ("text", "report"):
            return cfg.profile.name
        if self.stage == "standin":
            return cfg.model.name
        return f"{cfg.chip.name}/{cfg.model.name}/{cfg.temperature.celsius}"

    def folder(self, stage: str) -> Path:
        """Where `stage` writes for this model and operating point."""
        cfg = self.cfg
        if stage in ("text", "report"):
            return self.root / stage
        if stage == "standin":
            return self.root / stage / cfg.model.name
        return self.root / stage / cfg.chip.name / cfg.model.name / str(cfg.temperature.celsius)

    def read(self, stage: str) -> Path:
        """The verified artifact of an earlier stage; its digest becomes an input. InputError says how to make a
        missing one."""
        folder = self.folder(stage)
        if not folder.exists():
            choices = f"profile={self.cfg.profile.name}"
            choices += "" if stage == "text" else f" model={self.cfg.model.name}"
            if stage not in ("text", "standin"):
                choices += f" chip={self.cfg.chip.name} temperature={self.cfg.temperature.celsius}"
            hub = self.cfg.model.get("paper") if stage == "standin" and self.cfg.profile.name == "paper" else None
            need = f" (it needs the checkpoint {hub.id} from the hub, or model.paper.id=<local folder>)" if hub else ""
            raise InputError(
                f"{folder} is missing: run `romer {stage} {choices}` first{need}, or `snakemake` for everything"
            )
        manifest = verify(folder)
        for name, found in {stage: manifest.digest, **manifest.inputs}.items():
            if self.lineage.setdefault(name, found) != found:
                raise InputError(f"{folder}: made from another {name} than this job reads; run `snakemake` again")
        self.inputs[stage] = manifest.digest
        if self.opened is not None:
            self.opened.configure({"inputs": dict(self.inputs)})
        return folder

    @contextmanager
    def write(self, folder: Path | None = None) -> Iterator[Path]:
        """The artifact of this job: yields the folder to fill, published when the block ends well."""
        seeds = {"noise": self.cfg.seed}
        target = folder or self.folder(self.stage)
        with artifact(target, inputs=self.inputs, config=self.config, seeds=seeds) as scratch:
            yield scratch
        self.say(f"wrote {target}")

    @functools.cached_property
    def source(self) -> DictConfig:
        """The section of the model's configuration that this profile uses. InputError where the model has none."""
        if self.cfg.profile.source not in self.cfg.model:
            raise InputError(f"model {self.cfg.model.name}: conf/model has no section {self.cfg.profile.source!r}")
        return self.cfg.model[self.cfg.profile.source]

    def load(self):
        """(model, tokenizer) of this job's model."""
        source, revision = self.read("standin") / "checkpoint", None
        if self.source.kind == "hub":
            source, revision = self.source.id, self.source.revision
        return load_model(source, revision, self.cfg.dtype, self.cfg.device)

    def ids(self, tokenizer, use: str, tokens: int) -> torch.Tensor:
        """The first `tokens` tokens of the `evaluation` or `calibration` documents: int64 [tokens]."""
        rows = pd.read_json(self.read("text") / f"{use}.jsonl", lines=True, dtype=False)
        return text.token_stream(tokenizer, [text.Document(*r) for r in rows.itertuples(index=False)], tokens)

    def noise(self) -> NoiseModel:
        """The noise model of this operating point: noise.sigma_dev where set, else what the calibration fitted."""
        if self.cfg.noise.sigma_dev is not None:
            return NoiseModel(float(self.cfg.noise.sigma_dev), self.cfg.seed)
        fit = pd.read_json(self.read("calibrate") / "calibration.json", typ="series")
        return NoiseModel(float(fit["sigma_dev"]), self.cfg.seed)

    def write_coverage(self, model, folder: Path) -> None:
        """coverage.csv: every parameter of the model, analog or digital, with the encoding of the analog ones."""
        rows = pd.DataFrame([asdict(row) for row in coverage(model, self.placement)])
        rows["encoding"] = rows["analog"].map({True: "plain", False: ""})
        rows["shape"] = rows["shape"].map(lambda s: "x".join(map(str, s)))
        rows.to_csv(folder / "coverage.csv", index=False)

    def run(self, name: str, identity: dict, config: dict | None = None):
        """A W&B run of this stage: group = model, job type = stage, config with the inputs' hashes. A context
        manager."""
        cfg = self.cfg
        model = "all" if self.stage in ("text", "report") else cfg.model.name
        tags = [cfg.profile.name, *([] if self.stage in ("text", "report", "standin") else [cfg.chip.name])]
        config = {"inputs": dict(self.inputs), **self.config, **(config or {})}
        identity = {"profile": cfg.profile.name, "at": self.where, "settings": self.settings} | identity
        return self.tracker.run(self.stage, name, model, config, tags, identity)

    @contextmanager
    def job_run(self) -> Iterator[Run]:
        """The W&B run of the whole job; the hashes of its inputs enter its configuration as they are read."""
        choices = {key: self.config[key] for key in ("method", "task", "profile", "data")}
        with self.run(f"{self.stage}-{self.where.replace('/', '-')}", {"point": None, "choices": choices}) as run:
            self.opened = run
            yield run

    @property
    def points(self) -> Points:
        """Finished points at this operating point, kept until their job's artifact is written."""
        return Points(self.root / "points" / self.stage / self.where.replace("/", "-"))

    def point_keys(self, points: Iterable[dict], context: dict) -> list[dict]:
        """What identifies each point: itself, the job's inputs and settings, and the context (task, tokens)."""
        common = context | {"inputs": self.inputs, "settings": self.settings}
        return [common | point for point in points]

    def point(self, key: dict, name: str, compute: Callable[[], dict]) -> dict:
        """The value of one point, computed in a W&B run of its own unless an earlier, killed run of this job has it."""
        if (found := self.points.get(key)) is None:
            with self.run(f"{self.stage}-{name}", {"point": key}, {"point": key}) as run:
                found = compute() | {"run_id": run.id}
                run.log({k: v for k, v in found.items() if isinstance(v, int | float)})
            self.points.put(key, found)
        return found

    def resumed(
        self, todo: Iterable[Point], context: dict, compute: Callable[[list[Point]], Iterator[tuple[Point, float]]]
    ) -> Iterator[tuple[Point, float, str]]:
        """(point, value, run id) of every point; those that an earlier, killed run of this job finished are not
        repeated.

        compute: yields the values of the missing points, in any order. Each new point is a W&B run of its own.
        """
        todo = list(todo)
        keys = dict(zip(todo, self.point_keys([p.key for p in todo], context), strict=True))
        done = {p: found for p in todo if (found := self.points.get(keys[p])) is not None}
        yield from ((p, found["value"], found["run_id"]) for p, found in done.items())
        if done:
            self.say(f"{len(done)} of {len(todo)} points were finished before")
        missing = [p for p in todo if p not in done]
        started = time.monotonic()
        for i, (p, value) in enumerate(compute(missing), 1):
            found = self.point(keys[p], f"{p.method}-{p.realisation}", lambda value=value: {"value": value})
            left = (time.monotonic() - started) / i * (len(missing) - i)
            self.say(f"{p.method} {p.options} realisation {p.realisation}: {value:.4f} ({left:.0f} s left)")
            yield p, value, found["run_id"]


def application(stage: str) -> Callable[[Callable[[Job, Run], None]], Callable[[], None]]:
    """Makes a Hydra application out of a function of a job and its W&B run."""

    def decorate(function: Callable[[Job, Run], None]) -> Callable[[], None]:
        @hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")
        def main(cfg: DictConfig) -> None:
            transformers.logging.disable_progress_bar()
            transformers.logging.set_verbosity_error()
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line
            try:
                job = Job(stage, cfg)
                with job.job_run() as run:
                    function(job, run)
            except (InputError, FloatingPointError, OSError) as error:  # SystemExit passes through Hydra as it is
                print(f"romer {stage}: {' '.join(str(error).split())}", file=sys.stderr)
                sys.exit(2)

        return main

    return decorate
