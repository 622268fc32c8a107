"""DeepSeek-MoE (Dai et al. 2024, arXiv:2401.06066) as a native transformers model: no remote code.

    import romer.models.deepseek                                     # registers model_type "deepseek"
    model = AutoModelForCausalLM.from_pretrained("deepseek-ai/deepseek-moe-16b-base", dtype="bfloat16")

Llama attention and norms, the softmax router and fused 3-D experts of Qwen2-MoE, and shared experts beside them
(eq. 9-11 of that paper). Checkpoints are the hub's, one tensor an expert and projection, read and written. Weights of
the chosen experts come from a float32 softmax; the auxiliary balance loss of its training (`aux_loss_alpha`,
`seq_aux`) is kept in the config and not computed: who trains has `router_logits`.

Four additions to the config, off by default, let the same class hold other structures: no shared experts
(`n_shared_experts` 0 or None), a sigmoid gate on them as in Qwen1.5-MoE (`gated_shared_experts`), a width of theirs
that is no multiple of the routed experts' (`shared_expert_intermediate_size`), and dense layers among the others
(`mlp_only_layers`).
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV2Model
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeExperts,
    Qwen2MoeMLP,
    Qwen2MoePreTrainedModel,
    Qwen2MoeTopKRouter,
)
from transformers.utils.output_capturing import OutputRecorder

from romer.errors import InputError


@strict
class DeepseekConfig(LlamaConfig):
    """The fields of the hub's config.json; defaults are those of DeepSeek-MoE 16B (base).

    n_routed_experts: E; num_experts_per_tok: k; moe_intermediate_size: neurons of a routed expert.
    n_shared_experts: always-on experts, stored as one MLP of n_shared_experts * moe_intermediate_size neurons, or of
    shared_expert_intermediate_size where that is given; 0 or None: none.
    gated_shared_experts: their output is multiplied by sigmoid(shared_expert_gate(x)), one number a token.
    first_k_dense_replace: the first layers that are dense, of intermediate_size neurons.
    mlp_only_layers: further layers that are dense, as Qwen2-MoE's config names them; None: none.
    norm_topk_prob: the k chosen weights are divided by their sum (where k > 1, as in the original).

    Raises InputError for what this port cannot run: see `_check`.
    """

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}  # the name that transformers' own router and experts read

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    moe_intermediate_size: int = 1408
    n_shared_experts: int | None = 2
    n_routed_experts: int = 64
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    output_router_logits: bool = False
    gated_shared_experts: bool = False
    shared_expert_intermediate_size: int | None = None
    mlp_only_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)  # names the hub's remote code, which a checkpoint saved from here does not have
        super().__post_init__(**kwargs)
        self._check()

    def _check(self):
        def demand(holds: bool, field: str, expected: str):
            if not holds:
                raise InputError(f"DeepseekConfig.{field}: found {getattr(self, field)!r}, expected {expected}")

        experts, heads = self.n_routed_experts, self.num_attention_heads
        demand(self.scoring_func == "softmax", "scoring_func", "'softmax'")
        demand(self.moe_layer_freq == 1, "moe_layer_freq", "1 (every layer after the first dense ones is an MoE)")
        demand(experts >= 1, "n_routed_experts", "at least 1")
        demand(1 <= self.num_experts_per_tok <= experts, "num_experts_per_tok", f"1 to n_routed_experts = {experts}")
        demand(self.first_k_dense_replace >= 0, "first_k_dense_replace", "0 or more")
        listed = self.mlp_only_layers or []
        demand(all(0 <= i < self.num_hidden_layers for i in listed), "mlp_only_layers", "indices of layers")
        demand((self.n_shared_experts or 0) >= 0, "n_shared_experts", "0 or more, or None")
        demand(self.hidden_size % heads == 0, "hidden_size", f"a multiple of num_attention_heads = {heads}")
        if self.n_shared_experts:
            width = self.shared_expert_intermediate_size
            demand(width is None or width >= 1, "shared_expert_intermediate_size", "at least 1, or None")
        else:
            demand(not self.gated_shared_experts, "gated_shared_experts", "False where n_shared_experts is 0 or None")
            field = "shared_expert_intermediate_size"
            demand(self.shared_expert_intermediate_size is None, field, "None where n_shared_experts is 0 or None")

    @property
    def shared_width(self) -> int:
        """Neurons of all shared experts together; 0 where there are none."""
        if not self.n_shared_experts:
            return 0
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.moe_intermediate_size


class DeepseekMoE(nn.Module):
    """Routed experts, and shared ones where the config has them: `gate`, `experts`, `shared_experts`.

    gate(x) -> (logits [N, E], weights [N, k], indices [N, k]) of the N tokens.
    """

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.config = config
        self.gate = Qwen2MoeTopKRouter(config)
        self.gate.norm_topk_prob = config.norm_topk_prob and config.num_experts_per_tok > 1  # a sole weight stays raw
        self.experts = Qwen2MoeExperts(config)
        if config.shared_width:
            self.shared_experts = Qwen2MoeMLP(config, intermediate_size=config.shared_width)
        if config.gated_shared_experts:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D], without the residual."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, D]
        _, weights, chosen = self.gate(tokens)  # eq. 10-11 of arXiv:2401.06066
        output = self.experts(tokens, chosen, weights)  # [N, D]
        if self.config.shared_width:
            shared = self.shared_experts(tokens)
            if self.config.gated_shared_experts:
                shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
            output = output + shared  # eq. 9
        return output.view_as(hidden_states)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """Llama's layer; its MLP is an MoE where the config does not make it dense."""

    def __init__(self, config: DeepseekConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace or layer_idx in (config.mlp_only_layers or [])
        self.mlp = Qwen2MoeMLP(config) if dense else DeepseekMoE(config)


class DeepseekPreTrainedModel(Qwen2MoePreTrainedModel):
    """Initialisation of router and experts is inherited with their classes."""

    config: DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(Qwen2MoeTopKRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the text of this file, but the decorator sits on Qwen2MoeExperts
        return True


class DeepseekModel(DeepseekPreTrainedModel, DeepseekV2Model):
    """The decoder without the head; its forward is DeepSeek-V2's: Llama's, with an output for MoE models."""

    def __init__(self, config: DeepseekConfig):
        super(DeepseekV2Model, self).__init__(config)  # past the one that would build V2's latent attention
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, DeepseekV2ForCausalLM):
    """The language model; its forward is DeepSeek-V2's: Llama's, with `router_logits` in the output."""

    def __init__(self, config: DeepseekConfig):
        super(DeepseekV2ForCausalLM, self).__init__(config)  # past the one that would build a V2 model
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("deepseek", DeepseekConfig)
AutoModel.register(DeepseekConfig, DeepseekModel)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
# experts.M.{gate,up,down}_proj.weight <-> experts.{gate_up_proj [E, 2F, D], down_proj [E, D, F]}, as for Qwen2-MoE
register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("qwen2_moe"))
