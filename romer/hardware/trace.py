"""Routing traces: which expert slots every token used in every MoE layer, replicas included.

    with apply(model, plan=plan), record(model, window=512) as recorder:
        perplexity(model, ids, window=512)
    trace = recorder.trace                       # [tokens, layers, choices], one byte a choice
    trace.save("romer.safetensors"); Trace.load("romer.safetensors")

`simulate` draws a trace from the experts' load alone, for shapes whose checkpoint has not been run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from romer.errors import InputError
from romer.replacement import ReplacementPlan
from romer.routers import moe_layers
from romer.routing import split_over_copies
from romer.store import write_atomic


@dataclass(frozen=True)
class Trace:
    """slots [T, L, K]: physical expert slots that a token's K choices went to, in no order; `experts` marks a choice
    that was not needed (a token without a replicated expert uses fewer). uint8 up to 255 experts, else int16. window:
    tokens of a context, so token t attends to t mod window + 1 positions.

    Raises InputError where a slot is out of range or a choice names one twice.
    """

    slots: np.ndarray
    experts: int
    window: int

    def __post_init__(self):
        slots = self.slots
        if slots.ndim != 3 or slots.dtype != dtype(self.experts) or 0 in slots.shape:
            found = f"{slots.dtype} {list(slots.shape)}"
            raise InputError(f"trace: found {found}, expected {dtype(self.experts)} [tokens, layers, choices]")
        if type(self.window) is not int or self.window < 1:
            raise InputError(f"trace: window: found {self.window!r}, expected a positive integer")
        if slots.min() < 0 or slots.max() > self.experts:
            worst = slots.max() if slots.max() > self.experts else slots.min()
            raise InputError(f"trace: found slot {worst}, expected 0 to {self.experts}")
        for layer in range(
            slots.shape[1]
        ):  # a layer at a time: a sorted copy of all would take the trace's memory twice
            ordered = np.sort(slots[:, layer], axis=1)
            if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < self.experts)).any():
                raise InputError(f"trace, layer {layer}: a token uses a slot twice, expected distinct slots")

    @property
    def tokens(self) -> int:
        """T."""
        return self.slots.shape[0]

    @property
    def layers(self) -> int:
        """L: MoE layers."""
        return self.slots.shape[1]

    @property
    def loads(self) -> np.ndarray:
        """int64 [L, E]: tokens that used each slot."""
        bins = self.experts + 1
        return np.stack([np.bincount(self.slots[:, i].ravel(), minlength=bins)[:-1] for i in range(self.layers)])

    def save(self, path: str | Path, about: dict[str, str] | None = None) -> None:
        """Writes the trace, and the texts of `about`, as safetensors, atomically."""
        facts = {"experts": str(self.experts), "window": str(self.window)} | (about or {})
        write_atomic(path, save({"slots": np.ascontiguousarray(self.slots)}, metadata=facts))

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """The trace that `save` wrote. Raises InputError when there is none, or not a whole one."""
        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                return cls(file.get_tensor("slots"), int(about["experts"]), int(about["window"]))
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path}: not a readable routing trace ({error})") from None


def dtype(experts: int) -> np.dtype:
    """The smallest type that holds 0 to `experts`."""
    return np.dtype(np.uint8 if experts <= 255 else np.int16)


class Recorder:
    """What `record` yields: `trace`, once forward passes have run."""

    def __init__(self, experts: int, layers: int, window: int):
        self.experts, self.window = experts, window
        self.parts: list[list[np.ndarray]] = [[] for _ in range(layers)]

    @property
    def trace(self) -> Trace:
        """The tokens so far, in the order in which they were computed. Raises InputError before the first."""
        if not all(self.parts):
            raise InputError("trace: nothing was recorded, expected a forward pass inside `record`")
        layers = [np.concatenate(parts) for parts in self.parts]
        width = max(layer.shape[1] for layer in layers)
        padded = [
            np.pad(layer, ((0, 0), (0, width - layer.shape[1])), constant_values=self.experts) for layer in layers
        ]
        return Trace(np.stack(padded, axis=1), self.experts, self.window)


def used_slots(indices: torch.Tensor, top_k: int, experts: int) -> np.ndarray:
    """A router's indices [T, K] as slots [T, K]: of the entries beyond top_k, which eq. 9 adds for replicas, those
    that repeat a chosen slot are not used."""
    chosen, extra = indices[:, :top_k], indices[:, top_k:]
    repeated = (extra[:, :, None] == chosen[:, None]).any(-1)
    slots = torch.cat([chosen, extra.masked_fill(repeated, experts)], 1)
    return slots.cpu().numpy().astype(dtype(experts))


@contextmanager
def record(model: nn.Module, window: int) -> Iterator[Recorder]:
    """Records what the model's routers decide in the forward passes inside, as rewritten by an enclosing
    `romer.apply`.

    window: tokens of a context; the rows of a batch must be whole windows. Raises InputError when layers differ in
    their number of experts.
    """
    blocks = moe_layers(model)
    sizes = {block.gate.weight.shape[0] for _, block in blocks}
    if len(sizes) != 1:
        raise InputError(f"trace: layers have {sorted(sizes)} experts, expected the same number in all")
    recorder = Recorder(sizes.pop(), len(blocks), window)

    def hook(layer: int):
        def note(gate: nn.Module, args: tuple, output: tuple) -> None:
            recorder.parts[layer].append(used_slots(output[2], gate.top_k, recorder.experts))

        return note

    handles = [block.gate.register_forward_hook(hook(layer)) for layer, (_, block) in enumerate(blocks)]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def stretch(load: np.ndarray, layers: int, experts: int) -> np.ndarray:
    """A measured load [l, e] for a shape of other size: float64 [layers, experts], rows sum to 1.

    Experts are ordered by falling load and interpolated over their rank, so expert 0 is the hottest of its layer;
    layers are taken at the same relative depth.
    """
    ranked = -np.sort(-np.asarray(load, dtype=np.float64), axis=1)
    rows = ranked[np.linspace(0, len(ranked) - 1, layers).round().astype(int)]
    at = np.linspace(0, ranked.shape[1] - 1, experts)
    wide = np.stack([np.interp(at, np.arange(ranked.shape[1]), row) for row in rows])
    return wide / wide.sum(1, keepdims=True)


def inclusion(load: np.ndarray, top_k: int) -> np.ndarray:
    """The probabilities with which a token chooses each expert: float64 [L, E], in proportion to `load` [L, E] and at
    most 1, rows sum to top_k. Raises InputError where fewer experts than top_k have a load."""
    load = np.asarray(load, dtype=np.float64)
    if ((load > 0).sum(1) < top_k).any():
        raise InputError(f"trace: load: a layer has fewer than top_k = {top_k} experts with a load above 0")
    found = np.empty_like(load)
    for row, p in zip(load, found, strict=True):
        sure = np.zeros(len(row), bool)  # an expert cannot be chosen more than once a token: the others get the rest
        while True:
            p[:] = np.where(sure, 1.0, row * (top_k - sure.sum()) / max(row[~sure].sum(), np.finfo(float).tiny))
            if not (over := (p > 1) & ~sure).any():
                break
            sure |= over
    return found


def simulate(
    load: np.ndarray, top_k: int, tokens: int, window: int, plan: ReplacementPlan | None = None, seed: int = 0
) -> Trace:
    """A trace in which every token draws top_k distinct experts, each in proportion to `load` [L, E].

    Drawn by Pareto sampling, whose frequencies are those asked for to a few per cent (Bondesson, Traat & Lundqvist
    2006, DOI 10.1111/j.1467-9469.2006.00497.x); draws one after another would flatten the load.
    The same seed draws the same preferences with and without a plan (form `split`), so both can be compared token by
    token: tokens keep the experts that are not cold. Tokens are independent, which real ones are not. Raises
    InputError for a plan of another form, and as `inclusion` does.
    """
    if plan is not None and plan.form != "split":
        raise InputError(f"trace: replacement form: found {plan.form!r}, expected split: logits are not simulated")
    n = plan.n_replace if plan is not None else 0
    experts, generator, layers = load.shape[1], torch.Generator().manual_seed(seed), []
    odds = torch.from_numpy(inclusion(load, top_k)).logit(eps=1e-9)
    for layer, row in enumerate(odds):
        uniform = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
        preference = row - uniform.logit(eps=1e-12)
        if n:
            hot, cold = torch.tensor(plan.hot[layer]), torch.tensor(plan.cold[layer])
            preference = preference.index_fill(1, cold, -torch.inf)
        indices = preference.topk(top_k, dim=1).indices
        if n:
            indices = split_over_copies(torch.ones_like(preference[:, :top_k]), indices, hot, cold, experts)[1]
        layers.append(used_slots(indices, top_k, experts))
    return Trace(np.stack(layers, axis=1), experts, window)
