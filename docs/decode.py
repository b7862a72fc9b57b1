#!/usr/bin/env python3
"""Decodes a qtool artifact. Needs NumPy and nothing else of qtool: the folder explains itself.

    python decode.py OUT [--npz FILE]     prints a line a tensor: name, shape, source dtype, SHA-256

OUT/qtool.json, the manifest, has a record for every tensor of the source model. A tensor is

  kept       byte for byte as in the source: look up its own name in the safetensors file "file";
  quantized  stored as "parts", each a tensor of a safetensors file: packed codes, scales, and
             zero points where the scheme stores them. All have N rows ("rows"), one per output.

A part's "layout" says where its elements lie: LAYOUTS below. The record's "scheme" names an entry
of the manifest's table "schemes", and that entry's "value" is the formula that makes weights
of the codes: VALUES below. The result is an (N, K) float32 matrix, K being "columns"; where
"orientation" is "in_out", the source stored its transpose. The SHA-256 is that of the float32
little-endian bytes, row-major (of tensors that are not F32, F16 or BF16: of the stored bytes).
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

NEWEST = 1
NUMBERS = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4",
           "I32": "<i4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "F16": "<f2"}


def need(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def elements(raw, dtype, shape):
    """Bytes -> numbers. F32, F16 and BF16 become float32, exactly; unknown types stay bytes."""
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    numbers = raw.view(NUMBERS[dtype]).reshape(shape) if dtype in NUMBERS else raw
    return numbers.astype("<f4") if dtype == "F16" else numbers


def lsb_rows(raw, part, count):
    """(N, row_bytes) bytes -> (N, count) codes: cuts each row's stream of bits every `bits`."""
    bits, name = part["bits"], part["tensor"]
    need(bits in range(1, 9) and raw.shape[1] == -(-count * bits // 8), f"{name}: row length")
    stream = np.unpackbits(raw, axis=1, count=count * bits, bitorder="little")
    stream = stream.reshape(len(raw), count, bits)
    return np.packbits(stream, axis=2, bitorder="little")[:, :, 0]  # fills up with zero bits


def paddle_int8(raw, part, count):
    """Two rows in turn, 64 columns each; of 16 columns the first and the last eight alternate."""
    tiles = raw.reshape(len(raw) // 2, count // 64, 2, 4, 8, 2)  # pair, tile, row, run, k%8, k%16/8
    return tiles.transpose(0, 2, 1, 3, 5, 4).reshape(len(raw), count)


def paddle_int4(raw, part, count):
    """Four rows in turn, 64 columns each; 32 columns are four words of the nibbles 0..7."""
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1)
    tiles = nibbles.reshape(len(raw) // 4, count // 64, 4, 2, 4, 2, 4)  # .., k%8/2, k%2, k%32/8
    return tiles.transpose(0, 2, 1, 3, 6, 4, 5).reshape(len(raw), count)


# Layout -> (its formula, as the manifest has it under "layouts"; its reader).
LAYOUTS = {
    "rows": ("element [n][g] is element n*shape[1] + g of the tensor",
             lambda raw, part, count: elements(raw.ravel(), part["dtype"], (len(raw), count))),
    "lsb-rows": ("bit i of code[n][k] is bit (k*bits + i) % 8 of byte"
                 " n*row_bytes + (k*bits + i) / 8", lsb_rows),
    "paddle-int8": ("code[n][k] is byte kk%64 + 128*(kk/64) + 64*(n%2) + 2*K*(n/2) with"
                    " kk = 16*(k/16) + (k%8)*2 + (k%16)/8", paddle_int8),
    "paddle-int4": ("code[n][k] is nibble 4*(k%2) + p%4 (lowest first) of 32-bit word p/4 with"
                    " p = pp%32 + 128*(pp/32) + 32*(n%4) + 2*K*(n/4),"
                    " pp = 16*(k/32) + 4*((k/2)%4) + (k%32)/8", paddle_int4),
}


def affine(scheme, columns, part):
    """Subtracts integers and multiplies in float32, so there is one rounding."""
    group = scheme["group"] or columns  # 0 means the whole row
    need(columns % group == 0, f"groups of {group} do not divide rows of {columns}")
    codes, scales = part("codes", columns), part("scales", columns // group)[:, :, None]
    zeros = scheme.get("zero_point")  # the fixed one, or else one a group
    if zeros is None:
        zeros = part("zero_points", columns // group)[:, :, None].astype("<i4")
    grouped = codes.reshape(len(codes), columns // group, group).astype("<i4")
    return ((grouped - zeros).astype("<f4") * scales).reshape(codes.shape)


# Formula of a scheme -> the function that computes it.
VALUES = {
    "value[n][k] = (code[n][k] - zero_point[n][k / group]) * scale[n][k / group], in f32": affine,
}


def stored(folder, files, file, name):
    """A tensor of a safetensors file (8 bytes header length, JSON header, data): entry, bytes."""
    if file not in files:
        data = np.memmap(folder / file, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        files[file] = json.loads(data[8:start].tobytes()), data[start:]
    header, data = files[file]
    begin, end = header[name]["data_offsets"]
    return header[name], np.array(data[begin:end])


def matrix(folder, files, manifest, record):
    """The (N, K) matrix of a quantized record, decoded some rows at a time."""
    name, n, k = (record[key] for key in ("name", "rows", "columns"))
    scheme = manifest["schemes"].get(record["scheme"], {})
    need(scheme.get("value") in VALUES, f"{name}: unknown scheme {record['scheme']} {scheme}")
    parts = {}
    for part in record["parts"]:
        layout, text = part["layout"], manifest["layouts"].get(part["layout"])
        need(layout in LAYOUTS and text == LAYOUTS[layout][0],
             f"{name}: unknown layout {layout} ({text})")
        entry, raw = stored(folder, files, part["file"], part["tensor"])
        need(all(entry[key] == part[key] for key in ("dtype", "shape")), f"{name}: {part} {entry}")
        parts[part["role"]] = part, raw.reshape(n, part["row_bytes"])
    result = np.empty((n, k), "<f4")
    step = 16 + (1 << 22) // max(1, k) // 16 * 16  # some layouts interleave up to 16 rows
    for at in range(0, n, step):
        def part(role, count):
            need(role in parts, f"{name}: no {role}")
            about, raw = parts[role]
            return LAYOUTS[about["layout"]][1](raw[at:at + step], about, count)
        result[at:at + step] = VALUES[scheme["value"]](scheme, k, part)
    return result


def tensors(folder):
    """Yields (record, array) for every tensor of the source."""
    folder, files = Path(folder), {}
    manifest = json.loads((folder / "qtool.json").read_text("utf-8"))
    form, version = manifest["format"], manifest["version"]
    need(form == "qtool" and version in range(1, NEWEST + 1),
         f"this is format {form} version {version}; this page reads qtool up to version {NEWEST}")
    for record in manifest["tensors"]:
        if record["stored"] == "kept":
            entry, raw = stored(folder, files, record["file"], record["name"])
            yield record, elements(raw, entry["dtype"], entry["shape"])
        else:
            values = matrix(folder, files, manifest, record)
            turn = {"out_in": values, "in_out": values.T}
            yield record, np.ascontiguousarray(turn[record["orientation"]]).reshape(record["shape"])


def decode(folder):
    """All tensors: name -> array, float32 where the source was F32, F16 or BF16."""
    return {record["name"]: array for record, array in tensors(folder)}


def main(out, option="", file=""):
    for record, array in tensors(out):
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        print(record["name"], "x".join(map(str, record["shape"])), record["dtype"], digest)
    if option == "--npz":
        np.savez(file, **decode(out))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError, KeyError, TypeError) as error:
        sys.exit(f"decode.py: {type(error).__name__}: {error}")
