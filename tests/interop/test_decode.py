"""docs/decode.py on artifacts written by hand, against values computed by hand or one by one."""

import ast
import hashlib
import struct
import subprocess
import sys

import numpy as np

import handmade
from harness import ROOT, decoder, refused


def test_values_by_hand(context):
    folder = context.new("by-hand")
    norm = handmade.float_bytes([1.0, -0.5, 3.25], "BF16")
    handmade.write(folder, [
        # (0 - 8) * 0.5, (8 - 8) * 0.5, (15 - 8) * 0.5, (9 - 8) * 0.5; then scale 2
        handmade.quantized("a", [[0, 8, 15, 9], [0, 8, 15, 9]], [[0.5], [2.0]], 4),
        # two groups of two columns, zero points 3 and 0, stored as its transpose
        handmade.quantized("b", [[0, 3, 1, 2]], [[0.25, 4.0]], 2, zeros=[[3, 0]], group=2,
                           scale_dtype="F16", orientation="in_out"),
        # INT8, middle 128
        handmade.quantized("c", [[1, 128, 255]], [[0.125]], 8, scale_dtype="F32"),
        handmade.kept("norm", "BF16", [3], norm),
        handmade.kept("half", "F16", [1, 2], struct.pack("<ee", 0.5, -65504.0)),
        handmade.kept("ids", "I64", [2], struct.pack("<qq", -1, 7)),
        handmade.kept("tiny", "F8_E4M3", [3], b"\x01\x02\x03"),
    ])
    expected = {
        "a": [[-4.0, 0.0, 3.5, 0.5], [-16.0, 0.0, 14.0, 2.0]],
        "b": [[-0.75], [0.0], [4.0], [8.0]],
        "c": [[-15.875, 0.0, 15.875]],
        "norm": [1.0, -0.5, 3.25],
        "half": [[0.5, -65504.0]],
        "ids": [-1, 7],
        "tiny": [1, 2, 3],
    }
    decoded = decoder().decode(folder)
    assert list(decoded) == list(expected), list(decoded)
    for name, values in expected.items():
        assert decoded[name].tolist() == values, (name, decoded[name])
    assert all(decoded[name].dtype == np.float32 for name in ("a", "b", "c", "norm", "half"))
    assert decoded["ids"].dtype == np.int64 and decoded["tiny"].dtype == np.uint8
    return f"{len(expected)} tensors"


