"""Decoded weights of the sample models: docs/decode.py against a second decode and the source."""

import json

import numpy as np
import torch
from safetensors.torch import load_file

import checkpoints
import second_decode
from harness import MODELS, decoder

# Options -> largest relative mean squared error of a tensor that plain rounding may have. For
# normal weights with absmax at 4 deviations INT8 gives (4/127)^2 / 12 = 8e-5; INT4 in groups of
# 128 with absmax at 2.7 gives (2.7/7)^2 / 12 = 1.2e-2.
INT8, INT4, INT2 = ("--bits", "8"), ("--bits", "4"), ("--bits", "2")
INT4_ZERO_POINT = ("--bits", "4", "--asymmetric", "--group-size", "32")
INT4_ABSMAX = ("--bits", "4", "--clip", "none", "--group-size", "64")
CEILING = {INT8: 5e-4, INT4: 3e-2, INT4_ZERO_POINT: 2e-2, INT4_ABSMAX: 3e-2}
DENSE, MOE = "tiny-ernie45", "tiny-ernie45-moe"


def same_bits(a, b):
    """Whether two float32 arrays have the same shape and bits."""
    return a.shape == b.shape and a.astype("<f4").tobytes() == b.astype("<f4").tobytes()


def check_weights(context, model, options, source=None, names=None, orientation="out_in"):
    """Compares every tensor of an artifact; returns its decoded tensors and a note."""
    source = source or MODELS / model
    folder = context.artifact(source, *options)
    names = names or checkpoints.linear_names(checkpoints.config(source))[0]
    base, decoded = load_file(source / "model.safetensors"), decoder().decode(folder)
    records = second_decode.manifest(folder)["tensors"]
    assert sorted(decoded) == sorted(base) and len(records) == len(base)
    found = [record["name"] for record in records if record["stored"] == "quantized"]
    assert sorted(found) == sorted(names), set(found) ^ set(names)
    worst = 0.0
    for record in records:
        name = record["name"]
        original, values = base[name].float(), torch.from_numpy(decoded[name])
        assert values.shape == original.shape, name
        if record["stored"] == "kept":
            stored = second_decode.kept(folder, record)
            assert stored.dtype == base[name].dtype and torch.equal(stored, base[name]), name
            assert same_bits(decoded[name], original.numpy()), name
            continue
        assert record["orientation"] == orientation, record
        second, codes, scales, zeros = second_decode.matrix(folder, record)
        lies = second if orientation == "out_in" else second.T
        assert same_bits(decoded[name], lies.contiguous().numpy()), name
        check_grid(record, original if orientation == "out_in" else original.T,
                   second, codes, scales, zeros)
        error = ((values.double() - original.double()).square().sum()
                 / original.double().square().sum()).item()
        worst = max(worst, error)
        assert error <= CEILING[options], (name, error)
        figure = record["figures"]["relative_mse"]
        assert abs(figure - error) <= 1e-5 * error, (name, figure, error)
    return decoded, f"{len(found)} quantized, {len(records)} in all, worst relative MSE {worst:.2e}"


def check_grid(record, original, values, codes, scales, zeros):
    """Every code is the nearest one of its grid, or an end of the grid beyond which the weight
    lies; every row uses its grid."""
    bits = int(record["scheme"][1])
    low, high = (1 if bits == 8 else 0), 2**bits - 1
    assert codes.min() >= low and codes.max() <= high, record["name"]
    position = original.double() / scales.double() + zeros
    near = (position - codes).abs() <= 0.5 + 1e-4  # float32 division may decide a tie
    beyond = ((codes == low) & (position < low)) | ((codes == high) & (position > high))
    assert bool((near | beyond).all()), (record["name"], (position - codes).abs().max())
    assert (scales > 0).all()
    distance = (codes - zeros).abs()
    assert distance.amax(dim=1).min() >= 2 ** (bits - 1) * 3 // 4, record["name"]


def test_dense_int8(context):
    return check_weights(context, DENSE, INT8)[1]


def test_dense_int4(context):
    return check_weights(context, DENSE, INT4)[1]


def test_dense_int4_with_zero_points(context):
    return check_weights(context, DENSE, INT4_ZERO_POINT)[1]


def test_dense_int4_absmax(context):
    return check_weights(context, DENSE, INT4_ABSMAX)[1]


def test_moe_int8(context):
    """Experts under a name each; router and its bias kept in F32."""
    decoded, note = check_weights(context, MOE, INT8)
    records = second_decode.manifest(context.artifact(MODELS / MOE, *INT8))["tensors"]
    routers = [r for r in records if r["dtype"] == "F32"]
    layers = [n for n in decoded if n.endswith("mlp.gate.weight")]
    assert len(layers) == 3 and len(routers) == 6, (layers, len(routers))
    assert all(r["stored"] == "kept" for r in routers)
    return note


def check_paddle(context, model, options):
    """The Paddle form of a model gives, split and turned back, the very values of the HF form."""
    source = context.paddle(model)
    about = checkpoints.config(MODELS / model)
    names = checkpoints.linear_names(about)[1]
    decoded, note = check_weights(context, model, options, source, names, "in_out")
    expected = decoder().decode(context.artifact(MODELS / model, *options))
    got = checkpoints.from_paddle(decoded, about)
    assert sorted(got) == sorted(expected), set(got) ^ set(expected)
    for name, values in expected.items():
        assert same_bits(np.ascontiguousarray(got[name]), values), name
    return f"{len(expected)} tensors equal; {note}"


def test_paddle_dense_int8(context):
    return check_paddle(context, DENSE, INT8)


def test_paddle_dense_int4(context):
    return check_paddle(context, DENSE, INT4)


def test_paddle_moe_int8(context):
    return check_paddle(context, MOE, INT8)


def test_paddle_export(context):
    """The bf16 export keeps Paddle's names, shapes and orientation."""
    source = context.paddle(DENSE)
    artifact = context.artifact(source, *INT4)
    exported = load_file(context.export(artifact) / "model.safetensors")
    decoded = decoder().decode(artifact)
    base = load_file(source / "model.safetensors")
    assert sorted(exported) == sorted(base) and len(base) == 2 + 6 * 6
    for name, tensor in exported.items():
        assert tensor.dtype == base[name].dtype and tensor.shape == base[name].shape, name
        assert torch.equal(tensor, torch.from_numpy(decoded[name]).to(tensor.dtype)), name
    return f"{len(exported)} tensors"


def test_shards_and_one_file_decode_alike(context):
    """The layout of files changes nothing."""
    whole = decoder().decode(context.artifact(MODELS / DENSE, *INT4))
    folder = context.artifact(MODELS / DENSE, *INT4, "--max-shard-size", "1MB")
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    files = set(index["weight_map"].values())
    assert len(files) > 2, files
    sharded = decoder().decode(folder)
    assert list(sharded) and sorted(sharded) == sorted(whole)
    assert all(same_bits(sharded[name], whole[name]) for name in whole)
    return f"{len(files)} shards"
