#!/usr/bin/env python3
"""Decodes a qtool artifact. Needs NumPy and nothing else of qtool: the folder explains itself.

    python decode.py OUT [--npz FILE]     prints a line a tensor: name, shape, dtype, SHA-256

OUT/qtool.json, the manifest, has a record for every tensor. It is "kept" (as it is, under its own name in the
safetensors file "file") or "quantized": stored as "parts", each a tensor with N rows, one per output. A part's
"layout" says where its elements lie: the manifest has the formula under "layouts", LAYOUTS below the reader. The
record's "scheme" names an entry of "schemes", whose "value" is the formula that makes weights of codes, known by
its SHA-256 to VALUES below. The result is an (N, K) float32 matrix; where "orientation" is "in_out", the tensor is
its transpose. The SHA-256 is of its float32 little-endian bytes, row-major (of other types: of the stored bytes).
"""
import hashlib, json, pathlib, re, sys  # noqa: E401

import numpy as np

NUMBERS = dict(BOOL="?", U8="u1", I8="i1", U16="<u2", I16="<i2", U32="<u4", I32="<i4", U64="<u8",
               I64="<i8", F64="<f8", F32="<f4", F16="<f2")

def need(condition, sentence):
    if not condition:
        raise ValueError(sentence)

def elements(raw, dtype, shape):  # F32, F16 and BF16 become float32; unknown types stay bytes
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    numbers = raw.view(NUMBERS[dtype]).reshape(shape) if dtype in NUMBERS else raw
    return numbers.astype("<f4") if dtype == "F16" else numbers

def rows(raw, part, count):
    return elements(np.ascontiguousarray(raw).ravel(), part["dtype"], (len(raw), count))
