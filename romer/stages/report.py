"""`romer report`: one file of records, and every table and figure made from the artifacts of the other stages."""

import io
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from safetensors.torch import load_file

from romer import published
from romer.cli import conf_folder
from romer.report import (
    benchmarks,
    claims,
    comparisons,
    figures,
    frontier,
    hardware,
    routing_figures,
    routing_tables,
    tables,
)
from romer.report.claims_hardware import N_COSTED
from romer.stages.job import Job, application
from romer.store import verify, write_atomic
from romer.tracking import Run

MEASUREMENT = ["model", "chip", "temperature_c", "method", "options", "task", "metric", "realisation", "tokens"]


def artifacts(
    job: Job, stage: str, chips: list[str], models: list[str] | None = None, temperatures: list | None = None
) -> list[tuple[tuple[str, str, float], Path]]:
    """((chip, model, temperature), folder) of a stage's artifact at every operating point on `chips`, for all models
    of the profile or for `models`, at the profile's temperatures of the chip or at `temperatures`.

    All are verified and must come from the same text and models; their digests become inputs.
    """
    found = []
    for chip in chips:
        section = yaml.safe_load((conf_folder() / "chip" / f"{chip}.yaml").read_text())
        own = job.cfg.profile.temperatures.get(chip, section["temperatures"])
        for model, temperature in product(section["models"], temperatures or own):
            if model in (job.cfg.profile.models if models is None else models):
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


def activations(job: Job, chip: str, model: str, temperature: int) -> tuple[dict[str, np.ndarray], np.ndarray, str]:
    """(load of each expert: clean, noisy, romer; cold experts; title) at an operating point. The noisy ones are of one
    realisation, the same: a mean over several would smooth what is to be seen."""
    at = Path(chip) / model / str(temperature)
    before = load_file(job.root / "profile" / at / "activation.safetensors")
    after = load_file(job.root / "plan" / at / "activation.safetensors")
    loads = {"clean": before["clean_magnitude"].numpy(), "noisy": before["first_noisy_magnitude"].numpy()}
    title = f"{model}, chip {chip}, {temperature} °C, one realisation"
    return loads | {"romer": after["magnitude"].numpy()}, np.asarray(after["cold"]), title


@dataclass(frozen=True)
class Calibrations:
    """What was fitted at every operating point: the fits, their KL curves and layer errors, and what an ADC of other
    resolutions would say; n and λ; the routers under noise."""

    fits: pd.DataFrame
    curves: pd.DataFrame
    layers: pd.DataFrame
    identified: pd.DataFrame
    routing: pd.DataFrame


def calibrations(job: Job) -> Calibrations:
    """Reads them from the artifacts of calibrate, plan and profile."""
    size = job.cfg.profile
    calibrated = [
        *artifacts(job, "calibrate", size.chips),
        *artifacts(job, "calibrate", [size.costed.chip], size.costed.models),
        *artifacts(job, "calibrate", [size.benchmark.chip], size.benchmark.models),
        *artifacts(job, "calibrate", [size.probe.chip], size.probe.models, [size.probe.temperature]),
        *artifacts(job, "calibrate", size.measured_chips, size.measured_models),
    ]
    fits, curves, layers, identified = [], [], [], []
    for at, folder in dict(calibrated).items():  # one chip may serve several purposes
        found = json.loads((folder / "calibration.json").read_text())
        found |= {"adc_bits": (found.pop("adc") or {}).get("bits"), "notes": "; ".join(found["notes"])}
        found = {k: v for k, v in found.items() if v is not None and v != ""}
        fits.append(placed(pd.DataFrame([found]), at))
        curves.append(placed(pd.read_csv(folder / "kl_curve.csv"), at))
        layers.append(placed(pd.read_csv(folder / "layers.csv"), at))
        identified.append(placed(pd.read_csv(folder / "identifiability.csv"), at))
    chosen = [
        placed(pd.DataFrame([{k: plan[k] for k in ("n_replace", "strength")}]), at)
        for at, folder in artifacts(job, "plan", size.chips)
        for plan in [json.loads((folder / "plan.json").read_text())]
    ]
    probed = artifacts(job, "profile", [size.probe.chip], size.probe.models, [size.probe.temperature])
    profiled = dict(artifacts(job, "profile", size.chips) + probed)
    routing = [placed(pd.read_csv(folder / "routing.csv"), at) for at, folder in profiled.items()]
    fits = pd.concat(fits).merge(pd.concat(chosen), how="left", on=["chip", "model", "temperature_c"])
    rest = (pd.concat(parts, ignore_index=True) for parts in (curves, layers, identified, routing))
    return Calibrations(fits, *rest)


