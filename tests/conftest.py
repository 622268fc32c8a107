"""Tiny random models of the paper's four architectures, for tests of properties that hold for any weights."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import romer  # noqa: F401  (registers the experts implementation `analog` and the model type `deepseek`)

COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.4,  # outputs and routing far from uniform
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)
ARCHITECTURES = {  # model_type and fields; k/E below and above the share from which `analog` computes all experts
    "olmoe": ("olmoe", dict(intermediate_size=16, num_experts=8, num_experts_per_tok=2)),
    "qwen3": (
        "qwen3_moe",
        dict(
            intermediate_size=32,
            moe_intermediate_size=16,
            head_dim=8,
            num_experts=16,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
    ),
    "qwen15": (
        "qwen2_moe",
        dict(
            intermediate_size=32,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=12,
            num_experts_per_tok=4,
        ),
    ),
    "deepseek": (
        "deepseek",
        dict(
            intermediate_size=64,
            moe_intermediate_size=16,
            n_routed_experts=16,
            n_shared_experts=2,
            num_experts_per_tok=3,
            first_k_dense_replace=1,
        ),
    ),
}


def tiny(name: str, **changes):
    """A random float32 model with `analog` experts, in evaluation mode; `changes` go into its config."""
    model_type, fields = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **(COMMON | fields | changes))
        model = AutoModelForCausalLM.from_config(config, experts_implementation="analog")
    return model.eval().requires_grad_(False)


# Files whose tests share the finished smoke run: one worker of pytest-xdist takes them all, and first, for they take
# longest. (Its own groups, --dist loadgroup, have no effect in xdist 3.8.0 under pytest 9.2.)
SHARED = {
    f"tests/test_{name}.py" for name in ("pipeline", "calibrate_stage", "configuration", "readme", "evaluate_tasks")
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "smoke" if nodeid.split("::")[0] in SHARED else nodeid

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    assert all(i.nodeid.split("::")[0] in SHARED for i in items if "smoke_results" in i.fixturenames)
    items.sort(key=lambda item: item.nodeid.split("::")[0] not in SHARED)


@pytest.fixture(scope="session")
def built():
    """The models, by name: made once, for reading and copying only."""
    return {name: tiny(name) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def model(request, built):
    """Every architecture in turn; a fresh copy, so that what one test breaks does not reach the next."""
    return copy.deepcopy(built[request.param])


@pytest.fixture
def olmoe(built):
    """Raw softmax weights, no shared experts, two MoE layers of E = 8 with k = 2."""
    return copy.deepcopy(built["olmoe"])


@pytest.fixture
def qwen3(built):
    """Renormalised weights, two MoE layers of E = 16 with k = 2."""
    return copy.deepcopy(built["qwen3"])


@pytest.fixture(scope="session")
def ids():
    """256 random tokens."""
    return torch.randint(2, 64, (256,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tied():
    """A model whose lm_head is its embedding."""
    return tiny("olmoe", tie_word_embeddings=True)


@pytest.fixture
def bits():
    """bits(model): the bytes of every parameter by name; equal exactly when all parameters are bitwise equal."""
    return lambda model: {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


@pytest.fixture
def logits(ids):
    """logits(model): [4, 64, V] of the tokens."""

    def run(model):
        with torch.no_grad():
            return model(ids.view(4, 64), use_cache=False).logits

    return run


@pytest.fixture(scope="session")
def smoke_results(tmp_path_factory) -> Path:
    """A results folder in which the whole smoke profile has run once."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "profile=smoke", f"results={folder}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, "--", "all"], cwd=root, env=env, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.fixture
def smoke(smoke_results):
    """Overrides that point a stage at the finished smoke run: smoke(model, temperature)."""

    def overrides(model: str, temperature: str) -> list[str]:
        at = [f"model={model}", "chip=table1", f"temperature={temperature}"]
        return ["profile=smoke", f"results={smoke_results}", "tracking=disabled", *at]

    return overrides
