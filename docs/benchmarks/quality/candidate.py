"""Candidate folders: which tensors are the linears, writing one, and counting its bits.

A bit of anything that an artifact stores counts: codes, scales, zero points,
code books, and every tensor that is neither an embedding, a head nor a norm.
"""

import json
import re
import shutil
import struct
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

LINEAR = re.compile(r"model\.layers\.\d+\..*_proj\.weight")
NOT_OF_LINEARS = re.compile(r"model\.embed_tokens\.|lm_head\.|model\.norm\.|.*layernorm\.")
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")

# Of the input of each linear, the name in second_moments.py's file.
INPUT_OF = {
    "self_attn.q_proj": "self_attn.qkv",
    "self_attn.k_proj": "self_attn.qkv",
    "self_attn.v_proj": "self_attn.qkv",
    "self_attn.o_proj": "self_attn.o",
    "mlp.gate_proj": "mlp.gate_up",
    "mlp.up_proj": "mlp.gate_up",
    "mlp.down_proj": "mlp.down",
}


def base_tensors(work):
    """{name: tensor} of the base model."""
    with safe_open(Path(work) / "smollm2" / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def input_of(name):
    """The second-moment matrix that belongs to a linear weight."""
    prefix, module = re.fullmatch(r"(model\.layers\.\d+)\.(.*)\.weight", name).groups()
    return f"{prefix}.{INPUT_OF[module]}"


def write(work, folder, tensors):
    """A Hugging Face folder like the base's with these tensors (BF16)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        shutil.copy(Path(work) / "smollm2" / name, folder / name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stored(artifact):
    """{name: bytes} of every tensor in the .safetensors files of a folder, from their headers."""
    sizes = {}
    for path in sorted(Path(artifact).glob("*.safetensors")):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            sizes[name] = end - begin
    return sizes


def linear_weights(work):
    """How many weights the linears of the base have."""
    with safe_open(Path(work) / "smollm2" / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(n).get_shape() for n in file.keys() if LINEAR.fullmatch(n)]
    return sum(rows * columns for rows, columns in shapes)


def bits(work, artifact):
    """{"bits_per_weight" of the linears, "stored_bytes" of the whole} of a qtool artifact."""
    sizes = stored(artifact)
    of_linears = sum(size for name, size in sizes.items() if not NOT_OF_LINEARS.match(name))
    return {
        "bits_per_weight": 8 * of_linears / linear_weights(work),
        "stored_bytes": sum(sizes.values()),
    }


def report(linear_bits, linears, others):
    """The same of a row made in Python, as the JSON line such a script ends with."""
    kept = sum(tensor.numel() * tensor.element_size() for tensor in others)
    return json.dumps({"bits_per_weight": linear_bits / linears, "stored_bytes": kept + linear_bits // 8})
