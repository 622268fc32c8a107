"""Puts noisy weights into a model and takes them out again, bitwise.

    with program(model, NoiseModel(0.1), realisation=0):    # one programming of the arrays
        ...

The expert slots of a programmed model can be rewritten while it is programmed (`rewrite_slots`): each physical slot
keeps its own device errors whatever expert is stored in it, so a copied expert sees independent noise.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from romer.arrays import attach
from romer.corrections import offset, reads_back
from romer.encoding import Layout, Remapped, realise
from romer.errors import InputError
from romer.noise import Draws, NoiseModel, slot_name
from romer.outliers import Clipped
from romer.placement import Placement, coverage
from romer.readback import as_read, estimate, read_sigma, reads_noisily, unit

FINISHED = "back when finished"  # a reading, and its instrument's error


class Programmed:
    """The arrays of a programmed model: what was written where. Made by `program`, used by `rewrite_slots`."""

    def __init__(self, noise: NoiseModel, realisation: int, clean: dict[str, torch.Tensor], layout: Layout):
        self.noise, self.realisation, self.clean, self.layout = noise, realisation, clean, layout
        self.reads = reads_back(layout.correction)
        self.seen = as_read(noise, not layout.refit, FINISHED, layout.read_seconds) if self.reads else noise
        self.offsets: dict[str, torch.Tensor] = {}  # [out], or [E, out] of fused experts, where a correction has them
        self.shared: dict[str, object] = {}  # what the corrections of a tensor's arrays have in common

    def stored(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the array `name`, a tensor or an expert slot, acts as with `weight` [out, in] written to it; what a
        correction is told that it acts as: what a read-back says)."""
        if self.layout.is_digital(name):
            return weight, weight
        acts, read = self._arrays(name, weight)
        return acts, self._told([name], weight, read)

    def stored_slots(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `stored`, of all slots of a fused tensor together, `weight` [E, out, in]."""
        slots = [slot_name(name, slot) for slot in range(len(weight))]
        if any(map(self.layout.is_digital, slots)):
            acts, told = zip(*(self.stored(slot, w) for slot, w in zip(slots, weight, strict=True)), strict=True)
            acts = torch.stack(acts)
            return acts, acts if self.layout.correction is None else torch.stack(told)
        acts, read = self._arrays(name, weight)
        told = self._told(slots, weight.flatten(0, 1), rows := read.flatten(0, 1))
        return acts, read if told is rows else told.view_as(weight)

    def _arrays(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a tensor or a slot acts as, and what cells say that are read with noise of their own."""
        encoding = self.layout.encoding
        acts = realise(encoding, self.noise, name, weight, self.realisation)
        if self.seen is self.noise:
            return acts, acts
        return acts, realise(encoding, self.seen, name, weight, self.realisation)

    def _told(self, names: list[str], weight: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """What a correction is told of arrays, one below the other [arrays · out, in], that were just written and are
        read as `read`."""
        layout, noise, arrays = self.layout, self.noise, len(names)
        if not self.reads or not (layout.read_error or reads_noisily(self.seen)):
            return read
        whole, encoding = weight.float(), layout.encoding
        values = encoding.held(names[0], whole) if isinstance(encoding, Clipped) else whole  # what cells hold
        if not (sigma := read_sigma(self.seen, values, layout.read_error, arrays=arrays)).any():
            return read
        if not hasattr(encoding, "known"):
            what = type(encoding).__name__
            raise InputError(f"program: reading errors of arrays laid out as {what} are not simulated")
        known, error = [], []
        for name, w, held in zip(names, whole.chunk(arrays), values.chunk(arrays), strict=True):
            draws = Draws(noise.seed, self.realisation, name)
            known.append(encoding.known(noise, w, draws))
            if layout.read_error:
                error.append(layout.read_error * held.abs().max() * draws.shared(FINISHED, w))
        read, rest = (read + torch.cat(error) if error else read).float(), whole - values
        return estimate(read - rest, torch.cat(known), sigma, unit(noise, values), arrays) + rest

    def correct(
        self, name: str, weight: torch.Tensor, stored: torch.Tensor, read: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(what the corrected array acts as, offset [out])."""
        if self.layout.correction is None or self.layout.is_digital(name):
            return stored, None
        common = self.shared.get(name.partition("[")[0])
        corrected, offset = self.layout.correction(name, weight, stored, read, common)
        return corrected.to(weight.dtype), None if offset is None else offset.to(weight.dtype)

    def write(self, name: str) -> torch.Tensor:
        """What a tensor acts as with its clean weight written to it, in memory of its own; offsets are noted."""
        weight, correction = self.clean[name], self.layout.correction
        if self.layout.is_digital(name):
            return weight.clone()
        if weight.dim() == 2:
            stored, read = self.stored(name, weight)
            if correction is not None:
                self.shared[name] = correction.shared(name, weight, read)
            acts, offset = self.correct(name, weight, stored, read)
            if offset is not None:
                self.offsets[name] = offset
            return acts
        acts, read = self.stored_slots(name, weight)
        if correction is not None:
            self.shared[name] = correction.shared(name, weight, read)
            for slot, w in enumerate(weight):
                stored = acts[slot]
                self._put(name, slot, w, stored, stored if read is acts else read[slot], acts)
        return acts

    def write_slot(self, name: str, slot: int, weight: torch.Tensor, into: torch.Tensor) -> None:
        """Writes an expert's weight to one slot of the fused tensor `name`."""
        self._put(name, slot, weight, *self.stored(slot_name(name, slot), weight), into)

    def _put(self, name, slot, weight, stored, read, into) -> None:
        acts, offset = self.correct(slot_name(name, slot), weight, stored, read)
        into[slot] = acts
        if offset is not None:
            self.offsets.setdefault(name, torch.zeros(into.shape[:2], dtype=into.dtype, device=into.device))
        if name in self.offsets:
            self.offsets[name][slot] = 0 if offset is None else offset


_PROGRAMMED: weakref.WeakKeyDictionary[nn.Module, Programmed] = weakref.WeakKeyDictionary()


def check_converted(noise: NoiseModel, layout: Layout) -> None:
    """Raises InputError where the noise model has an ADC and the layout several arrays a weight, or corrections: their
    converted partial sums are not simulated."""
    several = layout.encoding.products != 1 and not isinstance(layout.encoding, Remapped)
    if noise.adc is not None and (several or layout.correction is not None):
        raise InputError("program: slices, copies and corrections under an ADC are not simulated; use them without one")


@contextmanager
@torch.no_grad()
def program(
    model: nn.Module,
    noise: NoiseModel,
    realisation: int = 0,
    placement: Placement | None = None,
    layout: Layout | None = None,
) -> Iterator[Programmed]:
    """Replaces the analog weights of `model` by one noisy realisation and puts the clean ones back on exit, bitwise.

    The parameters stay the same objects, their memory does not: a view that was taken before still sees the clean
    weight. Where the noise model has an ADC, or the placement the KV cache, the model's analog products run through
    `romer.arrays` in between. Raises InputError when the model is programmed already, and under an ADC for a layout
    with several arrays a weight or with corrections, because their converted partial sums are not simulated.
    """
    if model in _PROGRAMMED:
        raise InputError("program: the model is programmed already; leave the first context before entering a second")
    placement, layout = placement or Placement(), layout or Layout()
    check_converted(noise, layout)
    analog = {row.parameter for row in coverage(model, placement) if row.analog}
    clean = {name: p.detach() for name, p in model.named_parameters() if name in analog}
    _PROGRAMMED[model] = array = Programmed(noise, realisation, clean, layout)
    try:
        for name in clean:
            model.get_parameter(name).data = array.write(name)
        with ExitStack() as stack:
            if array.offsets:
                stack.enter_context(offset(model, array.offsets))
            if noise.adc is not None or placement.kv:
                stack.enter_context(attach(model, noise, realisation, placement, layout=layout))
            yield array
    finally:
        del _PROGRAMMED[model]
        for name, value in clean.items():
            model.get_parameter(name).data = value


@contextmanager
@torch.no_grad()
def rewrite_slots(model: nn.Module, copies: Mapping[str, Mapping[int, int]]) -> Iterator[None]:
    """Overwrites expert slots with other experts' weights (eq. 7) and undoes it on exit.

    copies: name of an experts module -> {slot: expert whose weights it gets}. On a programmed model the clean weight
    of the expert is written with the errors of the slot's own cells; on a clean one it is copied.
    """
    array = _PROGRAMMED.get(model)
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for path, slots in copies.items():
            for tensor in ("gate_up_proj", "down_proj"):
                name = f"{path}.{tensor}"
                p = model.get_parameter(name)
                analog = array is not None and name in array.clean
                source = array.clean[name] if analog else p.detach().clone()
                for slot, expert in slots.items():
                    before.append((p[slot], p[slot].clone()))
                    if not analog:
                        p[slot] = source[expert]
                        continue
                    if name in array.offsets:
                        before.append((array.offsets[name][slot], array.offsets[name][slot].clone()))
                    array.write_slot(name, slot, source[expert], p)
        yield
    finally:
        for view, value in reversed(before):
            view.copy_(value)
