"""Projection: strong input directions are exact whatever the arrays do, and they are the ones worth most."""

import math

import pytest
import torch

from romer import methods
from romer.corrections import Affine, Chain, share
from romer.cost import cost
from romer.encoding import Layout
from romer.errors import InputError
from romer.methods import Fitted
from romer.moments import Moments, collect, readers
from romer.noise import ColumnGain, Drift, NoiseModel
from romer.placement import Placement, coverage
from romer.programming import program
from romer.projection import Directions, Projected, directions, kept, prices, without
from romer.sensitivity import collect as weigh

NOISE = NoiseModel(0.15)


@pytest.fixture
def fitted(model, ids):
    moments = collect(model, ids, 64)
    return Fitted(torch.ones(1, 1), 1, 0.2, None, moments, weigh(model, ids, moments, Placement(), 64), NOISE)


@pytest.fixture
def found(model, fitted):
    return directions(model, NOISE, 7, Placement(), fitted.moments, fitted.sensitivity)


def shapes(model):
    return {row.parameter: row.shape for row in coverage(model, Placement()) if row.analog}


def error(name, model, layout, noise=NOISE, realisation=0):
    clean = model.get_parameter(name).clone()
    with program(model, noise, realisation, layout=layout):
        return (model.get_parameter(name) - clean).double()


@pytest.mark.parametrize("noise", [NOISE, NoiseModel(0.1, errors=(ColumnGain(0.1), Drift(0.05, 0.02, 86400.0)))])
def test_no_error_of_any_kind_acts_on_what_is_projected(model, found, noise):
    """Also those that no read-back knows of."""
    at = next(iter(found.values())).first(3)
    layout = Layout(correction=Projected((at,)))
    for name in at.tensors:
        wrong = error(name, model, layout, noise)
        plain = error(name, model, Layout(), noise)
        assert (wrong @ at.onto.double()).abs().max() < 1e-5 * (plain @ at.onto.double()).abs().max() + 1e-6
        torch.testing.assert_close(wrong, plain - plain @ at.onto.double() @ at.reads.double(), rtol=0, atol=1e-6)


def test_what_is_left_is_the_least_that_the_metric_allows(model, fitted, found):
    """tr(M Q R Qᵀ) is the tail of the eigenvalues of M^½ R M^½ (Eckart and Young), and gains are its head."""
    leader, at = next((k, v) for k, v in found.items() if k.endswith("q_proj.weight"))
    costs = 0.0
    for name in at.tensors:
        square = (NOISE.realise(name, model.get_parameter(name), 7) - model.get_parameter(name)).double().square()
        costs = costs + (square * fitted.sensitivity[name].double()[:, None]).sum(0)
    second = fitted.moments[leader].second.double()
    values = torch.linalg.eigvalsh(costs.sqrt()[:, None] * second * costs.sqrt()).flip(0)
    for rank in (1, 4):
        q = torch.eye(len(costs)).double() - at.onto[:, :rank].double() @ at.reads[:rank].double()
        left = (costs * (q @ second @ q.T).diagonal()).sum().item()
        assert left == pytest.approx(values[rank:].sum().item(), rel=0.02)
        assert at.gains[:rank].sum().item() == pytest.approx(values[:rank].sum().item(), rel=0.02)
    torch.testing.assert_close(at.reads @ at.onto, torch.eye(len(at.gains)), rtol=0, atol=1e-3)


def test_arrays_that_read_one_input_share_its_directions(model, fitted, found):
    groups = readers(fitted.moments, shapes(model))
    assert sorted(found) == sorted(group[0] for group in groups)
    attention = next(g for g in groups if g[0].endswith("q_proj.weight"))
    assert [n.split(".")[-2] for n in attention] == ["q_proj", "k_proj", "v_proj"]
    assert not any("down_proj" in n and "experts" in n for n in sum(groups, ()) if "shared" not in n)


def test_the_budget_is_kept_and_counted(model, found):
    for budget in (0.0, 0.02, 0.2):
        correction = Projected(kept(found, shapes(model), budget))
        assert share(correction, model, Placement()) <= budget
        assert bool(correction.ranks) == (budget > 0)
    numbers = {name: correction.numbers(name, *shape[-2:]) for name, shape in shapes(model).items()}
    slots = {name: shape[0] if len(shape) == 3 else 1 for name, shape in shapes(model).items()}
    price = prices(found, shapes(model))
    assert sum(own * slots[n] + once for n, (own, once) in numbers.items()) == sum(
        rank * price[name] for name, rank in correction.ranks
    )


