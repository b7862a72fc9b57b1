"""Makes the base model: SmolLM2-135M-Instruct in BF16, taken off the 4-bit grid it comes on.

    python prepare.py --work DIR        writes DIR/smollm2

The package holds the model as GGUF with Q4_1 linears.  A group-32 INT4
quantizer could reproduce such weights exactly, which would flatter it.  So
every linear weight gets seeded uniform noise of half a grid step to either
side (a step is (max - min) / 15 over each 32 weights in a row), and the sum,
rounded to BF16, is the base.  All figures of the benchmark are against it.

Written: model.safetensors, config.json, tokenizer.json,
tokenizer_config.json, and prepared.json with the digests of source and result.
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import fetch

SEED = 20261124
BLOCK = 32  # weights that share one Q4_1 scale
STEPS = 15  # of its grid

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name):
    """The Hugging Face name of a GGUF tensor."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    blk, layer, kind, weight = name.split(".")
    if blk != "blk" or weight != "weight":
        raise ValueError(f"unexpected tensor {name}")
    return f"model.layers.{layer}.{NAMES[kind]}.weight"


def unpermute(weight, heads):
    """Rows of q and k from llama.cpp's order (pairs side by side) to that of transformers (halves)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def off_grid(weight, index):
    """The weight plus uniform noise of half a grid step, from a seed of its own."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // BLOCK, BLOCK)
    step = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / STEPS
    noise = np.random.Generator(np.random.PCG64([SEED, index])).random(blocks.shape) - 0.5
    return (blocks + step * noise).reshape(rows, columns).astype(np.float32)


def field(reader, key):
    return reader.fields[key].contents()


def weights(reader):
    heads = {
        "attn_q": field(reader, "llama.attention.head_count"),
        "attn_k": field(reader, "llama.attention.head_count_kv"),
    }
    result = {}
    for index, tensor in enumerate(sorted(reader.tensors, key=lambda t: t.name)):
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[-2]
        if weight.ndim == 2 and kind in NAMES:  # noise first: blocks run along rows, any row order will do
            weight = off_grid(weight, index)
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        result[hf_name(tensor.name)] = torch.from_numpy(weight).to(torch.bfloat16).contiguous()
    return result


def config(reader):
    def of(key):
        return field(reader, f"llama.{key}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "head_dim": of("rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": of("embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": of("feed_forward_length"),
        "max_position_embeddings": of("context_length"),
        "mlp_bias": False,
        "num_attention_heads": of("attention.head_count"),
        "num_hidden_layers": of("block_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        # GGUF holds it as f32: print the shortest decimal that rounds to it.
        "rms_norm_eps": float(str(np.float32(of("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(of("rope.freq_base")),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": of("vocab_size"),
    }


def tokenizer(reader):
    """Byte-level BPE; SmolLM2 splits digits off one by one first."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    types = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    result = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    result.decoder = decoders.ByteLevel()
    control, user = 3, 4
    result.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, types, strict=True) if kind == control]
    )
    result.add_tokens([AddedToken(t, special=False) for t, kind in zip(tokens, types, strict=True) if kind == user])
    if result.get_vocab_size() != len(tokens):
        raise ValueError("the rebuilt tokenizer has another vocabulary size")
    return result


def tokenizer_config(reader):
    tokens = field(reader, "tokenizer.ggml.tokens")

    def token(name):
        return tokens[field(reader, f"tokenizer.ggml.{name}_token_id")]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": field(reader, "tokenizer.ggml.add_bos_token"),
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "chat_template": field(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field(reader, "llama.context_length"),
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prepare(work):
    """Writes the folder unless it is there; returns its path."""
    source = fetch.smollm2(work)
    folder = Path(work) / "smollm2"
    if (folder / "prepared.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(source)
    save_file(weights(reader), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_json(folder / "config.json", config(reader))
    tokenizer(reader).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(reader))
    digests = {
        "package": fetch.SMOLLM2,
        "gguf_sha256": fetch.SMOLLM2_SHA256,
        "seed": SEED,
        "model_sha256": fetch.sha256(folder / "model.safetensors"),
        "tokenizer_sha256": fetch.sha256(folder / "tokenizer.json"),
    }
    write_json(folder / "prepared.json", digests)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, help="the benchmark's working folder")
    args = parser.parse_args()
    try:
        folder = prepare(args.work)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"prepare.py: {error}")
    print((folder / "prepared.json").read_text(), end="")


if __name__ == "__main__":
    main()