def hardware_costs(job: Job) -> pd.DataFrame:
    """The rows of the hardware stage on the configured sheet; empty where the profile costs no model."""
    size = job.cfg.profile
    sheet = f"hardware/{job.cfg.hardware.name}"
    found = [pd.read_csv(f / "cost.csv") for _, f in artifacts(job, sheet, [size.costed.chip], size.costed.models)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def method_costs(job: Job) -> pd.DataFrame:
    """What every method takes in cells, products, conversions and digital work, by model and operating point."""
    found = artifacts(job, "evaluate", job.cfg.profile.evaluated_chips)
    return pd.concat([placed(pd.read_csv(folder / "cost.csv"), at) for at, folder in found], ignore_index=True)


def best_shape(costs: pd.DataFrame) -> str:
    """Those of the paper's checkpoints where they were costed, else the models' own."""
    return "checkpoint" if "checkpoint" in set(costs["shape"]) else "own"


def overheads(costs: pd.DataFrame) -> pd.DataFrame | None:
    """The costs of every method, one row a model, as the claims ledger takes them: of the paper's shapes where they
    were costed; romer at N_COSTED for all models where that was costed, else at the n that was fitted."""
    if costs.empty:
        return None
    rows = costs[costs["shape"] == best_shape(costs)].assign(n_replace=lambda r: r["options"].map(hardware.n_of))
    same = rows[(rows["method"] == "romer") & (rows["n_replace"] == N_COSTED)]
    own = rows[rows["selected"]]
    if set(same["model"]) == set(rows["model"]):
        own = pd.concat([own[own["method"] != "romer"], same])
    means = own.groupby(["model", "method"], as_index=False)
    found = means[["time_s", "power_w", "energy_j", "tile_mvms", "n_replace"]].mean()
    plain = found[found["method"] == "vanilla"].set_index("model")["tile_mvms"]
    found["extra_products"] = found["tile_mvms"] / found["model"].map(plain) - 1
    return found.rename(columns={"time_s": "latency_s"})


def write_tables(
    job: Job, folder: Path, models: pd.DataFrame, records: pd.DataFrame, fitted: Calibrations, costs: pd.DataFrame
) -> None:
    """Every table of numbers, as csv, md and tex."""
    size, text = job.cfg.profile, text_name(job)
    what = f"models: {size.what}"
    for name, build in {"table1": tables.table1, "table4": tables.table4}.items():
        if name in set(records.chip):
            words = tables.caption(records, f"Table {name[-1]}.", name, text, what)
            tables.write(build(records, published.load(name)), folder, name, words)
    if len(joint := tables.table4_map(records, published.load("table4"))):
        title = "Table 4, n and λ together; every cell is a mean over the same realisations."
        inside = records[records.method.isin(("clean", "romer"))]  # the caption counts the draws of the map
        tables.write(joint, folder, "table4_map", tables.caption(inside, title, "table4", text, what))
    if len(compared := comparisons.comparisons(records)):
        tables.write(compared, folder, "comparisons", comparisons.caption(compared, text))
    if len(perturbed := routing_tables.perturbation(records)):
        words = (
            f"Figure 3, left: perplexity on {text}, a share of every token's experts drawn at random; published: what"
        )
        words += (
            " section 3.1 states, rounded, for the paper's checkpoints, under more noise than any of its tables has."
        )
        tables.write(perturbed, folder, "fig3", words)
        words = f"ln(ppl / ppl clean) on {text}, by where the noise acts."
        tables.write(routing_tables.causes(records), folder, "fig3_causes", words)
    if len(costs):
        shape = best_shape(costs)
        shapes = {
            "checkpoint": "the paper's checkpoints, routing simulated from the stand-ins' load",
            "own": "the models",
        }
        words = f"Table 3. Cost on {costs['hardware'].iloc[0]}, batches of {costs['batch'].iloc[0]} tokens; shapes of"
        words += (
            f" {shapes[shape]}; chip {costs['chip'].iloc[0]} at {costs['temperature_c'].iloc[0]:g} °C; overheads over"
        )
        words += f" vanilla in per cent; perplexity on {text} of {what}, with its 95 % interval over realisations."
        tables.write(hardware.table3(costs, published.load("table3"), shape), folder, "table3", words)
    words = "What methods cost: cells, products and ADC conversions as multiples of the plain layout; digital: share of"
    words += (
        " weights off the arrays, side: numbers of corrections, operations: digital ones, as shares of the plain ones."
    )
    tables.write(method_costs(job), folder, "costs", words)
    words = "Fitted noise per operating point; sigma_low, sigma_high: the smallest and the largest that a single"
    words += " realisation would give; n and λ chosen on calibration text."
    tables.write(fitted.fits, folder, "calibration", words)
    if len(fitted.identified):
        words = "The σ_dev that meets the same KL target with an ADC of each resolution: KL cannot tell them apart."
        tables.write(fitted.identified, folder, "identifiability", words)
    words = f"The models: perplexity on {text}, PIQA accuracy, load over the mean."
    tables.write(models, folder, "models", words)
    for name, keys, over in (("routing", [], "mean over layers"), ("routing_layers", ["layer"], "per MoE layer")):
        by = fitted.routing.groupby(["chip", "model", "temperature_c", *keys], as_index=False)
        mean = by.mean().drop(columns=[c for c in ("layer", "realisation") if c not in keys])
        mean.insert(3 + len(keys), "realisations", by["realisation"].nunique()["realisation"])
        tables.write(mean, folder, name, f"Routers under noise, {over} and realisations.")


def write_figures(job: Job, folder: Path, records: pd.DataFrame, fitted: Calibrations, costs: pd.DataFrame) -> None:
    """Every figure, as png and svg."""
    figures.fig2_kl(fitted.curves, fitted.fits, fitted.layers, folder, "fig2")
    at, probed = job.cfg.profile.heatmap, job.cfg.profile.probe
    loads, cold, title = activations(job, at.chip, at.model, at.temperature)
    shown = {"clean": loads["clean"], "vanilla": loads["noisy"], "romer": loads["romer"]}
    figures.fig5_heatmaps(shown, cold, folder, "fig5", title)
    if len(perturbed := routing_tables.perturbation(records)):
        loads, _, title = activations(job, probed.chip, probed.models[0], probed.temperature)
        routing_figures.fig3(perturbed, {c: loads[c] for c in ("clean", "noisy")}, folder, "fig3", title)
        routing_figures.fig3_causes(routing_tables.causes(records), folder)
    if len(joint := tables.table4_map(records, published.load("table4"))):
        routing_figures.map4(joint, folder, title="qwen3, chip table4: perplexity over n and λ")
    if len(costs):
        title = (
            f"Shapes of the models themselves; chip {costs['chip'].iloc[0]} at {costs['temperature_c'].iloc[0]:g} °C"
        )
        title += f", means and ranges of {costs['realisation'].nunique()} realisations"
        hardware.front(costs, folder, "front", "own", title)


def marks(job: Job) -> pd.DataFrame:
    """The records of lm-eval's tasks; empty where the profile has none in its pipeline."""
    size = job.cfg.profile.benchmark
    found = [pd.read_parquet(f / "records.parquet") for _, f in artifacts(job, "benchmark", [size.chip], size.models)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def taken_back(job: Job) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(records, costs) of what methods take back; empty where the profile has it not in its pipeline."""
    at, records, costs = job.cfg.profile.frontier, [pd.DataFrame()], [pd.DataFrame()]
    for (_, model, _), folder in artifacts(job, "frontier", [at.chip], at.models, [at.temperature]):
        records.append(pd.read_parquet(folder / "records.parquet"))
        costs.append(pd.read_csv(folder / "cost.csv").assign(model=model))
    return pd.concat(records, ignore_index=True), pd.concat(costs, ignore_index=True)


def write_benchmarks(job: Job, records: pd.DataFrame, tables_folder: Path, figures_folder: Path) -> None:
    """Table 2 and figure 1, where the profile has them in its pipeline."""
    at, what, chip = job.cfg.profile.generate, job.cfg.profile.what, job.cfg.profile.benchmark.chip
    if len(records):
        table = benchmarks.table2(records, published.load("table2"), chip=chip)
        benchmarks.write_table2(table, tables_folder, benchmarks.caption2(records, f"models: {what}", chip=chip))
    for (chip, model, celsius), folder in artifacts(job, "generate", [at.chip], at.models, [at.temperature]):
        rows = json.loads((folder / "continuations.json").read_text())
        words = f"Figure 1. Greedy continuations of {model}, clean, noisy and with ROMER, {chip} at {celsius:g} °C."
        benchmarks.figure1(rows, figures_folder, f"{words} Models: {what}.")


def write_frontier(
    job: Job, records: pd.DataFrame, costs: pd.DataFrame, tables_folder: Path, figures_folder: Path
) -> None:
    """What methods take back for what, where the profile has it in its pipeline."""
    if len(records):
        table = frontier.taken_back(records, costs)
        words = f"{frontier.CAPTION} Text: {text_name(job)}; models: {job.cfg.profile.what}."
        tables.write(table, tables_folder, "frontier", words)
        frontier.picture(table, figures_folder, "frontier")
        frontier.places(table, figures_folder)


def text_name(job: Job) -> str:
    """What the evaluation text is called in captions."""
    name = json.loads((job.read("text") / "about.json").read_text())["name"]
    return f"{name} in contexts of {job.cfg.profile.window} tokens without BOS"


@application("report")
def main(job: Job, run: Run) -> None:
    """Writes tables/, figures/ and claims/ (each with its manifest) and records.parquet below results/<profile>."""
    size, models = job.cfg.profile, quality(job)
    measured = [*artifacts(job, "evaluate", size.evaluated_chips), *artifacts(job, "ablate", size.ablated_chips)]
    measured += artifacts(job, "probe", [size.probe.chip], size.probe.models, [size.probe.temperature])
    records = pd.concat([pd.read_parquet(folder / "records.parquet") for _, folder in measured], ignore_index=True)
    fitted, costs, scores, (beside, prices) = calibrations(job), hardware_costs(job), marks(job), taken_back(job)
    ledger = claims.ledger(records, fitted.routing, overheads(costs))
    with job.write(job.root / "tables") as tables_folder, job.write(job.root / "figures") as figures_folder:
        write_tables(job, tables_folder, models, records, fitted, costs)
        write_figures(job, figures_folder, records, fitted, costs)
        write_benchmarks(job, scores, tables_folder, figures_folder)
        write_frontier(job, beside, prices, tables_folder, figures_folder)
    with job.write(job.root / "claims") as folder:
        tokens = " or ".join(map(str, sorted(set(records[records["metric"] == tables.METRIC]["tokens"]))))
        about = f"Models: {size.what}. Text: {text_name(job)}, {tokens} predicted ones."
        claims.write(ledger, folder, about)
    every = pd.concat([records, scores, beside], ignore_index=True)
    every = every.drop_duplicates(MEASUREMENT)  # probe and frontier measure some points alike
    buffer = io.BytesIO()
    every.to_parquet(buffer, index=False)
    write_atomic(job.root / "records.parquet", buffer.getvalue())
    perplexities = {f"perplexity/{row.model}": row.perplexity for row in models.itertuples()}
    run.summary({"records": len(every), **perplexities, **claims.counts(ledger)})
    job.say(claims.summary(ledger))
