"""The two sample models: their shape, how they are made and how they are stored."""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
)

FOLDERS = {"dense": "tiny-ernie45", "moe": "tiny-ernie45-moe"}
SEED = 20
DROPOUT = 0.1  # while training, on the output of each block

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_bias": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {
    "architectures": ["Ernie4_5ForCausalLM"],
    "model_type": "ernie4_5",
    **SHAPE,
    "num_hidden_layers": 6,
}
MOE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    **SHAPE,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 256,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 3,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def new_model(kind):
    """A freshly initialised model with dropout on every block's output."""
    torch.manual_seed(SEED)
    if kind == "dense":
        model = Ernie4_5ForCausalLM(Ernie4_5Config(**DENSE))
    else:
        model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**MOE))

    def drop(module, _, output):
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], DROPOUT), *output[1:])
        return F.dropout(output, DROPOUT)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    return model


class Routers:
    """Keeps the experts of a MoE model evenly used; does nothing for a dense one.

    The load-balancing loss keeps the probabilities even; the selection bias
    (e_score_correction_bias) then evens out the choice of experts.
    """

    def __init__(self, model):
        self.seen = {}  # router -> (mean probabilities, share of tokens)
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self.hook)

    def hook(self, router, _, output):
        if router.training:
            logits, _, chosen = output
            share = torch.bincount(chosen.flatten(), minlength=router.num_experts) / chosen.numel()
            self.seen[router] = (logits.softmax(-1).mean(0), share)

    def loss(self):
        """1 per layer if all is even, more if the experts in use are also the likely ones."""
        return sum(len(share) * (p * share).sum() for p, share in self.seen.values())

    @torch.no_grad()
    def move_bias(self, rate):
        """Up for experts with too few tokens, down for those with too many."""
        for router, (_, share) in self.seen.items():
            bias = router.moe_statics.e_score_correction_bias
            bias += rate * torch.sign(share.mean() - share)
            bias -= bias.mean()


def save_model(model, kind, folder):
    """BF16 with the classic per-expert names, and the two JSON files."""
    model.save_pretrained(folder)  # undoes transformers' in-memory fusing
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        keep = name.endswith("mlp.gate.weight") or "moe_statics" in name
        tensors[name] = tensor.to(torch.float32 if keep else torch.bfloat16).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    config = DENSE if kind == "dense" else MOE
    write_json(folder / "config.json", {**config, "torch_dtype": "bfloat16"})
    ids = {f"{x}_token_id": SHAPE[f"{x}_token_id"] for x in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
