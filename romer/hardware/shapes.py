"""The shapes that decide what a mixture-of-experts model costs: widths, heads, experts, layers.

    SHAPES["olmoe"]                     # the true shape of the paper's checkpoint
    shape_of(model.config)              # of any loaded model: stand-ins, tiny models, checkpoints

The true shapes are the public config.json of the checkpoints that conf/model names (section `paper`), at the revisions
given there.
"""

from dataclasses import dataclass

from romer.errors import InputError


@dataclass(frozen=True)
class ModelShape:
    """A causal MoE language model with gated (SwiGLU) feed-forward layers.

    hidden, head_dim, expert_width, shared_width, dense_width, vocab: numbers of neurons; heads, kv_heads: attention
    heads of queries, and of keys and values; experts, top_k: E and k; shared_width: all shared experts together, 0
    without; shared_gate: whether a sigmoid gate weighs them; dense: indices of the layers without experts.
    Raises InputError for a field that is out of range.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    vocab: int
    shared_width: int = 0
    shared_gate: bool = False
    dense: tuple[int, ...] = ()
    dense_width: int = 0

    def __post_init__(self):
        whole = ("hidden", "layers", "heads", "kv_heads", "head_dim", "experts", "top_k", "expert_width", "vocab")
        for field in whole:
            if type(value := getattr(self, field)) is not int or value < 1:
                raise InputError(f"shape {self.name}: {field}: found {value!r}, expected a positive integer")
        if self.top_k > self.experts:
            raise InputError(f"shape {self.name}: top_k: found {self.top_k}, expected at most experts = {self.experts}")
        if len(self.dense) >= self.layers or not all(0 <= i < self.layers for i in self.dense):
            raise InputError(f"shape {self.name}: dense: found {self.dense}, expected some of the {self.layers} layers")
        if self.dense and self.dense_width < 1:
            raise InputError(f"shape {self.name}: dense_width: found {self.dense_width}, expected a positive integer")

    @property
    def moe_layers(self) -> int:
        """Layers with experts: those of a routing trace."""
        return self.layers - len(self.dense)


SHAPES = {
    # allenai/OLMoE-1B-7B-0924 (arXiv:2409.02060)
    "olmoe": ModelShape("olmoe", 2048, 16, 16, 16, 128, 64, 8, 1024, 50304),
    # Qwen/Qwen3-30B-A3B (arXiv:2505.09388)
    "qwen3": ModelShape("qwen3", 2048, 48, 32, 4, 128, 128, 8, 768, 151936),
    # Qwen/Qwen1.5-MoE-A2.7B: four shared experts' worth of neurons behind one gate
    "qwen15": ModelShape("qwen15", 2048, 24, 16, 16, 128, 60, 4, 1408, 151936, shared_width=5632, shared_gate=True),
    # deepseek-ai/deepseek-moe-16b-base (arXiv:2401.06066): two shared experts, first layer dense
    "deepseek": ModelShape(
        "deepseek", 2048, 28, 16, 16, 128, 64, 6, 1408, 102400, shared_width=2816, dense=(0,), dense_width=10944
    ),
}


def shape_of(config) -> ModelShape:
    """The shape that a transformers configuration describes, named by its model type: olmoe, qwen2_moe, qwen3_moe, or
    this package's deepseek. Raises InputError for another type."""
    c = config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    common = {
        "name": c.model_type,
        "hidden": c.hidden_size,
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads or c.num_attention_heads,
        "head_dim": head_dim,
        "top_k": c.num_experts_per_tok,
        "vocab": c.vocab_size,
    }
    if c.model_type == "olmoe":
        return ModelShape(**common, experts=c.num_experts, expert_width=c.intermediate_size)
    if c.model_type in ("qwen2_moe", "qwen3_moe"):
        listed, step = set(c.mlp_only_layers or ()), c.decoder_sparse_step
        dense = tuple(i for i in range(c.num_hidden_layers) if i in listed or (i + 1) % step)
        shared = c.shared_expert_intermediate_size if c.model_type == "qwen2_moe" else 0
        return ModelShape(
            **common,
            experts=c.num_experts,
            expert_width=c.moe_intermediate_size,
            shared_width=shared,
            shared_gate=bool(shared),
            dense=dense,
            dense_width=c.intermediate_size if dense else 0,
        )
    if c.model_type == "deepseek":
        dense = tuple(sorted({*range(min(c.first_k_dense_replace, c.num_hidden_layers)), *(c.mlp_only_layers or ())}))
        return ModelShape(
            **common,
            experts=c.n_routed_experts,
            expert_width=c.moe_intermediate_size,
            shared_width=c.shared_width,
            shared_gate=c.gated_shared_experts,
            dense=dense,
            dense_width=c.intermediate_size if dense else 0,
        )
    raise InputError(f"model type: found {c.model_type!r}, expected olmoe, qwen2_moe, qwen3_moe or deepseek")
