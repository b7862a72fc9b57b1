#!/usr/bin/env python3
"""The checks of test_ecosystem.py on a real model, run by hand: minutes each.

    python tests/interop/real_model.py --qtool target/release/qtool --model FOLDER [--check NAME ...] [--gguf FILE --text TEXT]

FOLDER holds a decoder that transformers knows, whose rows the formats can hold; docs/benchmarks/quality prepares one. Each
check quantizes it, exports it, loads the export with its ecosystem's library, compares every decoded weight, logits, and
where the library computes in f32 a reply of 20 tokens. Prints a row of the table of docs/formats/README.md a check.

With --gguf, a file of the same model that somebody else quantized is read instead: errors of every tensor by `qtool verify
--base` against gguf-py's decoding, perplexity by `qtool validate` against transformers with these values, and `qtool export
--to f32` against transformers' own reading of the file, parameter by parameter.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.dont_write_bytecode = True

import harness  # noqa: E402
import test_ecosystem as eco  # noqa: E402

INT4_32 = ("--bits", "4", "--group-size", "32", *eco.F16)
INT4_32_ZP = (*INT4_32, "--asymmetric", "--scale-bits", "7")
INT8_32 = ("--bits", "8", "--group-size", "32", *eco.F16)
CHECKS = {
    "compressed-tensors-int8": lambda c: eco.check_compressed_tensors(c, eco.INT8),
    "compressed-tensors-int4": lambda c: eco.check_compressed_tensors(c, eco.INT4),
    "compressed-tensors-int2": lambda c: eco.check_compressed_tensors(c, eco.INT2),
    "gptq": lambda c: eco.check_gptqmodel(c, eco.INT4, "gptq"),
    "gptq-int8": lambda c: eco.check_gptqmodel(c, eco.INT8, "gptq"),
    "gptq-v2": lambda c: eco.check_gptqmodel(c, eco.INT4_ZP, "gptq-v2"),
    "awq": lambda c: eco.check_gptqmodel(c, eco.INT4_ZP, "awq"),
    "bnb-nf4": lambda c: eco.check_bnb_nf4(c, "nf4"),
    "bnb-nf4-dq": lambda c: eco.check_bnb_nf4(c, "nf4-dq"),
    "gguf-q4_0": lambda c: eco.check_gguf(c, eco.MODELS / eco.DENSE, INT4_32, {"Q4_0"}),
    "gguf-q4_1": lambda c: eco.check_gguf(c, eco.MODELS / eco.DENSE, INT4_32_ZP, {"Q4_1"}),
    "gguf-q8_0": lambda c: eco.check_gguf(c, eco.MODELS / eco.DENSE, INT8_32, {"Q8_0"}),
}


def check_file_of_others(context, file):
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    import test_imports as imports

    imports.MODELS, imports.DENSE = eco.MODELS, eco.DENSE
    config = json.loads((eco.MODELS / eco.DENSE / "config.json").read_text("utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    decoded = {}
    model = AutoModelForCausalLM.from_pretrained(eco.MODELS / eco.DENSE, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        tensor = tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(parameter.shape)
        if "q_proj" in name or "k_proj" in name:
            value = eco.unpaired(value, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        decoded[name] = torch.from_numpy(value.copy())
    imports.check_figures(context, file, decoded, len(tensors))
    out = context.new("f32")
    context.run("export", file, "--to", "f32", "-o", out)
    for folder, options in ((out, {}), (file.parent, {"gguf_file": file.name})):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        for name, value in model.named_parameters():
            assert torch.equal(value, decoded[name]), (folder, name)
        del model
    return f"{len(decoded)} tensors; {imports.check_perplexity(context, file, decoded)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qtool", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--check", action="append", choices=CHECKS)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    model = args.model.resolve()
    eco.MODELS, eco.DENSE = model.parent, model.name
    if args.gguf:
        texts = {"heldout.en": args.text.read_text("utf-8"), "heldout.zh": ""}
        with tempfile.TemporaryDirectory(prefix="qtool-real-") as folder:
            print(check_file_of_others(harness.Context(folder, args.qtool.resolve(), texts), args.gguf.resolve()))
        return
    failed = 0
    for name in args.check or CHECKS:
        with tempfile.TemporaryDirectory(prefix="qtool-real-") as folder:
            context = harness.Context(folder, args.qtool.resolve(), {})
            start, before = time.monotonic(), len(eco.ROWS)
            try:
                note = CHECKS[name](context)
            except Exception as error:  # the others are still to be run
                failed += 1
                print(f"FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
        for row in eco.ROWS[before:]:
            print(f"| `{row[0]}` | `{row[1]}` | {' | '.join(row[2:])} | {note}, {time.monotonic() - start:.0f} s |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
