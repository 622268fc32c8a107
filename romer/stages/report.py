"""`romer report`: one file of records, and every table and figure made from the artifacts of the other stages."""

import io
import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from safetensors.torch import load_file

from romer import published
from romer.cli import conf_folder
from romer.report import figures, tables
from romer.stages.job import Job, application
from romer.store import verify, write_atomic
from romer.tracking import Run


def artifacts(
    job: Job, stage: str, chips: list[str], models: list[str] | None = None, temperatures: list | None = None
) -> list[tuple[tuple[str, str, float], Path]]:
    """((chip, model, temperature), folder) of a stage's artifact at every operating point on `chips`, for all models
    of the profile or for `models`, at all temperatures of the chip or at `temperatures`.

    All are verified and must come from the same text and models; their digests become inputs.
    """
    found = []
    for chip in chips:
        section = yaml.safe_load((conf_folder() / "chip" / f"{chip}.yaml").read_text())
        for model, temperature in product(section["models"], temperatures or section["temperatures"]):
            if model in (models or job.cfg.profile.models):
                folder = job.root / stage / chip / model / str(temperature)
                manifest = verify(folder)
                shared = {"text": "text", "standin": f"standin/{model}"}
                at = f"{chip}/{model}/{temperature}"
                origins = {shared.get(name, f"{name}/{at}"): digest for name, digest in manifest.inputs.items()}
                origins[f"{stage}/{at}"] = manifest.digest
                job.same_origin(folder, origins)
                job.inputs[f"{stage}/{at}"] = manifest.digest
                found.append(((chip, model, float(temperature)), folder))
    return found


def placed(frame: pd.DataFrame, at: tuple[str, str, float]) -> pd.DataFrame:
    """The frame with the columns chip, model and temperature_c in front."""
    return frame.assign(**dict(zip(("chip", "model", "temperature_c"), at, strict=True)))


def quality(job: Job) -> pd.DataFrame:
    """One row a model: perplexity beside the dense base, PIQA accuracy, load per expert."""
    rows = []
    for name in (*job.cfg.profile.reference_models, *job.cfg.profile.models):
        folder = job.root / "standin" / name
        job.inputs[f"standin/{name}"] = job.lineage[f"standin/{name}"] = verify(folder).digest
        rows.append(json.loads((folder / "quality.json").read_text()))
    table = pd.DataFrame(rows)
    if (dense := table.loc[table.kind == "dense", "perplexity"]).size:
        table["perplexity_over_dense"] = table.perplexity / dense.iloc[0]
    return table


def heatmap(job: Job, folder: Path) -> None:
    """Figure 5 for the profile's model and operating point."""
    chosen = job.cfg.profile.heatmap
    at = Path(chosen.chip) / chosen.model / str(chosen.temperature)
    before = load_file(job.root / "profile" / at / "activation.safetensors")
    after = load_file(job.root / "plan" / at / "activation.safetensors")
    shown = {
        "clean": before["clean_magnitude"].numpy(),
        "vanilla": before["noisy_magnitude"].numpy(),
        "romer": after["magnitude"].numpy(),
    }
    title = f"{chosen.model}, chip {chosen.chip}, {chosen.temperature} °C"
    figures.fig5_heatmaps(shown, np.asarray(after["cold"]), folder, "fig5", title)


@application("report")
def main(job: Job, run: Run) -> None:
    """Writes tables/, figures/ (each with its manifest) and records.parquet below results/<profile>."""
    size = job.cfg.profile
    models = quality(job)
    measured = [*artifacts(job, "evaluate", size.evaluated_chips), *artifacts(job, "ablate", size.ablated_chips)]
    measured += artifacts(job, "probe", [size.probe.chip], temperatures=[size.probe.temperature])
    records = pd.concat([pd.read_parquet(folder / "records.parquet") for _, folder in measured], ignore_index=True)
    fits, curves, layers, identified, chosen, routing = [], [], [], [], [], []
    measured_chips = artifacts(job, "calibrate", size.measured_chips, size.measured_models)
    for at, folder in [*artifacts(job, "calibrate", size.chips), *measured_chips]:
        found = json.loads((folder / "calibration.json").read_text())
        found |= {"adc_bits": (found.pop("adc") or {}).get("bits"), "notes": "; ".join(found["notes"])}
        found = {k: v for k, v in found.items() if v is not None and v != ""}
        fits.append(placed(pd.DataFrame([found]), at))
        curves.append(placed(pd.read_csv(folder / "kl_curve.csv"), at))
        layers.append(placed(pd.read_csv(folder / "layers.csv"), at))
        identified.append(placed(pd.read_csv(folder / "identifiability.csv"), at))
    for at, folder in artifacts(job, "plan", size.chips):
        plan = json.loads((folder / "plan.json").read_text())
        chosen.append(placed(pd.DataFrame([{k: plan[k] for k in ("n_replace", "strength")}]), at))
    for at, folder in artifacts(job, "profile", size.chips):
        routing.append(placed(pd.read_csv(folder / "routing.csv"), at))
    text_name = json.loads((job.read("text") / "about.json").read_text())["name"]
    text_name += f" in contexts of {size.window} tokens without BOS"
    with job.write(job.root / "tables") as folder:
        for name, build in {"table1": tables.table1, "table4": tables.table4}.items():
            if name in set(records.chip):
                caption = tables.caption(
                    records, f"Table {name[-1]}.", name, text_name, f"models: {job.cfg.profile.what}"
                )
                tables.write(build(records, published.load(name)), folder, name, caption)
        calibration = pd.concat(fits).merge(pd.concat(chosen), how="left", on=["chip", "model", "temperature_c"])
        tables.write(
            calibration, folder, "calibration", "Fitted noise per operating point; n and λ chosen on calibration text."
        )
        if len(rows := pd.concat(identified)):
            words = "The σ_dev that meets the same KL target with an ADC of each resolution: KL cannot tell them apart."
            tables.write(rows, folder, "identifiability", words)
        tables.write(
            models, folder, "models", f"The models: perplexity on {text_name}, PIQA accuracy, load over the mean."
        )
        mean = pd.concat(routing).groupby(["chip", "model", "temperature_c"], as_index=False).mean()
        tables.write(
            mean.drop(columns=["layer", "realisation"]), folder, "routing", "Routers under noise, mean over layers."
        )
    with job.write(job.root / "figures") as folder:
        figures.fig2_kl(pd.concat(curves), pd.concat(fits), pd.concat(layers), folder, "fig2")
        heatmap(job, folder)
    buffer = io.BytesIO()
    records.to_parquet(buffer, index=False)
    write_atomic(job.root / "records.parquet", buffer.getvalue())
    run.summary({"records": len(records), **{f"perplexity/{r.model}": r.perplexity for r in models.itertuples()}})
