"""A second way from the stored bytes to the weights: the safetensors library, torch, a row at a
time, nibbles taken apart by hand. Shares no line with docs/decode.py. INT8 and INT4 only.
"""

import json

import torch
from safetensors import safe_open


def manifest(folder):
    """The parsed qtool.json."""
    return json.loads((folder / "qtool.json").read_text("utf-8"))


def part(folder, record, role):
    """A stored part as the library reads it."""
    found = [p for p in record["parts"] if p["role"] == role]
    assert len(found) == 1, (record["name"], role, record["parts"])
    assert found[0]["tensor"] == f"{record['name']}.{role}"
    with safe_open(folder / found[0]["file"], "pt") as file:
        return file.get_tensor(found[0]["tensor"])


def kept(folder, record):
    """A kept tensor as the library reads it."""
    with safe_open(folder / record["file"], "pt") as file:
        return file.get_tensor(record["name"])


def codes_of_row(stored, bits, count):
    """One row of stored bytes -> its codes as int32."""
    stored = stored.to(torch.int32)
    if bits == 4:
        stored = torch.stack([stored % 16, stored // 16], dim=1).flatten()
    else:
        assert bits == 8, bits
    return stored[:count]


def matrix(folder, record):
    """(values, codes, scales, zero points), each (N, K): for every weight, its own."""
    scheme = record["scheme"].split("-")  # w4-sym-g128-bf16
    bits, n, k = int(scheme[0][1:]), record["rows"], record["columns"]
    group = k if scheme[2] == "row" else int(scheme[2][1:])
    stored, stored_scales = part(folder, record, "codes"), part(folder, record, "scales")
    assert stored.dtype == torch.uint8 and stored.shape == (n, k * bits // 8), stored.shape
    assert stored_scales.shape == (n, k // group), stored_scales.shape
    stored_zeros = part(folder, record, "zero_points") if scheme[1] == "zp" else None
    codes, scales, zeros = [], [], []
    for row in range(n):
        codes.append(codes_of_row(stored[row], bits, k))
        scales.append(stored_scales[row].float().repeat_interleave(group))
        if stored_zeros is None:
            zeros.append(torch.full((k,), 2 ** (bits - 1), dtype=torch.int32))
        else:
            zeros.append(codes_of_row(stored_zeros[row], bits, k // group).repeat_interleave(group))
    codes, scales, zeros = torch.stack(codes), torch.stack(scales), torch.stack(zeros)
    return (codes - zeros).float() * scales, codes, scales, zeros
