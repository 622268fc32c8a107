"""Programming a model is complete, accounted for, and undone bitwise."""

import math

import pytest
import torch
from torch import nn

from romer.errors import InputError
from romer.noise import NoiseModel
from romer.placement import Placement, coverage
from romer.programming import program, rewrite_slots
from romer.routers import moe_layers

NOISE = NoiseModel(0.1)
KINDS = {
    "olmoe": {"embedding", "lm_head", "routed expert", "router", "attention", "norm"},
    "qwen3_moe": {"embedding", "lm_head", "routed expert", "router", "attention", "norm"},
    "qwen2_moe": {"embedding", "lm_head", "routed expert", "router", "attention", "norm", "bias"}
    | {"shared expert", "shared expert gate"},
    "deepseek": {"embedding", "lm_head", "routed expert", "router", "attention", "norm", "dense mlp", "shared expert"},
}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def names(model, **placement) -> set[str]:
    """The analog parameters."""
    return {row.parameter for row in coverage(model, Placement(**placement)) if row.analog}


@pytest.mark.parametrize("rule", ["linear", "experts"])
@pytest.mark.parametrize("router", [True, False])
def test_coverage_accounts_for_every_parameter(model, rule, router):
    rows = coverage(model, Placement(rule, router))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {row.parameter: row.shape for row in rows} == shapes and len(rows) == len(shapes)
    assert sum(row.count for row in rows) == model.num_parameters()
    assert all(row.count == math.prod(row.shape) for row in rows)
    assert {row.kind for row in rows} == KINDS[model.config.model_type]


def test_what_linear_holds(model):
    analog = names(model)
    for name, p in model.named_parameters():
        digital = p.dim() == 1 or name in ("model.embed_tokens.weight", "lm_head.weight")
        assert (name in analog) == (not digital), name
    assert {name for name in analog if model.get_parameter(name).dim() == 3} == {
        f"{path}.experts.{tensor}" for path, _ in moe_layers(model) for tensor in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("rule", ["linear", "experts"])
def test_the_router_has_a_switch_of_its_own(model, rule):
    routers = {f"{path}.gate.weight" for path, _ in moe_layers(model)}
    assert names(model, rule=rule, router=True) - names(model, rule=rule, router=False) == routers


def test_what_experts_holds(model):
    for name in names(model, rule="experts", router=False):
        assert ".experts." in name or ".shared_expert." in name or ".shared_experts." in name
    kinds = {row.parameter: row.kind for row in coverage(model, Placement())}
    expected = {name for name, kind in kinds.items() if kind in ("routed expert", "shared expert")}
    assert names(model, rule="experts", router=False) == expected


@pytest.mark.parametrize("rule", ["linear", "experts"])
def test_programming_changes_the_analog_parameters_and_no_other(model, bits, rule):
    before = bits(model)
    with program(model, NOISE, 0, Placement(rule, router=False)):
        assert changed(before, bits(model)) == names(model, rule=rule, router=False)
    assert bits(model) == before


def test_every_parameter_holds_eq_2(model):
    clean = {name: p.clone() for name, p in model.named_parameters()}
    with program(model, NOISE, 3):
        for name in names(model):
            assert torch.equal(model.get_parameter(name), NOISE.realise(name, clean[name], 3)), name


def test_sigma_zero_computes_the_same_bits(model, logits):
    clean = logits(model)
    with program(model, NoiseModel(0.0)):
        assert torch.equal(logits(model), clean)


def test_noise_reaches_the_output_and_leaves_it(model, logits):
    clean = logits(model)
    with program(model, NOISE, 0):
        first = logits(model)
    with program(model, NOISE, 1):
        second = logits(model)
    assert not torch.allclose(first, clean, atol=0.1) and not torch.allclose(second, first, atol=0.1)
    assert torch.equal(logits(model), clean)
    with program(model, NOISE, 0):
        assert torch.equal(logits(model), first)


def test_an_exception_inside_restores_too(model, bits):
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        with program(model, NOISE):
            raise KeyboardInterrupt
    assert bits(model) == before
    with program(model, NOISE):
        pass


def test_an_exception_while_programming_restores_too(olmoe, bits):
    class Failing(NoiseModel):
        def realise(self, name, *args, **kwargs):
            if name.endswith("layers.1.self_attn.q_proj.weight"):
                raise MemoryError
            return super().realise(name, *args, **kwargs)

    before = bits(olmoe)
    with pytest.raises(MemoryError):
        with program(olmoe, Failing(0.1)):
            pass
    assert bits(olmoe) == before


def test_tied_embeddings_stay_digital_and_tied(tied, bits):
    rows = {row.parameter: row for row in coverage(tied, Placement())}
    assert "lm_head.weight" not in rows and not rows["model.embed_tokens.weight"].analog
    assert sum(row.count for row in rows.values()) == tied.num_parameters()
    before = bits(tied)
    with program(tied, NOISE):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        assert changed(before, bits(tied)) == names(tied)
    assert bits(tied) == before and tied.lm_head.weight is tied.model.embed_tokens.weight


def test_a_model_is_programmed_once_at_a_time(olmoe, qwen3, bits):
    before = bits(olmoe)
    with program(olmoe, NOISE):
        noisy = bits(olmoe)
        with pytest.raises(InputError, match="programmed already"):
            with program(olmoe, NOISE, 1):
                pass
        assert bits(olmoe) == noisy
        with program(qwen3, NOISE):  # another model is another chip
            pass
    assert bits(olmoe) == before


def test_gradients_still_flow_where_they_were_wanted(olmoe):
    olmoe.requires_grad_(True)
    with program(olmoe, NOISE):
        assert torch.is_grad_enabled()
        olmoe(torch.tensor([[2, 3, 4]])).logits.sum().backward()
    assert olmoe.model.layers[0].mlp.experts.down_proj.grad.abs().sum() > 0


def test_an_unknown_parameter_is_refused_by_name(olmoe, bits):
    olmoe.model.layers[1].mlp.register_parameter("temperature", nn.Parameter(torch.ones(3)))
    before = bits(olmoe)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.temperature \(3,\)"):
        with program(olmoe, NOISE):
            pass
    assert bits(olmoe) == before


def test_a_placement_that_matches_nothing_is_refused():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 3)

        def get_output_embeddings(self):
            return None

    with pytest.raises(InputError, match="'linear' matches no weight of Table"):
        coverage(Table(), Placement())
    with pytest.raises(InputError, match="placement.rule: found 'attention', expected one of experts, linear"):
        Placement("attention")


def test_slots_of_a_clean_model_get_bitwise_copies_for_a_while(olmoe, bits):
    path, before = moe_layers(olmoe)[1][0] + ".experts", bits(olmoe)
    p = olmoe.get_parameter(f"{path}.down_proj")
    with rewrite_slots(olmoe, {path: {5: 2, 2: 5}}):  # a swap: sources are read before anything is written
        clean = torch.frombuffer(bytearray(before[f"{path}.down_proj"]), dtype=p.dtype).view(p.shape)
        assert torch.equal(p[5], clean[2]) and torch.equal(p[2], clean[5])
        assert changed(before, bits(olmoe)) == {f"{path}.gate_up_proj", f"{path}.down_proj"}
    assert bits(olmoe) == before
    with pytest.raises(IndexError):
        with rewrite_slots(olmoe, {path: {1: 0, 99: 0}}):  # fails after the first slot is written
            pass
    assert bits(olmoe) == before