def test_moments_behind_the_directions_are_those_of_what_arrays_read(found, fitted):
    at = next(iter(found.values())).first(2)
    left = without(fitted.moments, [at])
    q = torch.eye(len(at.onto)) - at.onto @ at.reads
    seen = fitted.moments[at.tensors[0]]
    torch.testing.assert_close(left[at.tensors[0]].second, q @ seen.second @ q.T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(left[at.tensors[0]].mean, q @ seen.mean, rtol=1e-3, atol=1e-4)
    assert len({id(left[name].second) for name in at.tensors}) == 1
    assert any(left[name] is seen for name, seen in fitted.moments.items())


def test_it_is_less_error_at_the_same_cells_and_no_read_back(model, fitted):
    method = methods.get("projection")

    def energy(layout):
        total = 0.0
        for name in shapes(model):
            if name in fitted.moments:
                wrong = error(name, model, layout)
                seen = fitted.moments[name].second.double()
                weight = fitted.sensitivity[name].double().sqrt()[..., None]
                total += ((wrong * weight) @ seen * (wrong * weight)).sum().item()
        return total

    options = [method.options(fitted, {"budget": b}) for b in (0.0, 0.1, 0.3)]
    left = [energy(method.layout(model, fitted, o)) for o in options]
    assert left[2] < left[1] < left[0] and math.isclose(left[0], energy(Layout()), rel_tol=1e-6)
    found = cost(method, model, Placement(), fitted, options[2])
    assert (found.cells, found.products, found.readbacks) == (1.0, 1.0, 0)
    assert 0 < found.side <= 0.3


def test_plus_takes_the_directions_off_before_it_compensates(model, fitted):
    method = methods.get("romer_plus")
    o = method.options(fitted, {"budget": 0.3, "projected": 0.5, "block": 8})
    chain = method.layout(model, fitted, o).correction
    assert isinstance(chain, Chain) and isinstance(chain.links[-1], Projected)
    at = chain.links[-1].taken[0]
    wrong = error(at.tensors[0], model, method.layout(model, fitted, o))
    assert (wrong @ at.onto.double()).abs().max() < 1e-4
    alone = method.layout(model, fitted, o | {"projected": 1.0})
    assert isinstance(alone.correction, Projected)
    with pytest.raises(InputError, match="budget: found 1.5, expected 0 ≤ share"):
        methods.get("projection").layout(model, fitted, {"budget": 1.5, "ranks": "loss"})
    with pytest.raises(InputError, match="romer_plus: projected: found 1.5, expected 0 ≤ share"):
        method.layout(model, fitted, o | {"projected": 1.5})


def test_a_scale_of_outputs_leaves_exact_products_alone():
    """Cells that kept 0.8 of what was written: the step before the projection undoes that, and on the arrays alone."""
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(2000, 16, generator=g) @ torch.randn(16, 16, generator=g), torch.randn(6, 16, generator=g)
    seen = {"w": Moments(x.T @ x / 2000, x.mean(0), 2000)}
    values, u = torch.linalg.eigh(seen["w"].second)
    at = Directions(values[-2:].flip(0), u[:, -2:].flip(1).T, u[:, -2:].flip(1), ("w",))
    left = without(seen, [at])
    chain = Chain((Affine(left, "channel"), Projected((at,))))
    acts, offset = chain("w", w, 0.8 * w, 0.8 * w, chain.shared("w", w, 0.8 * w))
    trust = 2000 / 2064
    torch.testing.assert_close(acts @ at.onto, w @ at.onto, rtol=0, atol=1e-4)
    rest = torch.eye(16) - at.onto @ at.reads
    torch.testing.assert_close(acts @ rest, (1 + trust * 0.25) * 0.8 * w @ rest, rtol=1e-3, atol=1e-3)
    assert offset.abs().max() < 0.01


def test_what_is_not_known_is_said(model, fitted):
    blind = Fitted(torch.ones(1, 1), 1, 0.2, None, fitted.moments, fitted.sensitivity)
    with pytest.raises(InputError, match="projection: nothing is known of the noise"):
        methods.get("projection").layout(model, blind, {"budget": 0.1, "ranks": "loss"})
    assert Projected() == Projected() and Projected().numbers("w", 3, 4) == (0, 0)
    gains = torch.tensor([1.0])
    taken = (Directions(gains, torch.ones(1, 4), torch.ones(4, 1) / 4, ("w",)),)
    assert Projected(taken) != Projected()
    moments = {"w": Moments(torch.eye(4), torch.ones(4), 5)}
    assert without(moments, ())["w"] is moments["w"]
