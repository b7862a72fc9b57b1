"""WINT2 decoded a second time, in NumPy and integers, from the format's specification alone, by both of
FastDeploy's arithmetics; compared bit for bit with qtool's exports of the sample models.

The specification, for K inputs and N output channels (FastDeploy's tensors):

    quant_weight [K/4, N]      weight_scale [K/128, N]      super_scales, code_scale, code_zp [N]
    code     = floor(quant_weight[k / 4][n] * code_scale[n] + code_zp[n] + 0.5)
    w        = ((code >> (9, 6, 3, 0)[k % 4]) & 63) - 32
    local    = (weight_scale[k / 128][n] >> (4 if k / 64 is even else 0)) & 15
    (a) W    = bf16(w * (local * super))               code by multiply, add, add in float32
    (b) W    = bf16(w * bf16(local * super))           code by fma(byte, code_scale, code_zp + 0.5)
"""

import hashlib
import json

import numpy as np

import harness

MEMBERS = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
PATHS = ("a", "b")
EXPORTS = {"a": "bf16", "b": "bf16-gemm"}
EXPERTS, LAYERS = 8, 3


def to_bf16(values):
    """The bits of float32 values rounded to bfloat16, nearest, ties to even; no NaN comes here."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not ((bits & 0x7FFFFFFF) > 0x7F800000).any(), "NaN"
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits):
    """The float32 values of bfloat16 bits."""
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def codes(byte, slope, offset, path):
    """The 15-bit codes of bytes [R, N], channels with `slope` and `offset` [N]."""
    half = np.float32(0.5)
    if path == "a":
        value = byte.astype(np.float32) * slope + offset + half
    else:
        # A product of 8 and 24 significant bits is exact in float64, and so is the sum unless it spans more
        # than 53 bits, which is checked; rounding it once to float32 is then the fused multiply-add.
        product, added = byte.astype(np.float64) * slope.astype(np.float64), (offset + half).astype(np.float64)
        total = product + added
        back = total - product
        lost = (product - (total - back)) + (added - back)
        assert not lost.any(), "float64 does not hold byte * code_scale + code_zp"
        value = total.astype(np.float32)
    assert value.dtype == np.float32
    return np.floor(value).astype(np.int64)


def decode(tensors, path):
    """The bfloat16 bits [K, N] of the five tensors of one weight."""
    byte, nibbles, scale, slope, offset = tensors
    rows, n = byte.shape
    k = np.arange(4 * rows)
    shift = np.array([9, 6, 3, 0])[k % 4]
    window = (codes(byte, slope, offset, path)[k // 4] >> shift[:, None]) & 63
    weight = (window - 32).astype(np.float32)
    pair = nibbles.astype(np.int64)[k // 128]
    local = np.where((k // 64 % 2 == 0)[:, None], pair >> 4, pair & 15).astype(np.float32)
    group = local * from_bf16(scale)
    if path == "b":
        group = from_bf16(to_bf16(group))
    assert weight.shape == group.shape == (4 * rows, n)
    return to_bf16(weight * group)


def safetensors(path):
    """Every tensor of a file as (dtype tag, array); BF16 as its bits."""
    kinds = {"U8": "u1", "I8": "i1", "BF16": "<u2", "F32": "<f4"}
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(raw[start + begin:start + end], kinds[entry["dtype"]])
        found[name] = (entry["dtype"], array.reshape(entry["shape"]))
    return found


def exported(context, folder, path):
    """The tensors of an export of `folder` by the arithmetic `path`."""
    out = context.new(f"wint2-{path}")
    context.run("export", folder, "--to", EXPORTS[path], "-o", out)
    return safetensors(out / "model.safetensors")


def differing(first, second):
    """Values in which the arithmetics differ; fails when one differs by more than one step of bfloat16."""
    steps = [np.where(bits < 0x8000, bits, 0x8000 - bits) for bits in (first.astype(int), second.astype(int))]
    apart = np.abs(steps[0] - steps[1])
    assert apart.max() <= 1, apart.max()
    return int(np.count_nonzero(apart))


def test_known_answers(_):
    """The three vectors of the specification, and its values written out."""
    r, n = np.arange(32)[:, None], np.arange(8)
    byte = ((37 * r + 101 * n + 11) % 256).astype(np.uint8)
    assert hashlib.sha256(byte.tobytes()).hexdigest() == (
        "af458cdaee5b3441dc1a93a7aa38ac6b75c4079d871db81a7acbf577b51d96e1")
    nibbles = ((29 * n + 147) % 256).astype(np.uint8)[None]
    v1 = "cd92eebca2eab935e9b22505d15b2d0f44ebdbb869d60dd9e3dd2d650447cde8"
    v2 = "95654c7fca7846d3482712f321c40d63666f0efe612ae28cb595911a307b7742"
    vectors = [
        (0x3B00 + 16 * n, 128 - n, 3 * n, v1, v1),
        (0x3B00 + 16 * n, 128.5 - 0.25 * n, 0.25 * n, v2, v2),
        (0x3B01 + 15 * n, 120 + 0 * n, 604 + n,
         "96e7e6135cf7eac562c8f78fcad912eb3079ae31062a1342cf6149dfd03b7f08",
         "32e8c262dd0e37d7ffb633cb6ef2fdcaa34139dba2ef7b48b6f58dabb85bbbb9"),
    ]
    for scale, slope, offset, *hashes in vectors:
        floats = slope.astype(np.float32), offset.astype(np.float32)
        for path, expected in zip(PATHS, hashes):
            bits = decode((byte, nibbles, scale.astype(np.uint16), *floats), path)
            assert hashlib.sha256(bits.astype("<u2").tobytes()).hexdigest() == expected, (path, expected)
    bits = [decode((byte, nibbles, scale.astype(np.uint16), *floats), path) for path in PATHS]
    assert differing(*bits) == 157 and (bits[0][0, 0], bits[1][0, 0]) == (0xBF04, 0xBF03)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert to_bf16(ties).tolist() == [0x3F80, 0x3F82, 0xBF80, 0x3F81]
    return f"{len(vectors)} vectors, {len(PATHS)} arithmetics"


def test_experts_of_a_fastdeploy_folder(context):
    """Every expert weight of the sample mixture, its tensors found by name, both arithmetics."""
    notes = []
    for effort in ("fast", "default", "best"):
        folder = context.new(f"wint2-{effort}")
        context.run("quantize", harness.MODELS / "tiny-ernie45-moe", "-o", folder,
                    "--format", "fastdeploy", "--bits", 2, "--effort", effort)
        stored = safetensors(folder / "model.safetensors")
        ours = {path: exported(context, folder, path) for path in PATHS}
        weights = values = apart = 0
        for layer in range(1, 1 + LAYERS):
            for expert in range(EXPERTS):
                for projection in ("up_gate_proj", "down_proj"):
                    name = f"ernie.layers.{layer}.mlp.experts.{expert}.{projection}"
                    members = [stored.pop(f"{name}.{member}") for member in MEMBERS]
                    assert [tag for tag, _ in members] == ["U8", "U8", "BF16", "F32", "F32"], name
                    tensors = [array for _, array in members]
                    decoded = {path: decode(tensors, path) for path in PATHS}
                    for path in PATHS:
                        tag, rust = ours[path][f"{name}.weight"]
                        assert tag == "BF16" and np.array_equal(rust, decoded[path]), (name, path)
                    apart += differing(decoded["a"], decoded["b"])
                    values += decoded["a"].size
                    weights += 1
        assert weights == EXPERTS * LAYERS * 2, weights
        assert not any(name.endswith("super_scales") for name in stored), "more WINT2 than looked at"
        assert ours["a"].keys() == ours["b"].keys()
        for name, (_, rest) in ours["a"].items():
            if ".experts." not in name:
                assert np.array_equal(rest, ours["b"][name][1]), name
        assert effort == "fast" or apart, "the arithmetics never differ: nothing was told apart"
        notes.append(f"{effort}: {weights} weights, {apart} of {values} values differ by a step")
    return "; ".join(notes)


def test_own_form_with_an_odd_number_of_groups(context):
    """Our own artifact, channels as rows: 704 columns are 11 groups, the last low nibble is zero."""
    folder = context.artifact(harness.MODELS / "tiny-ernie45", "--bits", "2")
    stored = safetensors(folder / "model.safetensors")
    ours = {path: exported(context, folder, path) for path in PATHS}
    endings = ("codes", "local_scales", "super_scales", "code_scales", "code_zero_points")
    weights = odd = apart = values = 0
    for name, (_, rust) in ours["a"].items():
        if f"{name}.codes" not in stored:
            continue
        codes_, nibbles, *channel = (stored[f"{name}.{ending}"][1] for ending in endings)
        tensors = [codes_.T, nibbles.T, *(numbers.ravel() for numbers in channel)]
        decoded = {path: decode(tensors, path) for path in PATHS}
        for path in PATHS:
            assert np.array_equal(ours[path][name][1], decoded[path].T), (name, path)
        groups = rust.shape[1] // 64
        assert nibbles.shape[1] == (groups + 1) // 2, name
        if groups % 2:
            assert not (nibbles[:, -1] & 15).any() and (nibbles[:, -1] >> 4).any(), name
            odd += 1
        apart += differing(decoded["a"], decoded["b"])
        values += rust.size
        weights += 1
    assert (weights, odd) == (42, 6), (weights, odd)
    return f"{weights} weights, {odd} with an odd number of groups; {apart} of {values} values differ by a step"
