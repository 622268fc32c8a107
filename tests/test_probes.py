"""Interventions on routing: they change what they say and nothing else."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from romer.encoding import Layout
from romer.errors import InputError
from romer.methods import Fitted
from romer.noise import NoiseModel
from romer.placement import Placement, coverage
from romer.probes import PARTS, all_but, perturbed_selection, recorded_routing, replayed_routing
from romer.programming import program
from romer.routers import moe_layers
from romer.stages.frontier import Bench
from romer.stages.probe import Probe, measured

NOISE = NoiseModel(0.2)


def chosen(model, ids, batch=4):
    """Per MoE layer: weights and indices [T, k] of 256 tokens read in windows of 64."""
    with torch.no_grad(), recorded_routing(model) as decisions:
        for rows in ids.view(4, 64).split(batch):
            model(rows, use_cache=False)
    return [tuple(torch.cat(part) for part in zip(*calls, strict=True)) for calls in decisions]


def test_replaying_a_models_own_decisions_changes_nothing(model, ids, logits):
    with recorded_routing(model) as decisions:
        expected = logits(model)
    with replayed_routing(model, decisions):
        assert logits(model).equal(expected)
    assert not any(b.gate._forward_hooks for _, b in moe_layers(model))


def test_noisy_routers_no_longer_matter_under_replayed_routing(model, logits):
    """With clean decisions replayed, noise in the routers alone is without effect; with noisy ones it is not."""
    with recorded_routing(model) as clean:
        expected = logits(model)
    alone = Layout(digital=all_but(model, Placement(), "router"))
    with program(model, NOISE, layout=alone), recorded_routing(model) as noisy:
        moved = logits(model)
        assert not moved.equal(expected)
    with program(model, NOISE, layout=alone), replayed_routing(model, clean):
        assert logits(model).equal(expected)
    with replayed_routing(model, noisy):
        assert logits(model).equal(moved)


def test_replay_refuses_other_passes(olmoe, ids):
    with torch.no_grad(), recorded_routing(olmoe) as decisions:
        olmoe(ids[None, :64], use_cache=False)
    for rows in (ids[None, :32], ids[None, :64]):
        with pytest.raises(InputError, match="reads other tokens than were recorded"):
            with torch.no_grad(), replayed_routing(olmoe, decisions):
                olmoe(rows, use_cache=False)
                olmoe(rows, use_cache=False)


def test_a_share_of_zero_changes_nothing(model, ids, logits):
    expected = logits(model)
    with perturbed_selection(model, 0.0):
        assert logits(model).equal(expected)
    assert not any(b.gate._forward_hooks for _, b in moe_layers(model))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_share_of_experts_drawn_anew(model, ids, share):
    """In the first MoE layer, whose input is not yet disturbed: distinct experts, the weights stay in their places, and
    a dropped place keeps its expert only by chance, 1/(E - kept) for each of them."""
    (weights, before), *_ = chosen(model, ids)
    with perturbed_selection(model, share):
        (kept_weights, after), *_ = chosen(model, ids)
    experts = moe_layers(model)[0][1].gate.weight.shape[0]
    assert kept_weights.equal(weights) and after.max() < experts
    assert (after.sort(1).values.diff(dim=1) != 0).all()
    places = before.numel()
    moved = (after != before).sum().item() / places
    sure = 4 * (0.25 / places) ** 0.5
    assert share * (1 - 1 / (experts - before.shape[1] + 1)) - sure <= moved <= share + sure


def test_a_random_selection_prefers_no_expert(olmoe, ids):
    with perturbed_selection(olmoe, 1.0):
        (_, after), *_ = chosen(olmoe, ids)
    counts = after.flatten().bincount(minlength=8).double()
    expected = after.numel() / 8
    assert (counts - expected).abs().max() < 4 * expected**0.5


def test_the_draw_belongs_to_token_and_realisation_not_to_the_batch(olmoe, ids):
    def drawn(batch, **key):
        with perturbed_selection(olmoe, 0.5, **key):
            return chosen(olmoe, ids, batch)[0][1]

    assert drawn(4).equal(drawn(1))
    assert not drawn(4).equal(drawn(4, realisation=1)) and not drawn(4).equal(drawn(4, seed=1))


def test_noise_in_one_part_leaves_the_others_clean(model, bits):
    before, parts = bits(model), {r.kind for r in coverage(model, Placement()) if r.analog} & set(PARTS)
    for part in parts:
        with program(model, NOISE, layout=Layout(digital=all_but(model, Placement(), part))):
            changed = {name for name, value in bits(model).items() if value != before[name]}
        kinds = {r.parameter: r.kind for r in coverage(model, Placement())}
        assert changed and {kinds[name].removesuffix(" gate") for name in changed} == {part}
    with pytest.raises(InputError, match="found 'lm_head', expected one of"):
        all_but(model, Placement(), "lm_head")


def test_a_share_that_is_none_is_refused(olmoe):
    with pytest.raises(InputError, match="share: found 1.5"):
        with perturbed_selection(olmoe, 1.5):
            pass


def job_at(point, get=lambda key: None):
    """What `measured` needs of a job."""
    chip, celsius = SimpleNamespace(name="table1"), SimpleNamespace(celsius=80)
    cfg = SimpleNamespace(model=SimpleNamespace(name="olmoe"), chip=chip, temperature=celsius)
    cfg.profile = SimpleNamespace(window=64)
    points, say = SimpleNamespace(get=get), lambda message: None
    return SimpleNamespace(cfg=cfg, points=points, point=point, say=say, placement=Placement())


def test_a_finished_point_is_taken_without_what_it_was_measured_in(model, tmp_path):
    """A killed job goes on where all replayed points are finished and the clean model's routing is not recorded."""

    def gone():
        raise AssertionError("entered again")

    probe = Probe("ppl:routing", "clean", {"routing": "clean"}, -1, None, around=gone)
    finished = {"value": 12.5, "run_id": "0"}
    job = job_at(lambda key, name, compute: finished, lambda key: finished)
    found = measured(job, model, [probe], [probe.key], 64, gone)
    assert found["value"].tolist() == [12.5]


def test_experts_are_copied_as_it_was_fitted_at_each_place(olmoe, monkeypatch):
    """Two places at which other experts are the busiest: each has its own copies, or those of its ranks."""
    applied = []
    monkeypatch.setattr("romer.stages.probe.apply", lambda model, *how: applied.append(how) or nullcontext())
    blocks = [block for _, block in moe_layers(olmoe)]

    def bench(hot, *place):
        activation = torch.arange(float(blocks[0].gate.weight.shape[0])).repeat(len(blocks), 1)
        activation[:, hot] = 100.0
        return Bench(olmoe, Fitted(activation, 1, 0.0, noise=NOISE), *place)

    home, there = bench(1), bench(2, "pcm", 25)
    probes = [at.probe("ppl:chips", "romer_replacement", 0) for at in (home, there)]
    probes.append(there.probe("ppl:chips", "romer_replacement", 0, about={"fitted_on": "table1/80"}, home=home))
    job = job_at(lambda key, name, compute: compute() | {"run_id": "0"})
    measured(job, olmoe, probes, [p.key for p in probes], 64, lambda: 12.5)
    assert [{hot for layer in plan.hot for hot in layer} for plan, _ in applied] == [{1}, {2}, {1}]
