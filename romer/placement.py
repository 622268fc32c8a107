"""Which parameters of a model are analog and which are digital; none is left unaccounted for.

rows = coverage(model, Placement("linear+kv", router=False))     # every parameter, analog or digital
"""

from dataclasses import dataclass

from torch import nn

from romer.errors import InputError
from romer.routers import is_router

PLACEMENTS = ("experts", "linear", "linear+kv")


@dataclass(frozen=True)
class Placement:
    """Which weights are analog. rule: `experts` (routed and shared experts), `linear` (every linear weight but
    embeddings and lm_head) or `linear+kv` (these, and the cached keys and values); router: whether the routers are
    analog too."""

    rule: str = "linear"
    router: bool = True

    def __post_init__(self):
        if self.rule not in PLACEMENTS:
            raise InputError(f"placement.rule: found {self.rule!r}, expected one of {', '.join(PLACEMENTS)}")
        if not isinstance(self.router, bool):
            raise InputError(f"placement.router: found {self.router!r}, expected true or false")

    @property
    def kv(self) -> bool:
        """Whether cached keys and values are written to analog arrays."""
        return self.rule == "linear+kv"


@dataclass(frozen=True)
class Coverage:
    """One parameter of a model: its name, shape, what it is, and whether it sits on analog arrays."""

    parameter: str
    shape: tuple[int, ...]
    count: int
    kind: str
    analog: bool


def _kinds(model: nn.Module) -> dict[str, str]:
    """What every parameter is, by name."""
    output = model.get_output_embeddings()
    found = {}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if isinstance(module, nn.Embedding):
                kind = "embedding"
            elif module is output:
                kind = "lm_head"
            elif name in ("gate_up_proj", "down_proj"):
                kind = "routed expert"
            elif is_router(module):
                kind = "router"
            elif isinstance(module, nn.Linear) and name == "weight":
                parts = path.split(".")
                if any(p in ("shared_expert", "shared_experts") for p in parts):
                    kind = "shared expert"
                elif "shared_expert_gate" in parts:
                    kind = "shared expert gate"
                else:
                    kind = "attention" if "self_attn" in parts else "dense mlp"
            elif isinstance(module, nn.Linear):
                kind = "bias"
            elif "norm" in type(module).__name__.lower():
                kind = "norm"
            else:
                raise InputError(
                    f"placement: parameter {full} {tuple(module.get_parameter(name).shape)} of {type(module).__name__}"
                    " is neither known as analog nor as digital"
                )
            found[full] = kind
    return found


_LINEAR_KINDS = {"attention", "dense mlp", "shared expert", "shared expert gate", "routed expert"}
_EXPERT_KINDS = {"shared expert", "routed expert"}


def coverage(model: nn.Module, placement: Placement) -> list[Coverage]:
    """Every parameter of the model, analog or digital. Raises InputError when one is unaccounted for or none is
    analog."""
    analog = set(_EXPERT_KINDS if placement.rule == "experts" else _LINEAR_KINDS) | (
        {"router"} if placement.router else set()
    )
    kinds = _kinds(model)
    rows = []
    for name, p in model.named_parameters():  # a tied parameter once, under the name of its first use
        rows.append(Coverage(name, tuple(p.shape), p.numel(), kinds[name], kinds[name] in analog))
    if not any(r.analog and r.kind != "router" for r in rows):
        raise InputError(f"placement.rule: {placement.rule!r} matches no weight of {type(model).__name__}")
    return rows


def analog_shapes(model: nn.Module, placement: Placement) -> dict[str, tuple[int, ...]]:
    """Shapes of the analog parameters, [out, in] or [E, out, in], by name."""
    return {row.parameter: row.shape for row in coverage(model, placement) if row.analog}
