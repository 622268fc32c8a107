"""Tiny random models of the paper's four architectures, for tests of properties that hold for any weights."""

import copy
import fcntl
import os
import shutil
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


# Of two workers of pytest-xdist one runs the whole smoke profile, then the tests that run it again; the other
# meanwhile takes those that need no such run. What is left needs it and comes last, on a copy where another worker made
# it. (xdist's own groups, --dist loadgroup, have no effect in 3.8.0 under pytest 9.2.)
FIRST = "tests/test_pipeline.py"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return FIRST if nodeid.split("::")[0] == FIRST else nodeid

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda i: 0 if i.nodeid.split("::")[0] == FIRST else 2 if "smoke_results" in i.fixturenames else 1)


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
def smoke_results(tmp_path_factory, request) -> Path:
    """A results folder in which the whole smoke profile has run once; of each worker its own."""
    folder = tmp_path_factory.getbasetemp() / "results"
    if not hasattr(request.config, "workerinput"):  # no xdist
        return smoke_run(folder)
    made = (
        tmp_path_factory.getbasetemp().parent / "smoke"
    )  # empty at first, then where it lies, or nothing if it failed
    with made.open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if found := lock.read():
            if not (kept := Path(found)).is_dir():
                pytest.fail("another worker's run of the smoke profile failed")
            shutil.copytree(kept, folder, symlinks=True)
        else:
            kept = folder.with_name("kept")
            lock.write(str(kept))
            lock.flush()
            shutil.copytree(smoke_run(folder), kept, symlinks=True)  # before tests write into it
    return folder


def smoke_run(folder: Path) -> Path:
    """Runs the whole smoke profile on one core; returns the folder."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--config", "profile=smoke", f"results={folder}"]
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
