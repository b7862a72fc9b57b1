"""Writes an artifact by hand, as docs/artifact.md says, from codes, scales and zero points.

Knows nothing of qtool's own writer, and packs in another way than docs/decode.py unpacks: a row of
codes is one big number whose little-endian bytes are stored.
"""

import json
import struct
from pathlib import Path

import numpy as np

LAYOUTS = {
    "rows": "element [n][g] is element n*shape[1] + g of the tensor",
    "lsb-rows": "bit i of code[n][k] is bit (k*bits + i) % 8"
                " of byte n*row_bytes + (k*bits + i) / 8",
}
AFFINE = "value[n][k] = (code[n][k] - zero_point[n][k / group]) * scale[n][k / group], in f32"
FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def float_bytes(values, dtype):
    """Little-endian bytes of values that the type holds exactly."""
    if dtype == "BF16":
        words = [struct.pack("<f", v) for v in values]
        assert all(word[:2] == b"\0\0" for word in words), "not a bfloat16 value"
        return b"".join(word[2:] for word in words)
    return b"".join(struct.pack({"F16": "<e", "F32": "<f"}[dtype], v) for v in values)


def pack(rows, bits):
    """Rows of codes -> bytes of the layout lsb-rows."""
    size = (len(rows[0]) * bits + 7) // 8
    digits = ["".join(f"{code:0{bits}b}" for code in reversed(row)) for row in rows]
    return b"".join(int(number, 2).to_bytes(size, "little") for number in digits)


def kept(name, dtype, shape, data):
    """A tensor stored as it is."""
    return {"name": name, "dtype": dtype, "shape": list(shape), "data": data, "stored": "kept"}


def quantized(name, codes, scales, bits, *, zeros=None, group=0, scale_dtype="BF16",
              orientation="out_in", shape=None):
    """A quantized tensor: codes (N, K), scales (N, G), and zero points (N, G) or None."""
    n, k = len(codes), len(codes[0])
    flat = [s for row in scales for s in row]
    parts = [("codes", "lsb-rows", bits, "U8", -(-k * bits // 8), pack(codes, bits)),
             ("scales", "rows", 8 * FLOAT_BYTES[scale_dtype], scale_dtype, len(scales[0]),
              float_bytes(flat, scale_dtype))]
    if zeros is not None:
        parts.append(("zero_points", "lsb-rows", bits, "U8", -(-len(zeros[0]) * bits // 8),
                      pack(zeros, bits)))
    grid = "sym" if zeros is None else "zp"
    run = f"g{group}" if group else "row"
    bottom = 1 if bits == 8 and zeros is None else 0
    scheme = {"bits": bits, "group": group, "zero_point": 1 << (bits - 1),
              "code_range": [bottom, (1 << bits) - 1], "scale_dtype": scale_dtype, "value": AFFINE}
    if zeros is not None:
        del scheme["zero_point"]
    shape = shape or ([n, k] if orientation == "out_in" else [k, n])
    return {"name": name, "dtype": "BF16", "shape": list(shape), "stored": "quantized",
            "scheme": f"w{bits}-{grid}-{run}-{scale_dtype.lower()}", "scheme_record": scheme,
            "rows": n, "columns": k, "orientation": orientation, "parts": parts}


def write_safetensors(path, entries):
    """entries: (name, dtype, shape, bytes)."""
    header, at = {}, 0
    for name, dtype, shape, data in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(entry[3] for entry in entries)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def write(folder, tensors, **changes):
    """Writes the folder; every tensor gets a shard of its own. `changes` replace manifest keys."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    records, schemes, weight_map = [], {}, {}
    for number, tensor in enumerate(tensors):
        file = f"model-{number + 1:05}-of-{len(tensors):05}.safetensors"
        record = {key: tensor[key] for key in ("name", "shape", "dtype", "stored")}
        if tensor["stored"] == "kept":
            record |= {"reason": "by hand", "file": file}
            entries = [(tensor["name"], tensor["dtype"], tensor["shape"], tensor["data"])]
        else:
            schemes[tensor["scheme"]] = tensor["scheme_record"]
            record |= {key: tensor[key] for key in ("scheme", "rows", "columns", "orientation")}
            record["parts"], entries = [], []
            for role, layout, bits, dtype, per_row, data in tensor["parts"]:
                shape, stored = [tensor["rows"], per_row], f"{tensor['name']}.{role}"
                record["parts"].append({
                    "role": role, "tensor": stored, "file": file, "layout": layout, "bits": bits,
                    "dtype": dtype, "shape": shape, "row_bytes": len(data) // tensor["rows"]})
                entries.append((stored, dtype, shape, data))
        write_safetensors(folder / file, entries)
        weight_map |= {entry[0]: file for entry in entries}
        records.append(record)
    manifest = {"format": "qtool", "version": 1, "layouts": LAYOUTS, "schemes": schemes,
                "tensors": records} | changes
    (folder / "qtool.json").write_text(json.dumps(manifest, indent=1))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_codes(seed, n, k, low, high):
    """Codes that use the whole range."""
    return np.random.default_rng(seed).integers(low, high + 1, (n, k)).tolist()
