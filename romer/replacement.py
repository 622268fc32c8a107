"""Expert replacement, eq. 6-9: the n hottest experts of a layer are copied over its n coldest.

    plan = ReplacementPlan.fit(activation, n_replace=4)     # activation: A_{l,i} of eq. 6
    with apply(model, plan=plan): ...                        # see romer.routing

The text and eq. 8 disagree with eq. 9, so both readings are built:
- `split` (eq. 9 and the text): cold experts cannot be chosen, routing is otherwise unchanged, a chosen hot expert's
  output is
  p/2 · (copy 1 + copy 2) from two physical slots;
- `literal` (eq. 8 as printed): hot logits halved and cold logits set to 0 before softmax and top-k. A zero logit is
  not an
  excluded expert: where a cold slot is chosen, it computes what it holds, the copy.
"""

from dataclasses import dataclass

import torch

from romer.errors import InputError

FORMS = ("split", "literal")


@dataclass(frozen=True)
class ReplacementPlan:
    """hot, cold: per MoE layer the n expert indices, paired in order (hot[l][j] is copied over cold[l][j]); form:
    split | literal.

    Raises InputError when a layer's sets overlap, differ in length or repeat an expert.
    """

    hot: tuple[tuple[int, ...], ...]
    cold: tuple[tuple[int, ...], ...]
    form: str = "split"

    def __post_init__(self):
        if self.form not in FORMS:
            raise InputError(f"replacement form: found {self.form!r}, expected one of {', '.join(FORMS)}")
        if len(self.hot) != len(self.cold):
            raise InputError(f"replacement plan: {len(self.hot)} layers of hot experts, {len(self.cold)} of cold ones")
        for layer, (hot, cold) in enumerate(zip(self.hot, self.cold, strict=True)):
            if len(hot) != len(cold) or len({*hot, *cold}) != 2 * len(hot):
                raise InputError(
                    f"replacement plan, layer {layer}: hot {hot} and cold {cold} are not two disjoint sets of one size"
                )

    @property
    def n_replace(self) -> int:
        """Experts replaced per layer (0 when there is no layer)."""
        return max((len(hot) for hot in self.hot), default=0)

    @classmethod
    def fit(cls, activation: torch.Tensor, n_replace: int, form: str = "split") -> "ReplacementPlan":
        """The plan for activation magnitudes A [L, E] (eq. 6): hottest onto coldest, second hottest onto second
        coldest, ...

        Of equal activations the lower index counts as the hotter. Raises InputError unless 0 ≤ 2 n_replace ≤ E.
        """
        experts = activation.shape[1]
        if n_replace < 0 or 2 * n_replace > experts:
            raise InputError(f"n_replace: found {n_replace}, expected 0 ≤ n ≤ E/2 = {experts // 2}")
        order = activation.double().argsort(dim=1, descending=True, stable=True)
        hot, cold = order[:, :n_replace], order.flip(1)[:, :n_replace]
        return cls(tuple(map(tuple, hot.tolist())), tuple(map(tuple, cold.tolist())), form)

    @classmethod
    def trade(cls, noise: torch.Tensor, absence: torch.Tensor, most: int) -> "ReplacementPlan":
        """At most `most` copies a layer, where the expected loss says that they pay (`romer.sensitivity.experts`): best
        pairs first, as long as half of what the noise [L, E] of the one costs, which a second copy saves, is more than
        what the absence [L, E] of the other costs. Form `split`."""
        layers = []
        for costs, without in zip(noise.double(), absence.double(), strict=True):
            gain = costs[:, None] / 2 - without  # [hot, cold]
            gain.fill_diagonal_(-torch.inf)
            pairs: list[tuple[int, int]] = []
            while len(pairs) < most and gain.max() > 0:
                pair = divmod(gain.argmax().item(), len(gain))
                gain[list(pair)] = gain[:, list(pair)] = -torch.inf
                pairs.append(pair)
            layers.append(pairs)
        hot, cold = (tuple(tuple(pair[side] for pair in pairs) for pairs in layers) for side in (0, 1))
        return cls(hot, cold)

    def to_json(self) -> dict:
        """Plain values, read back by `from_json`."""
        return {"form": self.form, "hot": [list(h) for h in self.hot], "cold": [list(c) for c in self.cold]}

    @classmethod
    def from_json(cls, value: dict) -> "ReplacementPlan":
        """The plan that `to_json` wrote."""
        return cls(tuple(map(tuple, value["hot"])), tuple(map(tuple, value["cold"])), value["form"])
