"""The sample models as checkpoints: which weights are linear, and the Paddle form of an HF folder.

The Paddle form of ERNIE-4.5 differs in three ways: names begin with `ernie.` instead of `model.`;
linear weights lie as [in, out]; q, k and v are one weight with columns q | k | v, gate and up are
one with columns gate | up. Written from the published name table, not from qtool's own helper.
"""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file


def config(folder):
    """config.json."""
    return json.loads((folder / "config.json").read_text("utf-8"))


def mlps(about):
    """Names of all SwiGLU blocks, e.g. `layers.1.mlp.experts.0`."""
    for layer in range(about["num_hidden_layers"]):
        block = f"layers.{layer}.mlp"
        if layer < about.get("moe_layer_start_index", about["num_hidden_layers"]):
            yield block
            continue
        yield from (f"{block}.experts.{e}" for e in range(about["moe_num_experts"]))
        yield f"{block}.shared_experts"


def linear_names(about):
    """Names of the weights that are to be quantized: in the HF form, and in the Paddle form."""
    attention = [f"layers.{layer}.self_attn" for layer in range(about["num_hidden_layers"])]
    hf = [f"model.{a}.{p}_proj.weight" for a in attention for p in "qkvo"]
    hf += [f"model.{m}.{p}_proj.weight" for m in mlps(about) for p in ("gate", "up", "down")]
    paddle = [f"ernie.{a}.{p}_proj.weight" for a in attention for p in ("qkv", "o")]
    paddle += [f"ernie.{m}.{p}_proj.weight" for m in mlps(about) for p in ("up_gate", "down")]
    return hf, paddle


def fused(about):
    """(Paddle name, HF names in the order of its columns) of every fused weight."""
    for layer in range(about["num_hidden_layers"]):
        block = f"layers.{layer}.self_attn"
        yield (f"ernie.{block}.qkv_proj.weight",
               [f"model.{block}.{p}_proj.weight" for p in "qkv"])
    for block in mlps(about):
        yield (f"ernie.{block}.up_gate_proj.weight",
               [f"model.{block}.{p}_proj.weight" for p in ("gate", "up")])


def is_transposed(name):
    """Whether a Paddle file holds the transpose: all matrices but the embedding and the bias."""
    return name.endswith((".o_proj.weight", ".down_proj.weight", ".mlp.gate.weight"))


def write_paddle(source, folder):
    """Writes the Paddle form of an HF folder; returns the number of its tensors."""
    about, tensors = config(source), load_file(source / "model.safetensors")
    result = {}
    for name, members in fused(about):
        result[name] = torch.cat([tensors.pop(m) for m in members]).t()
    for name, tensor in tensors.items():
        new = name.replace("model.", "ernie.", 1)
        result[new] = tensor.t() if is_transposed(name) else tensor
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in result.items()}, folder / "model.safetensors")
    about["dtype"] = about.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps(about, indent=2))
    for path in source.glob("*token*.json"):
        shutil.copy(path, folder)
    return len(result)


def from_paddle(tensors, about):
    """Tensors by Paddle name -> by HF name: split and turned back."""
    sizes = {p: about["head_dim"] * about["num_attention_heads"] for p in "q"}
    sizes |= {p: about["head_dim"] * about["num_key_value_heads"] for p in "kv"}
    result, rest = {}, dict(tensors)
    for name, members in fused(about):
        whole = rest.pop(name).T
        part = whole.shape[0] // 2
        rows = [sizes[p] for p in "qkv"] if len(members) == 3 else [part, part]
        assert sum(rows) == whole.shape[0], (name, whole.shape)
        at = 0
        for member, count in zip(members, rows):
            result[member] = whole[at:at + count]
            at += count
    for name, tensor in rest.items():
        result[name.replace("ernie.", "model.", 1)] = tensor.T if is_transposed(name) else tensor
    return result
