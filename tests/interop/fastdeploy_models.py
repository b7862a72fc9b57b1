#!/usr/bin/env python3
"""Writes ERNIE-4.5 checkpoints of published shapes, with random weights or as sparse files of zeros.

    python tests/interop/fastdeploy_models.py 0.3b OUT --weights random
    python tests/interop/fastdeploy_models.py 21b-a3b OUT --weights zero --form paddle

A sparse file takes no room on disk however large the model is. Names and shapes are those of the
Hugging Face form (-PT) or the Paddle form (-Paddle), written down here from the published configs.
"""

import argparse
import json
from pathlib import Path

import numpy as np

MODELS = {
    "0.3b": {
        "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5",
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
        "vocab_size": 103424, "tie_word_embeddings": True,
    },
    "21b-a3b": {
        "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe",
        "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 28,
        "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 103424, "tie_word_embeddings": True,
        "moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 27,
        "moe_layer_interval": 1, "moe_use_aux_free": True,
    },
}
COMMON = {
    "hidden_act": "silu", "use_bias": False, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
SHARD = 4 << 30


def tensors(config, form):
    """Yields (name, dtype, shape) of every tensor."""
    paddle = form == "paddle"
    top = "ernie" if paddle else "model"
    hidden, dim = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    def linear(at, out, inner):
        return f"{at}.weight", "BF16", [inner, out] if paddle else [out, inner]

    def mlp(at, width):
        if paddle:
            yield linear(f"{at}.up_gate_proj", 2 * width, hidden)
        else:
            yield linear(f"{at}.gate_proj", width, hidden)
            yield linear(f"{at}.up_proj", width, hidden)
        yield linear(f"{at}.down_proj", hidden, width)

    yield f"{top}.embed_tokens.weight", "BF16", [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"{top}.layers.{layer}"
        yield f"{at}.input_layernorm.weight", "BF16", [hidden]
        if paddle:
            yield linear(f"{at}.self_attn.qkv_proj", q + 2 * kv, hidden)
        else:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                yield linear(f"{at}.self_attn.{name}_proj", rows, hidden)
        yield linear(f"{at}.self_attn.o_proj", hidden, q)
        yield f"{at}.post_attention_layernorm.weight", "BF16", [hidden]
        if layer < config.get("moe_layer_start_index", config["num_hidden_layers"]):
            yield from mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        experts, width = config["moe_num_experts"], config["moe_intermediate_size"]
        yield f"{at}.mlp.gate.weight", "F32", [hidden, experts] if paddle else [experts, hidden]
        yield f"{at}.mlp.moe_statics.e_score_correction_bias", "F32", [1, experts]
        for expert in range(experts):
            yield from mlp(f"{at}.mlp.experts.{expert}", width)
        yield from mlp(f"{at}.mlp.shared_experts", width * config["moe_num_shared_experts"])
    yield f"{top}.norm.weight", "BF16", [hidden]
    if not config["tie_word_embeddings"]:
        vocab = config["vocab_size"]
        yield "lm_head.weight", "BF16", [hidden, vocab] if paddle else [vocab, hidden]


def shards(entries):
    """Cuts the list of tensors into files of at most SHARD bytes."""
    cut, filled = [[]], 0
    for name, dtype, shape in entries:
        size = int(np.prod(shape)) * {"BF16": 2, "F32": 4}[dtype]
        if filled and filled + size > SHARD:
            cut.append([])
            filled = 0
        cut[-1].append((name, dtype, shape, size))
        filled += size
    return cut


def write_file(path, entries, random):
    """One safetensors file; zeros are left as a hole."""
    header, at = {}, 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name, dtype, shape, size in entries if random is not None else []:
            values = random.standard_normal(int(np.prod(shape)), dtype="f4") * np.float32(0.02)
            if dtype == "BF16":
                values = (values.view("u4") >> 16).astype("u2")
            file.write(values.tobytes())
        file.truncate(start + at)
    return at


def write(name, folder, form="hf", weights="random", seed=0):
    """Writes the checkpoint; returns its bytes of tensors."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = COMMON | MODELS[name] | {"dtype" if form == "paddle" else "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.model").write_bytes(b"no tokenizer: the weights are made up\n")
    random = np.random.default_rng(seed) if weights == "random" else None
    cut, weight_map, total = shards(tensors(config, form)), {}, 0
    for number, entries in enumerate(cut):
        file = "model.safetensors"
        if len(cut) > 1:
            file = f"model-{number + 1:05}-of-{len(cut):05}.safetensors"
        total += write_file(folder / file, entries, random)
        weight_map |= {entry[0]: file for entry in entries}
    if len(cut) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", choices=["hf", "paddle"], default="hf")
    parser.add_argument("--weights", choices=["random", "zero"], default="random")
    args = parser.parse_args()
    print(f"{write(args.model, args.folder, args.form, args.weights):,} bytes of tensors")
