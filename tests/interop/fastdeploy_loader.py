#!/usr/bin/env python3
"""Is this the folder FastDeploy's v0 loader asks for? Nothing missing, nothing unexpected.

    python tests/interop/fastdeploy_loader.py FOLDER [FOLDER ...]

From a folder's config.json alone, this page works out every tensor that FastDeploy's loader for
ERNIE-4.5 looks up, with element type and shape, and compares that with the safetensors headers,
which it reads as strictly as FastDeploy's reader does. It shares no code with qtool. A folder with
`rank0`, `rank1` ... is checked rank by rank. FastDeploy itself is not run.

Where the rules come from, all in PaddlePaddle/FastDeploy: names and shapes of linear weights from
`model_executor/layers/linear.py`, `layers/quantization/weight_only.py`; experts from
`layers/moe/moe.py` and `layers/moe/fused_moe_wint2_backend.py`; the choice by layer from
`layers/quantization/wint2.py`; embedding and head from `layers/embeddings.py`, `layers/lm_head.py`;
router and bias from `models/ernie4_5_moe.py`; the config from `config.py`; the reader from
`paddleformers/utils/safetensors.py`.
"""

import json
import sys
from math import prod
from pathlib import Path

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
         "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


def linear(kind, out, inner):
    """Suffix -> (dtype, shape) of a linear weight of `inner` columns and `out` rows."""
    if kind == "wint8":
        return {"quant_weight": ("I8", [out, inner]), "weight_scale": ("BF16", [out])}
    if kind == "wint4":
        return {"quant_weight": ("I8", [out // 2, inner]), "weight_scale": ("BF16", [out])}
    assert kind == "wint2", kind
    return {
        "quant_weight": ("U8", [inner // 4, out]), "weight_scale": ("U8", [inner // 128, out]),
        "super_scales": ("BF16", [out]), "code_scale": ("F32", [out]), "code_zp": ("F32", [out]),
    }


def kinds(config):
    """(type of linear weights, type of a layer's experts), as the loader picks them."""
    quantization = config["quantization_config"]
    name = quantization["quantization"]
    if name in ("wint8", "wint4"):
        return name, lambda layer: None
    assert name == "wint2", name
    moe = quantization["moe_quant_config"]
    assert moe["quant_type"] == "w4w2", moe
    last = moe["moe_w4_quant_config"]["quant_end_layer"]
    four = moe["moe_w4_quant_config"]["quant_type"]
    return quantization["dense_quant_type"], lambda layer: four if layer <= last else "wint2"


def asked(config, ranks=1):
    """Every tensor the loader looks up on a rank: name -> (dtype, shape)."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    dense, of_layer = kinds(config)
    result = {}

    def add(at, kind, out, inner):
        for suffix, what in linear(kind, out, inner).items():
            result[f"{at}.{suffix}"] = what

    def mlp(at, kind, width):
        add(f"{at}.up_gate_proj", kind, 2 * width // ranks, hidden)
        add(f"{at}.down_proj", kind, hidden, width // ranks)

    result["ernie.embed_tokens.weight"] = "BF16", [config["vocab_size"] // ranks, hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"ernie.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"{at}.{norm}.weight"] = "BF16", [hidden]
        add(f"{at}.self_attn.qkv_proj", dense, heads * dim // ranks, hidden)
        add(f"{at}.self_attn.o_proj", dense, hidden, config["num_attention_heads"] * dim // ranks)
        first = config.get("moe_layer_start_index", 0)
        if not config.get("moe_num_experts") or layer < first:
            mlp(f"{at}.mlp", dense, config["intermediate_size"])
            continue
        result[f"{at}.mlp.gate.weight"] = "F32", [hidden, config["moe_num_experts"]]
        if config.get("moe_use_aux_free"):
            bias = f"{at}.mlp.moe_statics.e_score_correction_bias"
            result[bias] = "F32", [1, config["moe_num_experts"]]
        for expert in range(config["moe_num_experts"]):
            mlp(f"{at}.mlp.experts.{expert}", of_layer(layer), config["moe_intermediate_size"])
        if config.get("moe_num_shared_experts"):
            width = config["moe_intermediate_size"] * config["moe_num_shared_experts"]
            mlp(f"{at}.mlp.shared_experts", dense, width)
    result["ernie.norm.weight"] = "BF16", [hidden]
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = "BF16", [hidden, config["vocab_size"] // ranks]
    return result


def header(path, faults):
    """The header of a safetensors file, read strictly; what is wrong goes to `faults`."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    end, size = 0, path.stat().st_size
    if length > 100_000_000:
        faults.append(f"{path.name}: header of {length} bytes")
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        if start != end:
            faults.append(f"{path.name}: {name} begins at {start}, the one before it ends at {end}")
        if entry["dtype"] not in BYTES:
            faults.append(f"{path.name}: {name} is {entry['dtype']}")
        elif stop - start != prod(entry["shape"]) * BYTES[entry["dtype"]]:
            faults.append(f"{path.name}: {name}: {stop - start} bytes for {entry['shape']}")
        end = stop
    if 8 + length + end != size:
        faults.append(f"{path.name}: {size} bytes, the header covers {8 + length + end}")
    return entries


def found(folder, faults):
    """Every tensor of a folder: name -> (dtype, shape)."""
    index = folder / "model.safetensors.index.json"
    if any(folder.glob("*.pdparams")):
        faults.append("a .pdparams file takes precedence over safetensors")
    if not index.is_file():
        entries = header(folder / "model.safetensors", faults)
        return {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
    weight_map, result = json.loads(index.read_text())["weight_map"], {}
    for file in sorted(set(weight_map.values())):
        for name, entry in header(folder / file, faults).items():
            if weight_map.get(name) != file:
                faults.append(f"{name} is in {file}, the index says {weight_map.get(name)}")
            result[name] = entry["dtype"], entry["shape"]
    faults += [f"{name} is in the index only" for name in weight_map if name not in result]
    return result


def check_config(config, faults):
    """What config.json must say to take the path that loads codes."""
    quantization = config.get("quantization_config", {})
    for wrong, said in (
        (config.get("dtype") != "bfloat16", "dtype is not bfloat16: not taken for Paddle's form"),
        ("torch_dtype" in config, "torch_dtype beside dtype is an error"),
        ("quantization" not in quantization, "quantization_config has no key quantization"),
        (config.get("is_quantized") is not True, "is_quantized is not true"),
        (quantization.get("is_quantized") is not True, "quantization_config.is_quantized is not true"),
        (config["architectures"][0] not in ("Ernie4_5_ForCausalLM", "Ernie4_5_MoeForCausalLM"),
         f"architecture {config['architectures']}"),
        (quantization.get("quantization") == "wint2" and "moe_num_experts" not in config,
         "wint2 without experts"),
        (quantization.get("dense_quant_config", "wint8") != quantization.get("dense_quant_type", "wint8"),
         "dense_quant_config and dense_quant_type differ"),
    ):
        if wrong:
            faults.append(said)


def check_one(folder, ranks):
    """(faults, number of tensors, bytes of tensors) of one complete checkpoint."""
    faults = []
    config = json.loads((folder / "config.json").read_text())
    check_config(config, faults)
    have, want = found(folder, faults), asked(config, ranks)
    faults += [f"{name} is missing" for name in want if name not in have]
    faults += [f"{name} is unexpected" for name in have if name not in want]
    faults += [f"{name}: asked for {want[name]}, got {have[name]}"
               for name in want if name in have and tuple(have[name]) != tuple(want[name])]
    if not any(folder.glob("tokenizer*")):
        faults.append("no tokenizer file")
    return faults, len(have), sum(prod(shape) * BYTES[dtype] for dtype, shape in want.values())


def check(folder):
    """(faults, number of tensors, bytes of tensors) of a folder, over all its ranks."""
    folder = Path(folder)
    ranks = sorted(path for path in folder.iterdir() if path.is_dir() and path.name.startswith("rank"))
    if not ranks:
        return check_one(folder, 1)
    faults, count, size = [], 0, 0
    if [path.name for path in ranks] != [f"rank{i}" for i in range(len(ranks))]:
        faults.append(f"folders {[path.name for path in ranks]}")
    for path in ranks:
        one, tensors, bytes_ = check_one(path, len(ranks))
        faults += [f"{path.name}: {fault}" for fault in one]
        count, size = count + tensors, size + bytes_
    return faults, count, size


def main(folders):
    bad = 0
    for folder in folders:
        faults, count, size = check(folder)
        for fault in faults[:20]:
            print(f"  {fault}")
        bad += len(faults)
        print(f"{folder}: {count} tensors, {size:,} bytes, {len(faults)} faults")
    return 1 if bad or not folders else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
