"""Runs a model's analog products as arrays do: in tiles, through converters, with the KV cache on arrays of its own.

    ranges = calibrate_ranges(model, ids, Adc(bits=8), Placement("linear+kv"))
    noise = NoiseModel(0.05, adc=Converter(Adc(bits=8), ranges))
    with program(model, noise, 0, Placement("linear+kv")):      # attaches what is here, and takes it off again
        model.generate(...)

Linear layers and routers are converted where they stand, fused experts through transformers' experts interface,
attention through its attention interface (`analog`), so prefill and generation with a cache see the same arrays: a
token's key and value are written once, with errors that belong to the cells of their position in the cache.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import repeat_kv

from romer.adc import Adc, Converter, Range, RangeFinder, mix, wide
from romer.encoding import Layout
from romer.errors import InputError
from romer.noise import Conductance, Draws, NoiseModel, key_of, slot_name
from romer.placement import Placement, coverage
from romer.routers import is_router, select


class KeptDraws(Draws):
    """Draws of one array of a KV cache, made once and kept: a longer cache only adds rows."""

    def __init__(self, seed: int, realisation: int, tensor: str):
        super().__init__(seed, realisation, tensor)
        object.__setattr__(self, "kept", {})

    def shared(self, kind: str, like: torch.Tensor | tuple[int, ...]) -> torch.Tensor:
        """As `Draws.shared`."""
        rows, *rest = tuple(like.shape) if isinstance(like, torch.Tensor) else like
        kept = self.kept.get((kind, *rest))
        if kept is None or len(kept) < rows:
            device = like.device if isinstance(like, torch.Tensor) else "cpu"
            kept = super().shared(kind, (max(rows, 2 * len(kept) if kept is not None else 0), *rest)).to(device)
            self.kept[kind, *rest] = kept
        return kept[:rows]


class Arrays:
    """The arrays of one model while it runs: converter (None for ideal ones), noise and realisation of the KV cache.

    rows [B, S] int64 numbers the tokens that the model reads at present, by position and token.
    """

    def __init__(
        self,
        converter: Converter | RangeFinder | None,
        noise: NoiseModel,
        realisation: int,
        layout: Layout | None = None,
    ):
        self.converter, self.noise, self.realisation, self.layout = converter, noise, realisation, layout or Layout()
        self.rows: torch.Tensor | None = None
        self.keys: dict[str, int] = {}
        self.draws: dict[str, KeptDraws] = {}

    def key(self, name: str) -> int:
        """What distinguishes the conversions of the product `name` in this realisation."""
        if name not in self.keys:
            self.keys[name] = key_of(self.noise.seed, self.realisation, name, 0, "adc")
        return self.keys[name]

    def read(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the decoder: numbers its tokens, continuing after the cache."""
        mask = kwargs.get("attention_mask")
        if torch.is_tensor(mask) and mask.dim() == 2 and not mask[:, 0].all():
            raise InputError(
                "arrays: a batch that is padded on the left has its tokens in other cells; pad on the right"
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        batch, length = (ids if ids is not None else embeds).shape[:2]
        cache = kwargs.get("past_key_values")
        start = 0 if cache is None else cache.get_seq_length()
        device = (ids if ids is not None else embeds).device
        self.rows = mix(torch.arange(start, start + length, device=device)).expand(batch, length)
        if ids is not None:
            self.rows = self.rows + ids

    def product(self, name: str, x: torch.Tensor, w: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x wᵀ through converters, where it is not digital: x [T, in], w [out, in] -> [T, out]. rows [T]: all tokens
        being read, by default."""
        if self.layout.is_digital(name if "[" in name else f"{name}.weight"):
            return x @ w.T
        rows = self.rows.flatten() if rows is None else rows
        return self.converter.product(name, x, w, self.key(name), rows)


@dataclass(frozen=True)
class Site:
    """A place in a model where arrays compute: the arrays and the module's path."""

    arrays: Arrays
    path: str

    def router(self, gate: nn.Module, args: tuple, output: tuple) -> tuple:
        """Forward hook of a top-k router: (logits [T, E], weights [T, k], indices [T, k]) of the converted product."""
        x = args[0].reshape(-1, gate.weight.shape[1])
        logits = self.arrays.product(self.path, x, gate.weight).to(output[0].dtype)
        weights, indices = select(logits, gate.top_k, gate.norm_topk_prob)
        return logits, weights.to(output[1].dtype), indices

    def experts(self, experts: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Σ_i w_i f_i(x), both projections of a slot converted: x [T, H], index and weights [T, K] -> [T, H]."""
        output, rows = torch.zeros_like(x), self.arrays.rows.flatten()
        used = torch.where(weights != 0, index, -1)
        for slot in used.unique().tolist():
            if slot < 0:
                continue
            token, place = torch.where(used == slot)
            name = slot_name(f"{self.path}.gate_up_proj", slot)
            a = experts._apply_gate(self.arrays.product(name, x[token], experts.gate_up_proj[slot], rows[token]))
            name = slot_name(f"{self.path}.down_proj", slot)
            y = self.arrays.product(name, a, experts.down_proj[slot], rows[token])
            output.index_add_(0, token, y.to(x.dtype) * weights[token, place, None].to(x.dtype))
        return output

    def write(self, kind: str, states: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, heads, S, D] as their arrays hold them.

        An error belongs to a cell, and the cells of a token follow from its position alone: what was written stays the
        same when later tokens come.
        """
        arrays, name = self.arrays, f"{self.path}.{kind}"
        if isinstance(arrays.converter, RangeFinder):
            return arrays.converter.note(name, "input", states)
        full_range = arrays.converter.range_of(name).inputs if arrays.converter is not None else None
        draws = arrays.draws.setdefault(name, KeptDraws(arrays.noise.seed, arrays.realisation, name))
        # Output columns: tokens of each head for q·Kᵀ, [B, S * heads, D]; dimensions for a·V, [B, S, heads * D].
        by_token, outputs = states.transpose(1, 2), 0 if kind == "key" else 1
        flat = by_token.flatten(1, 2) if kind == "key" else by_token.flatten(2)
        stored = torch.stack([arrays.noise.store(rows, draws, outputs, full_range) for rows in flat])
        return stored.view_as(by_token).transpose(1, 2)

    def convert(self, kind: str, partial: torch.Tensor, tile: int, attended: torch.Tensor | None) -> torch.Tensor:
        """Partial sums [B, heads, S, columns] of an attention product, as converted; 0 where not `attended` (bool, it
        broadcasts): what a token does not see is not converted for it."""
        arrays, name = self.arrays, f"{self.path}.{kind}"
        if arrays.converter is None:
            return partial
        if isinstance(arrays.converter, RangeFinder):
            arrays.converter.note(name, tile, partial if attended is None else partial[attended.expand(partial.shape)])
            return partial
        heads = torch.arange(partial.shape[1], device=partial.device)[:, None]
        rows = mix(arrays.rows)[:, None] + heads  # [B, heads, S]
        found = arrays.converter.range_of(name)
        out = arrays.converter.convert(partial.flatten(0, 2), found, tile, arrays.key(name), rows.flatten())
        out = out.unflatten(0, partial.shape[:3])
        return out if attended is None else torch.where(attended, out, 0.0)

    def inputs(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        """The inputs of an attention product behind the DAC, any shape."""
        converter, name = self.arrays.converter, f"{self.path}.{kind}"
        if isinstance(converter, RangeFinder):
            return converter.note(name, "input", x)
        return x if converter is None else converter.inputs(x, converter.range_of(name))

    @property
    def tile_rows(self) -> int | None:
        """Inputs of an array; None for one array of any length."""
        return None if self.arrays.converter is None else self.arrays.converter.adc.tile_rows


class AnalogLinear(nn.Linear):
    """A linear layer whose product its `site` computes; the bias is added digitally. Never constructed: `attach` makes
    an existing nn.Linear one for a while."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        y = self.site.arrays.product(self.site.path, x.flatten(0, -2), self.weight).to(x.dtype)
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def analog_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with K and V on arrays: query [B, heads, S, D], key and value [B, KV heads, past + S, D], additive mask
    -> ([B, S, heads, D], weights [B, heads, S, past + S]). Both products are converted before anything digital."""
    site: Site = module.site
    groups = query.shape[1] // key.shape[1]
    keys, values = (repeat_kv(site.write(kind, x), groups) for kind, x in (("key", key), ("value", value)))
    rows = site.tile_rows or max(query.shape[-1], keys.shape[2])
    mask = None if attention_mask is None else attention_mask[..., : keys.shape[2]]
    attended = None if mask is None else mask == 0
    query, scores = site.inputs("scores", query), 0.0
    for tile, (q, k) in enumerate(zip(query.split(rows, -1), keys.split(rows, -1), strict=True)):
        scores = scores + site.convert("scores", wide(q) @ wide(k).transpose(2, 3), tile, attended)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    sent, output = site.inputs("mixture", weights), 0.0
    for tile, (a, v) in enumerate(zip(sent.split(rows, -1), values.split(rows, 2), strict=True)):
        read = None if attended is None else attended[..., tile * rows : (tile + 1) * rows].any(-1, keepdim=True)
        output = output + site.convert("mixture", wide(a) @ wide(v), tile, read)
    return output.to(query.dtype).transpose(1, 2).contiguous(), weights


AttentionInterface.register("analog", analog_attention_forward)
AttentionMaskInterface.register("analog", eager_mask)


@contextmanager
def attach(
    model: nn.Module,
    noise: NoiseModel,
    realisation: int,
    placement: Placement,
    finder: RangeFinder | None = None,
    layout: Layout | None = None,
) -> Iterator[None]:
    """Lets the model's analog products run on arrays with the ADC and, where the placement has it, the KV cache of
    `noise`; undone on exit. `finder` takes the converter's place to find ranges.

    Raises InputError for a module that is not known, and for conductance errors of a KV cache without ranges.
    """
    converter = finder or noise.adc
    if placement.kv and converter is None and any(isinstance(e, Conductance) for e in noise.errors):
        raise InputError("placement linear+kv: conductance errors need the range of keys and values; set an ADC")
    arrays = Arrays(converter, noise, realisation, layout)
    modules = dict(model.named_modules())
    if any(hasattr(module, "site") for module in modules.values()):
        raise InputError("arrays: the model runs on arrays already; leave the first context before entering a second")
    with ExitStack() as stack:
        stack.callback(model.get_decoder().register_forward_pre_hook(arrays.read, with_kwargs=True).remove)

        def place(module: nn.Module, path: str) -> Site:
            module.site = Site(arrays, path)
            stack.callback(delattr, module, "site")
            return module.site

        analog = {row.parameter.rpartition(".")[0]: None for row in coverage(model, placement) if row.analog}
        for path in analog if converter is not None else ():
            module = modules[path]
            if is_router(module):
                stack.callback(module.register_forward_hook(place(module, path).router, prepend=True).remove)
            elif type(module) is nn.Linear:
                place(module, path)
                module.__class__ = AnalogLinear
                stack.callback(setattr, module, "__class__", nn.Linear)
            elif hasattr(module, "_apply_gate") and model.config._experts_implementation == "analog":
                place(module, path)
            else:
                raise InputError(
                    f"adc: {path} is a {type(module).__name__}; expected nn.Linear, a top-k router, or fused experts"
                    " with experts_implementation='analog'"
                )
        if placement.kv:
            attention = {p: m for p, m in modules.items() if hasattr(m, "k_proj") and hasattr(m, "v_proj")}
            if not attention:
                raise InputError(f"placement.rule: 'linear+kv' matches no attention of {type(model).__name__}")
            for path, module in attention.items():
                place(module, path)
            stack.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation("analog")
        yield


@torch.no_grad()
def calibrate_ranges(
    model: nn.Module, ids: torch.Tensor, adc: Adc, placement: Placement, window: int = 512, batch: int = 2
) -> dict[str, Range]:
    """The range of every converter of the clean model, on calibration tokens ids [T], read in windows.

    Raises InputError where there is not one whole window.
    """
    if len(ids) < window:
        raise InputError(f"adc: found {len(ids)} calibration tokens, expected at least one window of {window}")
    finder = RangeFinder(adc)
    with attach(model, NoiseModel(), 0, placement, finder):
        for rows in ids[: len(ids) // window * window].view(-1, window).split(batch):
            model(rows.to(model.device), use_cache=False, logits_to_keep=1)
    return finder.ranges()
