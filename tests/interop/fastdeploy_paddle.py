#!/usr/bin/env python3
"""Are the bytes of a FastDeploy folder those that Paddle itself writes?

    pip install -r tests/interop/requirements-paddle.txt        (the CPU package; about 200 MB)
    python tests/interop/fastdeploy_paddle.py --qtool target/release/qtool

Four checks on a small ERNIE-4.5 with made-up weights, for INT8 and INT4:

1. weights that lie on the grid (codes times a power of two, with the largest code in each column):
   `paddle.nn.quant.weight_quantize` must give the bytes and the scales of qtool's folder;
2. random weights, INT4 with clip search: Paddle quantizes qtool's own bf16 export, and must find the
   stored bytes again, that is, it reads the folder's codes as qtool decodes them;
3. random weights without clip search: how many bytes agree when each chooses its own codes (Paddle
   rounds halves away from zero, qtool to even). The scales must be the same; more is not asked.

4. random weights: the folder's bytes, decoded by a layout learned from `weight_quantize` alone (`paddle_layout.py`)
   and multiplied by the stored scales, are the values of qtool's bf16 export, and so are products with them.

No CPU package of Paddle from 2.6.2 to 3.3.1 has `weight_dequantize` or `weight_only_linear` (they are
registered for GPUs only); checks 2 and 4 stand in for them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import paddle
from paddle.nn.quant import weight_quantize

from paddle_layout import Layout

CONFIG = {
    "architectures": ["Ernie4_5_ForCausalLM"], "model_type": "ernie4_5", "dtype": "bfloat16",
    "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128,
    "tie_word_embeddings": True,
}
TOP = {8: 127, 4: 7}


def bf16(values):
    """float32 -> bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, "f4").view("u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("u2")


def widen(bits):
    """bits of bfloat16 -> float32"""
    return (bits.astype("u4") << 16).view("f4")


def linears():
    """Paddle names and [K, N] of the linear weights."""
    hidden, width = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"ernie.layers.{layer}"
        yield f"{at}.self_attn.qkv_proj", hidden, 512
        yield f"{at}.self_attn.o_proj", 256, hidden
        yield f"{at}.mlp.up_gate_proj", hidden, 2 * width
        yield f"{at}.mlp.down_proj", width, hidden


def grid(random, k, n, top):
    """Codes times a power of two, with a code of +-top in every column."""
    codes = random.integers(-top, top + 1, (k, n))
    codes[random.integers(0, k, n), np.arange(n)] = top * random.choice([-1, 1], n)
    return codes * np.exp2(random.integers(-12, -4, n))


def write(folder, weights):
    """A Paddle checkpoint of these linear weights; everything else is ones."""
    hidden = CONFIG["hidden_size"]
    tensors = {f"{name}.weight": values for name, values in weights.items()}
    tensors["ernie.embed_tokens.weight"] = np.ones((CONFIG["vocab_size"], hidden))
    tensors["ernie.norm.weight"] = np.ones(hidden)
    for layer in range(CONFIG["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"ernie.layers.{layer}.{norm}.weight"] = np.ones(hidden)
    header, data = {}, b""
    for name, values in tensors.items():
        raw = bf16(values).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def read(folder):
    """Name -> bytes of every tensor of a single-file folder."""
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {name: raw[start + e["data_offsets"][0]:start + e["data_offsets"][1]]
            for name, e in header.items()}


def by_paddle(bits, weight_bits):
    """Paddle's bytes of codes and scales for a [K, N] weight given as bits of bfloat16."""
    weight = paddle.to_tensor(widen(weight_bits)).astype("bfloat16")
    out, scale = weight_quantize(weight, algo=f"weight_only_int{bits}", arch=80)
    scale = bf16(scale.astype("float32").numpy())
    return out.numpy().tobytes(), scale.tobytes()


class Bench:
    """A folder to work in and the program under test."""

    def __init__(self, folder, qtool):
        self.folder, self.qtool, self.count = Path(folder), qtool, 0

    def run(self, *args):
        ran = subprocess.run([self.qtool, *map(str, args)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr

    def quantize(self, weights, bits, *options):
        """The source folder and the FastDeploy folder of these weights."""
        self.count += 1
        source, out = self.folder / f"m{self.count}", self.folder / f"o{self.count}"
        write(source, weights)
        self.run("quantize", source, "-o", out, "--format", "fastdeploy", "--bits", bits, *options)
        return source, out

    def grid_weights_give_paddles_bytes(self, bits):
        random = np.random.default_rng(bits)
        weights = {name: grid(random, k, n, TOP[bits]) for name, k, n in linears()}
        _, out = self.quantize(weights, bits, "--clip", "none")
        stored, compared = read(out), 0
        for name, values in weights.items():
            codes, scales = by_paddle(bits, bf16(values))
            assert stored[f"{name}.quant_weight"] == codes, name
            assert stored[f"{name}.weight_scale"] == scales, name
            compared += len(codes)
        return f"{compared:,} bytes of codes and all scales equal"

    def paddle_finds_the_codes_in_the_export(self, bits):
        random = np.random.default_rng(10 + bits)
        weights = {name: random.normal(0, 0.05, (k, n)) for name, k, n in linears()}
        _, out = self.quantize(weights, bits)
        dense = out.with_name(out.name + "-bf16")
        self.run("export", out, "--to", "bf16", "-o", dense)
        stored, exported, compared = read(out), read(dense), 0
        for name, k, n in linears():
            values = np.frombuffer(exported[f"{name}.weight"], "u2").reshape(k, n)
            codes, _ = by_paddle(bits, values)
            assert stored[f"{name}.quant_weight"] == codes, name
            compared += len(codes)
        return f"{compared:,} bytes of codes found again"

    def decoded_by_the_learned_layout(self, bits):
        random = np.random.default_rng(30 + bits)
        weights = {name: random.normal(0, 0.05, (k, n)) for name, k, n in linears()}
        _, out = self.quantize(weights, bits)
        dense = out.with_name(out.name + "-bf16")
        self.run("export", out, "--to", "bf16", "-o", dense)
        stored, exported, compared, layouts = read(out), read(dense), 0, {}
        for name, k, n in linears():
            if (k, n) not in layouts:
                layouts[k, n] = Layout(bits, k, n)
            codes = layouts[k, n].codes(stored[f"{name}.quant_weight"], bits, k, n)
            scales = widen(np.frombuffer(stored[f"{name}.weight_scale"], "u2"))
            values = bf16(codes * scales)
            assert np.array_equal(values, np.frombuffer(exported[f"{name}.weight"], "u2").reshape(k, n)), name
            x = random.normal(0, 1, (3, k))
            product = (x @ codes) * scales  # as a weight-only product does it: scales last
            ours = x @ widen(np.frombuffer(exported[f"{name}.weight"], "u2").reshape(k, n)).astype("f8")
            assert np.abs(product - ours).max() <= 2**-8 * np.abs(ours).max(), name
            compared += codes.size
        return f"{compared:,} weights equal"

    def own_choices_compared(self, bits):
        random = np.random.default_rng(20 + bits)
        weights = {name: random.normal(0, 0.05, (k, n)) for name, k, n in linears()}
        _, out = self.quantize(weights, bits, "--clip", "none")
        stored, equal, total = read(out), 0, 0
        for name, values in weights.items():
            codes, scales = by_paddle(bits, bf16(values))
            assert stored[f"{name}.weight_scale"] == scales, name
            ours, theirs = (np.frombuffer(x, "u1") for x in (stored[f"{name}.quant_weight"], codes))
            equal, total = equal + int((ours == theirs).sum()), total + len(codes)
        assert equal > 0.99 * total, (equal, total)
        return f"all scales and {equal:,} of {total:,} bytes of codes equal"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qtool", type=Path, required=True, help="the built program")
    args = parser.parse_args()
    paddle.set_device("cpu")
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="qtool-paddle-") as folder:
        bench = Bench(folder, args.qtool.resolve())
        for check, widths in (
            (bench.grid_weights_give_paddles_bytes, (8, 4)),
            (bench.paddle_finds_the_codes_in_the_export, (4,)),
            (bench.decoded_by_the_learned_layout, (8, 4)),
            (bench.own_choices_compared, (8, 4)),
        ):
            for bits in widths:
                try:
                    print(f"ok {check.__name__} INT{bits}: {check(bits)}")
                    passed += 1
                except AssertionError as error:
                    failed += 1
                    print(f"FAILED {check.__name__} INT{bits}: {error}")
    print(f"paddle {paddle.__version__}:")
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
