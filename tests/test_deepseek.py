"""The DeepSeek-MoE port: the paper's equations, the hub's file layout, and transformers' own switches."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from romer.errors import InputError
from romer.models.deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekModel, DeepseekMoE

HUB_CONFIG = {  # deepseek-ai/deepseek-moe-16b-base, its keys and its old spellings, at a tiny size
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 12,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 50,
}
VARIANTS = {
    "hub": {},
    "no shared experts": {"n_shared_experts": 0},
    "shared experts None": {"n_shared_experts": None},
    "gated shared experts": {"gated_shared_experts": True},
    "shared width": {"n_shared_experts": 1, "shared_expert_intermediate_size": 20},
    "renormalised": {"norm_topk_prob": True},
    "renormalised top-1 is raw": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 8},
    "grouped queries, other base": {"num_key_value_heads": 2, "rope_theta": 100},
    "two dense layers": {"first_k_dense_replace": 2},
    "no dense layer, tied": {"first_k_dense_replace": 0, "tie_word_embeddings": True},
}


def tiny(**changes) -> DeepseekForCausalLM:
    """A random model whose outputs and routing are far from uniform."""
    torch.manual_seed(0)
    fields = {k: v for k, v in HUB_CONFIG.items() if k != "auto_map"}
    model = DeepseekForCausalLM(DeepseekConfig(**(fields | {"initializer_range": 0.3} | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # gains of one would hide a norm that is missing or misplaced
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 50, (2, 11), generator=torch.Generator().manual_seed(1))


def expected_names(config) -> set[str]:
    """The tensors of the hub's checkpoint."""
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    names |= set() if config.tie_word_embeddings else {"lm_head.weight"}
    for i in range(config.num_hidden_layers):
        modules = ["input_layernorm", "post_attention_layernorm"] + [f"self_attn.{p}_proj" for p in "qkvo"]
        mlps = ["mlp"]
        if i >= config.first_k_dense_replace:
            mlps = [f"mlp.experts.{e}" for e in range(config.n_routed_experts)]
            mlps += ["mlp.shared_experts"] if config.n_shared_experts else []
            modules += ["mlp.gate"] + (["mlp.shared_expert_gate"] if config.gated_shared_experts else [])
        modules += [f"{m}.{p}_proj" for m in mlps for p in ("gate", "up", "down")]
        names |= {f"model.layers.{i}.{m}.weight" for m in modules}
    return names


# The paper's equations, token by token and expert by expert, on the tensors of a checkpoint.


def ffn(w, prefix, x):
    gate, up, down = (w[f"{prefix}.{p}_proj.weight"] for p in ("gate", "up", "down"))
    return down @ (silu(gate @ x) * (up @ x))


def shared_part(w, prefix, x, c):
    """The sum over K_s experts of eq. 9, each a slice of the stored MLP; of one where the width is set by hand."""
    width = c.get("shared_expert_intermediate_size") or c["moe_intermediate_size"]
    gate, up, down = (w[f"{prefix}.shared_experts.{p}_proj.weight"] for p in ("gate", "up", "down"))
    total = torch.zeros_like(x)
    for start in range(0, len(gate), width):
        s = slice(start, start + width)
        total += down[:, s] @ (silu(gate[s] @ x) * (up[s] @ x))
    if c.get("gated_shared_experts"):
        total /= 1 + torch.exp(-w[f"{prefix}.shared_expert_gate.weight"] @ x)
    return total


def moe(w, prefix, x, c):
    """h' of eq. 9 without the residual, and the router's logits u·e_i."""
    logits = torch.stack([u @ x for u in w[f"{prefix}.gate.weight"]])
    scores = logits.exp() / logits.exp().sum()  # eq. 11
    chosen = sorted(range(len(scores)), key=lambda i: -scores[i])[: c["num_experts_per_tok"]]  # eq. 10
    total = sum(scores[i] for i in chosen) if c["norm_topk_prob"] and len(chosen) > 1 else 1.0
    out = shared_part(w, prefix, x, c) if c["n_shared_experts"] else torch.zeros_like(x)
    for i in chosen:
        out = out + scores[i] / total * ffn(w, f"{prefix}.experts.{i}", x)  # eq. 9
    return out, logits


