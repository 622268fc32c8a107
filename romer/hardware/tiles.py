"""Weight matrices on tiles: how many a model stores, and how many a token activates.

    stored, active = tile_counts(SHAPES["olmoe"], 512, 512)         # 26060, 4556

Every matrix starts on tiles of its own: ceil(inputs / rows) * ceil(outputs / columns), gate and up projections of an
expert counted apart. Embeddings are looked up, not multiplied, and the one-column gate of shared experts is a dot
product: both stay digital.
"""

import math
from dataclasses import dataclass

from romer.hardware.shapes import ModelShape

# What can sit on tiles, in the words of `romer.placement`.
KINDS = ("attention", "router", "routed expert", "shared expert", "dense mlp", "lm_head")


@dataclass(frozen=True)
class Matrices:
    """Matrices that one token uses in one step, one after another in the order of `steps`: those of a step take the
    same input and run side by side.

    steps: per step the (outputs, inputs) of its matrices.
    """

    kind: str
    steps: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def flat(self) -> tuple[tuple[int, int], ...]:
        """All matrices."""
        return tuple(matrix for step in self.steps for matrix in step)

    @property
    def weights(self) -> int:
        """Weights of all matrices."""
        return sum(outputs * inputs for outputs, inputs in self.flat)

    def tiles(self, rows: int, columns: int) -> int:
        """Tiles of `rows` inputs and `columns` outputs that hold all matrices."""
        return sum(math.ceil(inputs / rows) * math.ceil(outputs / columns) for outputs, inputs in self.flat)


def _mlp(kind: str, hidden: int, width: int) -> Matrices:
    return Matrices(kind, (((width, hidden), (width, hidden)), ((hidden, width),)))  # gate and up, then down


def matrices(shape: ModelShape) -> dict[str, Matrices]:
    """The matrices of one attention block, router, routed expert, all shared experts, dense MLP, and lm_head; those
    that the model has."""
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found = {
        "attention": Matrices("attention", (((q, h), (kv, h), (kv, h)), ((h, q),))),
        "router": Matrices("router", (((shape.experts, h),),)),
        "routed expert": _mlp("routed expert", h, shape.expert_width),
        "lm_head": Matrices("lm_head", (((shape.vocab, h),),)),
    }
    if shape.shared_width:
        found["shared expert"] = _mlp("shared expert", h, shape.shared_width)
    if shape.dense:
        found["dense mlp"] = _mlp("dense mlp", h, shape.dense_width)
    return found


def occurrences(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(stored, used by one token) of each of `matrices` in the whole model."""
    moe, every = shape.moe_layers, shape.layers
    counts = {
        "attention": (every, every),
        "router": (moe, moe),
        "routed expert": (moe * shape.experts, moe * shape.top_k),
        "shared expert": (moe, moe),
        "dense mlp": (len(shape.dense), len(shape.dense)),
        "lm_head": (1, 1),
    }
    return {kind: counts[kind] for kind in matrices(shape)}


def tile_counts(shape: ModelShape, rows: int, columns: int, kinds=KINDS) -> tuple[int, int]:
    """(stored, active per token) tiles of `rows` inputs and `columns` outputs, for the matrices of `kinds`."""
    per, count = matrices(shape), occurrences(shape)
    chosen = [kind for kind in per if kind in kinds]
    sizes = {kind: per[kind].tiles(rows, columns) for kind in chosen}
    return tuple(sum(sizes[kind] * count[kind][i] for kind in chosen) for i in (0, 1))