def lsb_rows(raw, part, count):  # cuts each row's stream of bits every `bits`
    bits, name = part["bits"], part["tensor"]
    need(bits in range(1, 9) and raw.shape[1] == -(-count * bits // 8), f"{name}: row length")
    stream = np.unpackbits(raw, axis=1, count=count * bits, bitorder="little")
    return np.packbits(stream.reshape(len(raw), count, bits), axis=2, bitorder="little")[:, :, 0]
def high_nibbles(raw, part, count):
    return np.stack([raw >> 4, raw & 15], axis=2).reshape(len(raw), -1)[:, :count]
def paddle_int8(raw, part, count):  # of 16 columns the first and the last eight alternate
    tiles = raw.reshape(len(raw) // 2, count // 64, 2, 4, 8, 2)  # pair, tile, row, run, k%8, k%16/8
    return tiles.transpose(0, 2, 1, 3, 5, 4).reshape(len(raw), count)
def paddle_int4(raw, part, count):  # 32 columns are four words of the nibbles 0..7
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1)
    tiles = nibbles.reshape(len(raw) // 4, count // 64, 4, 2, 4, 2, 4)  # .., k%8/2, k%2, k%32/8
    return tiles.transpose(0, 2, 1, 3, 6, 4, 5).reshape(len(raw), count)

# "columns...": the bytes of all rows of a column together; "whole": of no row, but of the weight
LAYOUTS = {"rows": rows, "lsb-rows": lsb_rows, "high-nibbles": high_nibbles, "columns": rows, "whole": rows,
           "columns-high-nibbles": high_nibbles, "paddle-int8": paddle_int8, "paddle-int4": paddle_int4}

def affine(scheme, columns, part):  # subtracts integers, so there is one rounding
    group = scheme["group"] or columns  # 0 means the whole row
    codes, scales = part("codes", columns), part("scales", columns // group)[:, :, None]
    codes, zeros = codes.reshape(*scales.shape[:2], group).astype("<i4"), scheme.get("zero_point")
    if zeros is None:  # there is one a group
        zeros = part("zero_points", columns // group)[:, :, None].astype("<i4")
    return ((codes - zeros).astype("<f4") * scales).reshape(len(codes), columns)
def wint2(scheme, columns, part):  # a byte gives a 15-bit code, a code four windows of six bits
    codes = part("codes", columns // 4) * part("code_scales", 1) + part("code_zero_points", 1)
    codes = np.floor(codes + np.float32(0.5)).astype("<i4")
    windows = ((codes[:, :, None] >> np.array([9, 6, 3, 0])) & 63).reshape(len(codes), -1, 64)
    scales = part("local_scales", columns // 64) * part("super_scales", 1)
    return ((windows - 32).astype("<f4") * scales[:, :, None]).reshape(len(codes), columns)
def wint25(scheme, columns, part):  # nine words of seven windows, one of a window and a scale
    words = part("codes", columns // 64 * 10).reshape(-1, columns // 64, 10).astype("<i4")
    windows = (words[:, :, :9, None] >> np.array([13, 11, 9, 6, 4, 2, 0])) & 7
    windows = np.append(windows.reshape(*words.shape[:2], 63), words[:, :, 9:] >> 13, axis=2)
    scales = (words[:, :, 9] & 8191).astype("<f4") * part("super_scales", 1)
    return ((windows - 4).astype("<f4") * scales[:, :, None]).reshape(len(words), columns)
def nf4(scheme, columns, part):  # levels of codes, and of scales that are codes: in the formula
    lists = re.findall(r"\[(-[^]]*)\]", scheme["value"])
    levels, *nested = [np.array(json.loads(f"[{each}]"), "<f4") for each in lists]
    scales = part("scales", columns // 64)
    if nested:
        block = (part.row * scales.shape[1] + np.arange(scales.size)) // 256
        scales = nested[0][scales] * part("nested_scales", 1)[block].reshape(scales.shape) + part("offset", 1)
    values = levels[part("codes", columns)].reshape(-1, columns // 64, 64)
    return (values * scales[:, :, None]).reshape(-1, columns)
def k_type(scheme, columns, part):  # 256 columns have two numbers, which scale those of groups
    def number(whole, local, groups=columns // scheme["group"]):
        numbers = part(local, groups).reshape(-1, columns // 256, groups * 256 // columns)
        return (part(whole, columns // 256)[:, :, None] * numbers.astype("<f4")).reshape(-1, groups, 1)
    scales, mins = number("super_scales", "local_scales"), number("super_mins", "local_mins")
    codes = part("codes", columns).reshape(*scales.shape[:2], -1).astype("<f4")
    return (scales * codes - mins).reshape(-1, columns)

VALUES = {"d09bdd37993f0963": affine, "309303d1248538bb": wint2, "7bae148bd8bbcf24": wint25,
          "da5132d817a67b1a": nf4, "5f5c83853ea8071b": nf4, "f591d358b54d5e89": k_type, "1fcd813851ced7d5": k_type}

def stored(folder, files, file, name):  # entry and bytes of a tensor: 8 bytes header length, JSON header, data
    if file not in files:
        data = np.memmap(folder / file, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        files[file] = json.loads(data[8:start].tobytes()), data[start:]
    header, data = files[file]
    begin, end = header[name]["data_offsets"]
    return header[name], np.array(data[begin:end])

def matrix(folder, files, manifest, record):  # (N, K) of a quantized record, decoded some rows at a time
    name, n, k = (record[key] for key in ("name", "rows", "columns"))
    scheme = manifest["schemes"].get(record["scheme"], {})
    formula = hashlib.sha256(scheme.get("value", "").encode()).hexdigest()[:16]
    need(formula in VALUES, f"{name}: unknown scheme {record['scheme']} {scheme}")
    parts = {}
    for part in record["parts"]:
        layout, width = part["layout"], part["row_bytes"]
        need(layout in LAYOUTS, f"{name}: unknown layout {layout}")
        entry, raw = stored(folder, files, part["file"], part["tensor"])
        need(all(entry[key] == part[key] for key in ("dtype", "shape")), f"{name}: {part} {entry}")
        need(layout == "whole" or raw.size == n * width, f"{name}: {part} of {raw.size} bytes")
        raw = raw.reshape(width, -1).T if layout.startswith("columns") else raw.reshape(-1, width)
        parts[part["role"]] = part, raw
    result = np.empty((n, k), "<f4")
    step = 16 + (1 << 22) // max(1, k) // 16 * 16  # some layouts interleave up to 16 rows
    for at in range(0, n, step):
        def part(role, count):
            need(role in parts, f"{name}: no {role}")
            (about, raw), whole = parts[role], parts[role][0]["layout"] == "whole"
            return LAYOUTS[about["layout"]](raw if whole else raw[at:at + step], about, count)
        part.row = at
        result[at:at + step] = VALUES[formula](scheme, k, part)
    return result

def tensors(folder):  # yields (record, array)
    folder, files = pathlib.Path(folder), {}
    manifest = json.loads((folder / "qtool.json").read_text("utf-8"))
    made = "{format} version {version}".format(**manifest)
    need(made == "qtool version 1", f"this is format {made}; this page reads qtool up to version 1")
    for record in manifest["tensors"]:
        if record["stored"] == "kept":
            entry, raw = stored(folder, files, record["file"], record["name"])
            yield record, elements(raw, entry["dtype"], entry["shape"])
        else:
            values = matrix(folder, files, manifest, record)
            values = {"out_in": values, "in_out": values.T}[record["orientation"]]
            yield record, np.ascontiguousarray(values).reshape(record["shape"])

def decode(folder):  # name -> array
    return {record["name"]: array for record, array in tensors(folder)}

if __name__ == "__main__":
    try:
        for about, array in tensors(sys.argv[1]):
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            print(about["name"], "x".join(map(str, about["shape"])), about["dtype"], digest)
        if sys.argv[2:3] == ["--npz"]:
            np.savez(sys.argv[3], **{about["name"]: array for about, array in tensors(sys.argv[1])})
    except (IndexError, ValueError, OSError, KeyError, TypeError) as error:
        sys.exit(f"decode.py: {type(error).__name__}: {error}")
