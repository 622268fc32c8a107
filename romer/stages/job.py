"""What every stage has in common: the composed configuration, where artifacts lie, the model, its text, its W&B run.

@application
def main(job: Job): ...        # a Hydra application on conf/config.yaml
"""

import functools
import json
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
from romer.adc import Converter, read_ranges
from romer.chips import Chip, build, files
from romer.cli import conf_folder
from romer.encoding import PLAIN, Layout
from romer.errors import InputError
from romer.evaluate.sweep import Point
from romer.methods import Fitted, get
from romer.noise import Conductance
from romer.placement import Placement, coverage
from romer.stages.forms import check_forms
from romer.store import Manifest, Points, artifact, file_sha256, verify
from romer.tracking import Run, Tracker

CALIBRATION_REALISATIONS = (
    1000  # fitting sees realisations from here on, reports see those from 0: never the same noise
)


class Job:
    """One run of a stage: its configuration `cfg` and the hashes of the artifacts that it has read so far
    (`inputs`)."""

    def __init__(self, stage: str, cfg: DictConfig):
        self.stage, self.cfg = stage, cfg
        if not isinstance(cfg.chip.name, str):
            raise InputError(f"chip.name: found {cfg.chip.name!r}, expected a name")
        if "tasks" in cfg.task and stage != "evaluate":
            raise InputError(f"task: found {', '.join(cfg.task.tasks)}, which `romer evaluate` alone measures")
        self.config = OmegaConf.to_container(cfg, resolve=True)
        check_forms(self.config)
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
        kept = {key: cfg[key] for key in ("seed", "dtype", "noise", "placement", "chip")}
        return kept | {key: cfg["profile"][key] for key in ("window", "fit")}

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
        self.same_origin(folder, {stage: manifest.digest, **manifest.inputs})
        if stage == "calibrate":
            self.same_noise(manifest)
        self.inputs[stage] = manifest.digest
        if self.opened is not None:
            self.opened.configure({"inputs": dict(self.inputs)})
        return folder

    def same_origin(self, folder: Path, origins: dict[str, str]) -> None:
        """Notes the digests by name that `folder` was made from. InputError where this job has read another of them."""
        for name, digest in origins.items():
            if self.lineage.setdefault(name, digest) != digest:
                again = "romer calibrate" if name.startswith("chip/") else "snakemake"
                raise InputError(f"{folder}: made from another {name} than this job reads; run `{again}` again")

    def same_noise(self, manifest: Manifest) -> None:
        """InputError where a calibration was made for another chip, ADC, placement or dtype than this job's."""
        folder, saved = manifest.path, manifest.config
        for key in ("chip", "placement", "dtype"):
            if saved[key] != self.config[key]:
                raise InputError(f"{folder}: calibrated with another {key}; run `romer calibrate` with this one")
        if saved["noise"]["adc"] != self.config["noise"]["adc"]:
            raise InputError(f"{folder}: calibrated with another noise.adc; run `romer calibrate` with this one")

    @property
    def methods(self) -> list[tuple[str, dict]]:
        """(name, options) of the chosen methods; what is null in the configuration is left to the fit."""
        chosen = self.config["method"].items()
        return [(name, {key: value for key, value in options.items() if value is not None}) for name, options in chosen]

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

    @functools.cached_property
    def chip(self) -> Chip:
        """The chip of this operating point; noise.adc stands for its ADC where set."""
        cfg = self.config
        celsius, section = cfg["temperature"]["celsius"], dict(cfg["chip"])
        if not isinstance(celsius, int | float):
            raise InputError(f"temperature.celsius: found {celsius!r}, expected a number")
        if cfg["noise"]["adc"] is not None:
            section["adc"] = cfg["noise"]["adc"]
        chip = build(section, cfg["model"]["name"], float(celsius))
        read = {f"chip/{level}": file_sha256(path) for level, path in files(section).items()}
        self.same_origin(Path(chip.name), read)
        self.inputs |= read
        return chip

    def noise(self) -> NoiseModel:
        """The noise model of this operating point.

        noise.source `fitted`: eq. 2 with noise.sigma_dev where set, else with what the calibration fitted; `chip`: the
        chip's own errors. The ADC belongs to both; its ranges come from the calibration.
        """
        source, sigma, chip = self.cfg.noise.source, self.cfg.noise.sigma_dev, self.chip
        if source not in ("fitted", "chip"):
            raise InputError(f"noise.source: found {source!r}, expected fitted or chip")
        if sigma is not None and not isinstance(sigma, int | float):
            raise InputError(f"noise.sigma_dev: found {sigma!r}, expected a number, or null for the fitted one")
        if source == "chip" and (sigma is not None or not (chip.errors or chip.adc)):
            what = f"noise.sigma_dev={sigma}" if sigma is not None else f"chip {chip.name} without errors of its own"
            raise InputError(f"noise.source=chip: found {what}, expected a chip with cells, columns or an ADC alone")
        converter = self.converter() if chip.adc is not None else None
        if source == "chip":
            return NoiseModel(0.0, self.cfg.seed, chip.errors, converter)
        if sigma is None:
            fit = pd.read_json(self.read("calibrate") / "calibration.json", typ="series")
            sigma = fit["sigma_dev"]
        return NoiseModel(float(sigma), self.cfg.seed, (), converter)

    def converter(self) -> Converter:
        """The chip's ADC with the ranges of the calibration stage."""
        return Converter(self.chip.adc, read_ranges(self.read("calibrate") / "ranges.safetensors"))

    def write_coverage(self, model, folder: Path, used: Iterable[tuple[str, dict, Fitted]] = ()) -> None:
        """coverage.csv: every parameter of the model, how many of its weights are analog and in which encoding, and the
        KV cache, which is no parameter (count 0). used: methods with their complete options and what they were fitted
        to; where there are any, the rows are those under each of these settings."""
        frames = {}
        for name, options, fitted in used:
            at = name, json.dumps(options, sort_keys=True)
            if at not in frames:
                method = get(name)
                placement = method.placement(self.placement) if method.noisy else None
                frames[at] = self._covered(model, placement, method.layout(model, fitted, options))
        if frames:
            rows = pd.concat(frames, names=["method", "options"]).reset_index(["method", "options"])
        else:
            rows = self._covered(model, self.placement, Layout())
        rows.to_csv(folder / "coverage.csv", index=False)

    def _covered(self, model, placement: Placement | None, layout: Layout) -> pd.DataFrame:
        """The rows of one layout; all is digital without a placement."""
        own = self.stage == "calibrate" or self.cfg.noise.source == "chip"
        pairs = own and any(isinstance(error, Conductance) for error in self.chip.errors)
        plain = "differential pair" if pairs else "plain"
        encoding = plain if layout.encoding is PLAIN else f"{plain}, {type(layout.encoding).__name__.lower()}"
        rows = []
        for row in coverage(model, placement or self.placement):
            slots = row.shape[0] if len(row.shape) == 3 else 1
            stored = slots - len(layout.digital_slots(row.parameter, slots)) if placement and row.analog else 0
            count = row.count * stored // slots
            how = {"shape": "x".join(map(str, row.shape)), "analog": count > 0, "analog_count": count}
            rows.append(asdict(row) | how | {"encoding": encoding if count else ""})
        kv = placement is not None and placement.kv  # keys and values are written plainly by every method
        cache = {"parameter": "cached keys and values", "count": 0, "kind": "kv cache", "analog": kv, "analog_count": 0}
        return pd.DataFrame([*rows, cache | {"encoding": plain if kv else ""}])

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
