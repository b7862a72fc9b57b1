"""Folders made for FastDeploy: what its loader asks for, from sample models in both name families and
from a full-size 0.3B; and the second decode of one of them (fastdeploy_loader.py says where its rules
come from; fastdeploy_paddle.py, which needs Paddle, is run by hand)."""

import fastdeploy_loader
import fastdeploy_models
import harness

import numpy as np

WAYS = {
    "tiny-ernie45": [["--bits", 8], ["--bits", 4]],
    "tiny-ernie45-moe": [["--bits", 4], ["--bits", 2], ["--bits", 2, "--w4-until", 1]],
}


def check(context, source, *options):
    """Makes a folder, verifies it against its source, and asks the loader; returns the folder."""
    out = context.new("fastdeploy")
    context.run("quantize", source, "-o", out, "--format", "fastdeploy", *options)
    context.run("verify", out, "--base", source)
    faults, tensors, _ = fastdeploy_loader.check(out)
    assert not faults, faults[:5]
    assert tensors > 10, tensors
    return out


def test_sample_models_are_what_the_loader_asks_for(context):
    folders = 0
    for model, ways in WAYS.items():
        for options in ways:
            hf = check(context, harness.MODELS / model, *options)
            paddle = check(context, context.paddle(model), *options)
            same = [(folder / "model.safetensors").read_bytes() for folder in (hf, paddle)]
            assert same[0] == same[1], (model, options)
            folders += 2
    assert folders == 10
    return f"{folders} folders, equal from both families"


def test_full_size_dense(context):
    source = context.new("0.3b")
    fastdeploy_models.write("0.3b", source, weights="zero")
    sizes = []
    for options in (["--bits", 8], ["--bits", 4], ["--bits", 4, "--tensor-parallel", 2]):
        out = context.new("fastdeploy")
        context.run("quantize", source, "-o", out, "--format", "fastdeploy", *options)
        faults, _, size = fastdeploy_loader.check(out)
        assert not faults, faults[:5]
        sizes.append(size)
    return f"bytes of tensors {sizes}"


def test_the_loader_check_finds_what_is_wrong(context):
    out = check(context, harness.MODELS / "tiny-ernie45", "--bits", 8)
    config = (out / "config.json").read_text()
    for change, fault in (
        (('"intermediate_size": 704', '"intermediate_size": 768'), "asked for"),
        (('"num_hidden_layers": ', '"num_hidden_layers": 1'), "is missing"),
        (('"is_quantized": true', '"is_quantized": false'), "is_quantized"),
        (('"dtype"', '"torch_dtype"'), "dtype is not bfloat16"),
    ):
        assert change[0] in config, change
        (out / "config.json").write_text(config.replace(*change))
        faults, _, _ = fastdeploy_loader.check(out)
        assert any(fault in found for found in faults), (change, faults[:3])


def test_decode_py_reads_interleaved_rows(context):
    decoder, compared = harness.decoder(), 0
    for model, bits in (("tiny-ernie45", 8), ("tiny-ernie45", 4), ("tiny-ernie45-moe", 4)):
        out = check(context, harness.MODELS / model, "--bits", bits)
        f32 = context.new("f32")
        context.run("export", out, "--to", "f32", "-o", f32)
        entries = fastdeploy_loader.header(f32 / "model.safetensors", [])
        raw = (f32 / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for record, array in decoder.tensors(out):
            if record["stored"] == "quantized":
                begin, end = entries[record["name"]]["data_offsets"]
                theirs = np.frombuffer(raw[start + begin:start + end], "<u4")
                assert np.array_equal(theirs, array.ravel().view("<u4")), record["name"]
                compared += 1
    assert compared > 50, compared
    return f"{compared} weights equal bit for bit"