def norm(x, gain):
    return gain * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(x, position, base):
    """RoPE on one head's vector: pairs (j, j + d/2), angle position * base^(-2j/d)."""
    half = len(x) // 2
    angle = position * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


def attention(w, prefix, h, c):
    heads, groups = c["num_attention_heads"], c["num_attention_heads"] // c["num_key_value_heads"]
    q, k, v = (torch.stack([w[f"{prefix}.{p}_proj.weight"] @ x for x in h]) for p in "qkv")
    d = c["hidden_size"] // heads
    rows = []
    for t in range(len(h)):
        outs = []
        for n in range(heads):
            m = n // groups
            query = rotate(q[t, n * d : n * d + d], t, c["rope_theta"])
            keys = torch.stack([rotate(k[s, m * d : m * d + d], s, c["rope_theta"]) for s in range(t + 1)])
            outs.append((keys @ query / d**0.5).softmax(0) @ v[: t + 1, m * d : m * d + d])
        rows.append(w[f"{prefix}.o_proj.weight"] @ torch.cat(outs))
    return torch.stack(rows)


def reference(w, ids, c):
    """Logits [T, V] of one sequence, and the router logits of each MoE layer [T, E]; float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    h, routers = w["model.embed_tokens.weight"][ids], []
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        h = h + attention(w, f"{p}.self_attn", norm(h, w[f"{p}.input_layernorm.weight"]), c)
        u = norm(h, w[f"{p}.post_attention_layernorm.weight"])
        if i < c["first_k_dense_replace"]:
            h = h + torch.stack([ffn(w, f"{p}.mlp", x) for x in u])
        else:
            outs, logits = zip(*(moe(w, f"{p}.mlp", x, c) for x in u), strict=True)
            h = h + torch.stack(outs)
            routers.append(torch.stack(logits))
    head = w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return norm(h, w["model.norm.weight"]) @ head.T, routers


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_papers_equations_on_the_saved_tensors(variant, ids, tmp_path):
    model = tiny(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        out = model(ids, output_router_logits=True)
    assert out.logits.std() > 0.1
    for b in range(len(ids)):
        logits, routers = reference(tensors, ids[b], HUB_CONFIG | VARIANTS[variant])
        torch.testing.assert_close(out.logits[b].double(), logits, atol=1e-4, rtol=1e-4)
        ours = [r.view(*ids.shape, -1)[b].double() for r in out.router_logits]
        torch.testing.assert_close(ours, routers, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bitwise_and_the_file_has_the_hubs_names(variant, ids, tmp_path):
    model = tiny(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == expected_names(model.config)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is DeepseekForCausalLM
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for parameter in again.parameters():  # mapped from the file they are unaligned, and kernels differ in the last bit
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    different = {"transformers_version", "_name_or_path", "architectures", "dtype"}
    kept = [{k: v for k, v in m.config.to_dict().items() if k not in different} for m in (model, again)]
    assert kept[0] == kept[1]


def test_the_hubs_own_files_load_without_remote_code(ids, tmp_path):
    tensors = {}
    for name in expected_names(DeepseekConfig(**HUB_CONFIG)):
        shape = next(s for suffix, s in HUB_SHAPES.items() if name.endswith(suffix))
        # of size one they would make the attention so sharp that float32 loses 1e-4 on some processors
        tensors[name] = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(tensors)))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is DeepseekForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is DeepseekModel
    assert "auto_map" not in model.config.to_dict()
    experts = model.model.layers[2].mlp.experts
    for e in range(8):
        gate, up, down = (tensors[f"model.layers.2.mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        assert torch.equal(experts.gate_up_proj[e], torch.cat((gate, up)))
        assert torch.equal(experts.down_proj[e], down)
    with torch.no_grad():
        logits, _ = reference(tensors, ids[0], HUB_CONFIG)
        error = (model(ids[:1]).logits[0] - logits).norm() / logits.norm()
    assert error < 1e-5


HUB_SHAPES = {  # the more particular suffix first
    "shared_experts.gate_proj.weight": (24, 32),
    "shared_experts.up_proj.weight": (24, 32),
    "shared_experts.down_proj.weight": (32, 24),
    "layers.0.mlp.gate_proj.weight": (48, 32),
    "layers.0.mlp.up_proj.weight": (48, 32),
    "layers.0.mlp.down_proj.weight": (32, 48),
    "gate_proj.weight": (12, 32),
    "up_proj.weight": (12, 32),
    "down_proj.weight": (32, 12),
    "mlp.gate.weight": (8, 32),
    "norm.weight": (32,),
    "embed_tokens.weight": (50, 32),
    "lm_head.weight": (50, 32),
    "_proj.weight": (32, 32),
}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_implementations_agree_with_eager(implementation, ids, tmp_path):
    tiny().save_pretrained(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    other = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    assert other.config._experts_implementation == implementation
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, eager(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_registered_experts_implementation_replaces_the_experts(ids, tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "silent", lambda experts, x, chosen, weights: torch.zeros_like(x))
    model = tiny(n_shared_experts=0)
    model.save_pretrained(tmp_path)
    silent = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="silent")
    x = torch.randn(1, 4, 32)
    assert not silent.model.layers[1].mlp(x).any()
    assert model.model.layers[1].mlp(x).any()
    silent.set_experts_implementation("eager")
    torch.testing.assert_close(silent.model.layers[1].mlp(x), model.model.layers[1].mlp(x))


def test_generation_with_cache_equals_generation_without(ids):
    model = tiny()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(ids, use_cache=True, **settings)
    assert with_cache.shape == (2, 23)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings))
    with torch.no_grad():
        past = model(ids[:, :7], use_cache=True).past_key_values
        stepped = model(ids[:, 7:], past_key_values=past).logits
        torch.testing.assert_close(stepped, model(ids).logits[:, 7:], atol=1e-5, rtol=1e-4)


def test_gate_and_recorded_outputs(ids):
    model = tiny(attn_implementation="eager")
    blocks = [m for m in model.modules() if isinstance(m, DeepseekMoE)]
    assert len(blocks) == 2 and not hasattr(tiny(n_shared_experts=0).model.layers[1].mlp, "shared_experts")
    with torch.no_grad():
        out = model(ids, output_router_logits=True, output_hidden_states=True, output_attentions=True)
        logits, weights, chosen = blocks[0].gate(torch.randn(5, 32))
    assert [tuple(r.shape) for r in out.router_logits] == [(22, 8)] * 2
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    assert model(ids).router_logits is None
    best = logits.softmax(-1).topk(3)
    assert torch.equal(chosen, best.indices) and torch.equal(weights, best.values)


@pytest.mark.parametrize(
    "changes, width",
    [({}, 24), ({"n_shared_experts": 1}, 12), ({"shared_expert_intermediate_size": 20}, 20)],
)
def test_width_of_the_shared_experts(changes, width):
    assert tiny(**changes).model.layers[1].mlp.shared_experts.up_proj.weight.shape == (width, 32)


def test_tied_embeddings_share_one_tensor(tmp_path):
    tied = tiny(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    for model in (tied, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    free = tiny()
    assert not torch.equal(free.lm_head.weight, free.model.embed_tokens.weight)


def test_gradients_reach_every_parameter(ids):
    model = tiny(gated_shared_experts=True)
    model(ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_real_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek"))
    assert sum(p.numel() for p in model.parameters()) == 16_375_728_128
    assert model.config.num_experts == 64


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"n_routed_experts": 0}, "n_routed_experts"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"hidden_size": 34}, "hidden_size"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ({"n_shared_experts": 0, "gated_shared_experts": True}, "gated_shared_experts"),
        ({"n_shared_experts": None, "shared_expert_intermediate_size": 20}, "shared_expert_intermediate_size"),
    ],
)
def test_bad_configs_are_refused(changes, field, tmp_path):
    with pytest.raises(InputError, match=rf"DeepseekConfig\.{field}: found .*, expected "):
        DeepseekConfig(**(HUB_CONFIG | changes))
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG | changes))
    with pytest.raises(InputError, match=field):
        AutoConfig.from_pretrained(tmp_path)
