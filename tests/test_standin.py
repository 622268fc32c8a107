"""Stand-ins: committed files belong to their recipes, and a carved model is the same model in either form."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from romer.cli import conf_folder
from romer.errors import InputError
from romer.models import carving, distillation, standin
from romer.models.carving import Structure
from romer.models.deepseek import DeepseekForCausalLM
from romer.stages.standin import recipe_of

RESOURCES = conf_folder().parent / "resources" / "standins"
NAMES = ("olmoe", "qwen3", "qwen15", "deepseek")
STRUCTURES = {  # 48 neurons a layer; with and without shared experts, gate and renormalisation
    "raw": Structure(4, 12, 3, 0, False, False, 1),
    "renormalised": Structure(6, 8, 4, 0, False, True, 1, (2,)),
    "gated": Structure(4, 8, 2, 16, True, False, 1),
    "shared": Structure(4, 8, 2, 16, False, False, 1),
}


def recipe(name: str) -> standin.Recipe:
    """The configured recipe of a stand-in."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return recipe_of(compose("config", overrides=[f"model={name}"]).model.standin)


@pytest.fixture
def base():
    """A random Llama of three layers with 48 neurons each."""
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(**shape, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True)
        )
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
def test_committed_file_matches_its_recipe(name):
    assert standin.metadata(RESOURCES / f"{name}.safetensors")["fingerprint"] == recipe(name).fingerprint()


def test_file_of_another_recipe_is_refused(tmp_path):
    file = RESOURCES / "olmoe.safetensors"
    save_file(load_file(file), tmp_path / "olmoe.safetensors", metadata={"fingerprint": "0" * 64})
    with pytest.raises(InputError, match="made by recipe"):
        standin.assemble(tmp_path / "olmoe.safetensors", recipe("olmoe"), tmp_path / "checkpoint")


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_checkpoint_computes_what_was_distilled(base, structure):
    """The training form (dense, masked) and the published form (fused experts) agree up to float16 storage."""
    ids = torch.randint(64, (512,), generator=torch.Generator().manual_seed(1))
    dense = {name: p.clone() for name, p in base.state_dict().items()}
    carved = distillation.carve(base, ids, structure, seed=0, rank=2, window=64, progress=lambda line: None)
    for layer in (x for i, x in enumerate(carved.model.layers) if not structure.is_dense(i)):
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            part.b.data.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
        layer.mlp.neuron_scale.data.uniform_(0.8, 1.2, generator=torch.Generator().manual_seed(3))
    parts = distillation.export(carved, structure)
    again = LlamaForCausalLM(base.config)
    again.model.layers = again.model.layers[:3]
    again.load_state_dict(dense)
    model = DeepseekForCausalLM(standin.config_of(structure, again.config)).eval()
    missing = model.load_state_dict(standin.state_dict_of(again, parts, structure), strict=False)
    assert not missing.unexpected_keys
    model.tie_weights()
    with torch.no_grad():
        rows = ids.view(128, 4)  # short contexts: a flipped choice shows in the tokens after it, too
        expected, found = carved(rows).logits, model(rows).logits
    close = (found - expected).abs().amax(-1) < 0.02 * expected.std()
    assert close.float().mean() > 0.9  # float16 storage flips the choice of experts where two are all but tied


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def layer(generator):
    """A random SwiGLU layer: 32 inputs, 48 neurons."""
    return carving.SwiGLU(*(torch.randn(s, generator=generator) for s in ((48, 32), (48, 32), (32, 48))))


def test_all_groups_used_reproduce_the_dense_layer(layer, generator):
    """A SwiGLU layer is the sum of its groups, whatever the grouping."""
    x = torch.randn(64, 32, generator=generator)
    structure = STRUCTURES["gated"]
    order = carving.group_neurons(x, layer, structure, generator)
    assert sorted(order.tolist()) == list(range(48))
    total = carving.gram(x, layer, order, structure).sum((1, 2))
    expected = (layer.activations(x) @ layer.down.T).square().sum(-1)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-2)


def test_router_beats_a_random_one(layer, generator):
    x = torch.randn(512, 32, generator=generator)
    structure = STRUCTURES["renormalised"]
    order = carving.group_neurons(x, layer, structure, generator)
    fitted = carving.fit_router(x, layer, order, structure, generator, steps=100, batch=256)
    unfitted = carving.fit_router(x, layer, order, structure, generator, steps=0, batch=256)
    assert fitted.error < 0.95 * unfitted.error


def test_interrupted_distillation_ends_at_the_same_weights(base, tmp_path):
    """50 steps, then the rest from the checkpoint, equal an uninterrupted run."""
    structure = STRUCTURES["raw"]
    ids = torch.randint(64, (60 * 2 * 16,), generator=torch.Generator().manual_seed(1))
    teacher = distillation.teacher_states(base, ids, 16)
    schedule = distillation.Schedule(tokens=len(ids), window=16, batch=2, rank=2)
    weights = {name: p.clone() for name, p in base.state_dict().items()}
    quiet = {"progress": lambda line: None}

    def run(checkpoint, stop=None):
        model = LlamaForCausalLM(base.config).requires_grad_(False)
        model.load_state_dict(weights)
        model = distillation.carve(model, ids[:512], structure, seed=0, rank=2, window=16, **quiet)
        lines = []

        def progress(line):
            lines.append(line)
            if stop and line.startswith(f"step {stop}/"):
                raise KeyboardInterrupt

        distillation.distil(model, teacher, ids, schedule, 0, checkpoint, progress)
        return distillation.export(model, structure), lines

    whole, _ = run(tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state.safetensors", stop=60)
    resumed, lines = run(tmp_path / "state.safetensors")
    assert len(lines) == 1  # only the last ten steps were left
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olmoe", "qwen3", "qwen15", "deepseek"])
def test_quality_of_the_embedded_models(name, tmp_path):
    """Perplexity at most 1.6 times the dense base's on held-out text, measured by the stage itself."""
    from tests.test_cli import romer

    common = [f"results={tmp_path}", "tracking=disabled", "profile.quality.piqa_items=0"]
    for stage in ("text", "standin", "standin"):
        model = "dense" if not (tmp_path / "standin/standin").exists() else name
        done = romer(stage, f"model={model}", *common)
        assert done.returncode == 0, done.stderr
    found = {
        m: json.loads((tmp_path / f"standin/standin/{m}/quality.json").read_text())["perplexity"]
        for m in ("dense", name)
    }
    assert found[name] <= 1.6 * found["dense"]