def test_every_width_and_row_length(context):
    """Codes of 1 to 8 bits; columns that fill no whole byte; the formula applied one by one."""
    cases = 0
    for bits in range(1, 9):
        for k in (1, 2, 3, 5, 8, 31, 33, 64):
            for grid in ("sym", "zp"):
                for group in {0, 1, k // 2 if k % 2 == 0 else 0}:
                    check_one(context.new("widths"), bits, k, grid, group)
                    cases += 1
    assert cases > 256, cases
    return f"{cases} artifacts"


def check_one(folder, bits, k, grid, group):
    n, top = 3, (1 << bits) - 1
    groups = k // group if group else 1
    codes = handmade.random_codes(bits * 100 + k, n, k, 0, top)
    zeros = handmade.random_codes(k, n, groups, 0, top) if grid == "zp" else None
    scales = [[(1 + 2 * g + r) / 64 for g in range(groups)] for r in range(n)]
    handmade.write(folder, [handmade.quantized("w", codes, scales, bits, zeros=zeros, group=group,
                                               scale_dtype="F16")])
    got = decoder().decode(folder)["w"]
    for r in range(n):
        for c in range(k):
            g = c // group if group else 0
            zero = zeros[r][g] if zeros else 1 << (bits - 1)
            assert got[r, c] == (codes[r][c] - zero) * scales[r][g], (bits, k, grid, group, r, c)


def test_arithmetic_is_float32_rounded_once(context):
    """Scales whose products have no exact float32: compared as bits with struct's rounding."""
    scales = [[struct.unpack("<f", struct.pack("<f", 0.1 * 1.7**i))[0]] for i in range(64)]
    codes = handmade.random_codes(1, 64, 256, 1, 255)
    folder = context.new("rounding")
    handmade.write(folder, [handmade.quantized("w", codes, scales, 8, scale_dtype="F32")])
    got = decoder().decode(folder)["w"]
    inexact = 0
    for row, (scale,), values in zip(codes, scales, got):
        exact = [(code - 128) * scale for code in row]  # 8 x 24 bits fit a double
        assert values.tobytes() == struct.pack("<256f", *exact)
        inexact += sum(struct.unpack("<f", struct.pack("<f", v))[0] != v for v in exact)
    assert inexact > 1000, inexact
    return f"{inexact} rounded products"


def test_many_rows_and_three_dimensions(context):
    """More weights than are decoded at a time, of a source with three dimensions."""
    n, k = 1026, 4100
    codes = np.random.default_rng(5).integers(1, 256, (n, k))
    scales = [[2.0 ** -(r % 8)] for r in range(n)]
    folder = context.new("many")
    handmade.write(folder, [handmade.quantized("w", codes, scales, 8, shape=[2, n // 2, k])])
    got = decoder().decode(folder)["w"]
    assert got.shape == (2, n // 2, k)
    assert np.array_equal(got.reshape(n, k), (codes - 128) * np.array(scales))
    return f"{n} x {k}"


def test_refusals(context):
    """What a decoder must not guess at."""
    tensor = handmade.quantized("w", [[1, 2, 3, 4]], [[1.0]], 4)
    other = {"value": "value[n][k] = table[code[n][k]]", "bits": 4, "group": 0}
    cases = {
        "version": {"version": 2},
        "format": {"format": "other"},
        "scheme": {"schemes": {tensor["scheme"]: other}},
        "no scheme": {"schemes": {}},
    }
    for name, change in cases.items():
        folder = context.new("refused")
        handmade.write(folder, [tensor], **change)
        message = refused(lambda: decoder().decode(folder))
        word = name.split()[-1]
        assert word in message, (name, message)
    folder = context.new("refused")
    handmade.write(folder, [tensor])
    path = folder / "qtool.json"
    good = path.read_text()
    edits = [('"orientation": "out_in"', '"orientation": "sideways"'), ('"bits": 4', '"bits": 5'),
             ('"layout": "lsb-rows"', '"layout": "tiles"'), ('"role": "scales"', '"role": "x"'),
             ('"columns": 4', '"columns": 8'), ('"rows": 1', '"rows": 2'),
             ('"tensor": "w.codes"', '"tensor": "w.other"'), ('"dtype": "U8"', '"dtype": "I8"')]
    for before, after in edits:
        assert before in good, before
        path.write_text(good.replace(before, after))
        refused(lambda: decoder().decode(folder))
    return f"{len(cases) + len(edits)} refusals"


def test_command_line(context):
    """One line a tensor; --npz; a sentence and status 1 for what is no artifact."""
    folder = context.new("command")
    handmade.write(folder, [handmade.quantized("w", [[9, 8], [0, 15]], [[1.0], [2.0]], 4),
                            handmade.kept("norm", "BF16", [1], b"\x80\x3f")])
    command = [sys.executable, ROOT / "docs" / "decode.py"]
    npz = folder / "all.npz"
    ran = subprocess.run([*command, folder, "--npz", npz], capture_output=True, text=True,
                         check=True)
    digest = hashlib.sha256(struct.pack("<4f", 1, 0, -16, 14)).hexdigest()
    one = hashlib.sha256(struct.pack("<f", 1)).hexdigest()
    assert ran.stdout == f"w 2x2 BF16 {digest}\nnorm 1 BF16 {one}\n", ran.stdout
    assert np.load(npz)["w"].tolist() == [[1, 0], [-16, 14]]
    newer = context.new("command")
    handmade.write(newer, [], version=2)
    for arguments in ([folder.parent], [newer], []):
        ran = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert ran.returncode == 1 and ran.stderr.startswith("decode.py: "), ran
        assert len(ran.stderr.splitlines()) == 1, ran.stderr
    return "2 tensors, 3 refusals"


def test_decoder_is_small(_context):
    """It has to stay readable, and to need nothing but NumPy."""
    lines = (ROOT / "docs" / "decode.py").read_text("utf-8").splitlines()
    nodes = list(ast.walk(ast.parse("\n".join(lines))))
    imports = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imports += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert imports
    assert len(lines) < 165, len(lines)
    assert set(imports) <= {"hashlib", "json", "re", "sys", "pathlib", "numpy"}, imports
    # A formula is known by its digest: one that the manifest states otherwise is refused.
    assert hashlib.sha256(handmade.AFFINE.encode()).hexdigest()[:16] in "".join(lines)
    return f"{len(lines)} lines"
