"""Activation profiling, eq. 6, against a loop over tokens; and the bounds of its summaries."""

import math
import os
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from romer.errors import InputError
from romer.noise import NoiseModel
from romer.profiling import Profile, profile
from romer.programming import program
from romer.replacement import ReplacementPlan
from romer.routers import moe_layers
from romer.routing import RouterCalibration, apply
from romer.store import verify
from tests.test_cli import romer


def router_inputs(model, ids, window: int) -> list[torch.Tensor]:
    """What every router reads: [T, H] of each MoE layer."""
    seen = [[] for _ in moe_layers(model)]
    handles = [
        block.gate.register_forward_pre_hook(lambda gate, args, into=into: into.append(args[0].reshape(-1, 32)))
        for (_, block), into in zip(moe_layers(model), seen, strict=True)
    ]
    with torch.no_grad():
        for row in ids[: len(ids) // window * window].view(-1, window):
            model(row[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(x) for x in seen]


def test_magnitude_and_counts_are_eq_6_token_by_token(model, ids):
    found = profile(model, ids[:128], window=32)
    for layer, x in enumerate(router_inputs(model, ids[:128], 32)):
        gate = moe_layers(model)[layer][1].gate
        magnitude, counts, variance = [0.0] * gate.num_experts, [0] * gate.num_experts, 0.0
        for token, row in enumerate((x.double() @ gate.weight.double().T).tolist()):
            total = sum(math.exp(z) for z in row)
            chosen = sorted(range(len(row)), key=lambda i: -row[i])[: gate.top_k]
            scale = sum(math.exp(row[i]) / total for i in chosen) if gate.norm_topk_prob else 1.0
            for i in chosen:
                magnitude[i] += math.exp(row[i]) / total / scale  # eq. 6
                counts[i] += 1
            mean = sum(row) / len(row)
            variance += sum((z - mean) ** 2 for z in row) / len(row) / len(x)
            assert found.chosen[layer, token].nonzero().flatten().tolist() == sorted(chosen)
        torch.testing.assert_close(found.magnitude[layer], torch.tensor(magnitude).double(), rtol=1e-4, atol=1e-5)
        assert found.counts[layer].tolist() == counts
        torch.testing.assert_close(found.logit_variance[layer].item(), variance, rtol=1e-4, atol=0)


def test_shapes_totals_and_bounds(model, ids):
    found = profile(model, ids[:250], window=100)  # 50 tokens are no whole window
    blocks = moe_layers(model)
    experts, k = blocks[0][1].gate.num_experts, blocks[0][1].gate.top_k
    assert found.magnitude.shape == found.counts.shape == (len(blocks), experts)
    assert found.chosen.shape == (len(blocks), 200, experts)
    assert (found.counts.sum(1) == 200 * k).all()
    assert ((found.magnitude >= 0) & (found.magnitude <= found.counts + 1e-4)).all()
    assert (found.magnitude.sum(1) <= 200 + 1e-3).all()
    assert (found.load_max_over_mean >= 1).all() and (found.load_max_over_mean <= experts / k).all()
    assert ((found.load_entropy >= 0) & (found.load_entropy <= 1)).all()


def test_renormalised_weights_of_a_token_sum_to_one(qwen3, ids):
    total = profile(qwen3, ids, 64).magnitude.sum(1)
    torch.testing.assert_close(total, torch.full_like(total, 256), rtol=1e-5, atol=0)


def test_profiling_does_not_depend_on_the_batch_and_leaves_nothing(model, ids, logits, bits):
    clean, before = logits(model), bits(model)
    one, four = profile(model, ids, 32, batch=1), profile(model, ids, 32, batch=4)
    torch.testing.assert_close(one.magnitude, four.magnitude, rtol=1e-4, atol=1e-5)
    assert torch.equal(one.chosen, four.chosen)
    assert bits(model) == before and torch.equal(logits(model), clean)
    assert not any(block.gate._forward_hooks for _, block in moe_layers(model))


def of_counts(counts) -> Profile:
    counts = torch.tensor(counts)
    return Profile(
        counts.double(), counts, torch.ones(len(counts)), torch.zeros(len(counts), 1, counts.shape[1]).bool()
    )


def test_load_of_balanced_and_collapsed_experts():
    found = of_counts([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]])
    torch.testing.assert_close(found.load_max_over_mean, torch.tensor([1.0, 4.0, 2.0]).double())
    torch.testing.assert_close(found.load_entropy, torch.tensor([1.0, 0.0, 0.5]).double())


def test_overlap_counts_the_experts_that_both_chose(model, ids):
    clean = profile(model, ids, 64)
    assert torch.equal(clean.overlap(clean), torch.ones(len(clean.counts)).double())
    with program(model, NoiseModel(0.3)):
        noisy = profile(model, ids, 64)
    overlap = noisy.overlap(clean)
    torch.testing.assert_close(overlap, clean.overlap(noisy))  # k of k experts either way
    assert ((overlap > 0) & (overlap < 1)).all()
    for layer in range(len(overlap)):
        sets = [[set(t.nonzero().flatten().tolist()) for t in p.chosen[layer]] for p in (clean, noisy)]
        shares = [len(a & b) / len(a) for a, b in zip(*sets, strict=True)]
        assert overlap[layer].item() == pytest.approx(sum(shares) / len(shares))


def test_it_sees_the_routing_as_it_is_rewritten(olmoe, ids):
    clean, strength = profile(olmoe, ids, 64), 0.3
    with apply(olmoe, calibration=RouterCalibration("shrink", strength)):
        shrunk = profile(olmoe, ids, 64)
    ratio = shrunk.logit_variance[0] / clean.logit_variance[0]  # of the first layer, whose input is unchanged
    assert ratio.item() == pytest.approx((1 - 2 * strength) ** 2, rel=1e-5)
    assert torch.equal(shrunk.chosen[0], clean.chosen[0])


def test_a_copied_expert_counts_on_both_its_slots(olmoe, ids):
    plan = ReplacementPlan.fit(profile(olmoe, ids, 64).magnitude, 2)
    with apply(olmoe, plan):
        found = profile(olmoe, ids, 64)
    for layer, (hot, cold) in enumerate(zip(plan.hot, plan.cold, strict=True)):
        assert torch.equal(found.counts[layer, list(hot)], found.counts[layer, list(cold)])
        torch.testing.assert_close(found.magnitude[layer, list(hot)], found.magnitude[layer, list(cold)])
    assert (found.counts.sum(1) > 2 * 256).all() and found.logit_variance.isfinite().all()


def test_a_text_without_a_whole_window_is_refused(olmoe, ids):
    with pytest.raises(InputError, match="window: found 300 for a text of 256 tokens"):
        profile(olmoe, ids, window=300)
    assert not any(block.gate._forward_hooks for _, block in moe_layers(olmoe))


def test_a_killed_profile_repeats_no_finished_realisation(smoke_results, tmp_path):
    """What it needs is copied: other tests read the run's own profile."""
    for name in ("text", "standin/olmoe", "calibrate/table1/olmoe/80"):
        shutil.copytree(smoke_results / "smoke" / name, tmp_path / "smoke" / name, symlinks=True)
    choices = ["profile=smoke", f"results={tmp_path}", "tracking=disabled", "model=olmoe", "temperature=80"]
    choices += ["profile.profiling.realisations=60"]
    points = tmp_path / "smoke/points/profile/table1-olmoe-80"
    command = [sys.executable, "-m", "romer.cli", "profile", *choices]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(points.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = len(list(points.glob("*.json")))
    assert 3 <= done < 60 and not (tmp_path / "smoke/profile").exists()
    again = romer("profile", *choices)
    assert again.returncode == 0, again.stderr
    assert (again.stdout + again.stderr).count(": top-k overlap") == 60 - done and not points.exists()
    folder = verify(tmp_path / "smoke/profile/table1/olmoe/80").path
    table = pd.read_csv(folder / "routing.csv")
    assert sorted(set(table["realisation"])) == list(range(60))
    usual = pd.read_csv(smoke_results / "smoke/profile/table1/olmoe/80/routing.csv")
    pd.testing.assert_frame_equal(table[table["realisation"] < 2], usual, check_exact=True)
