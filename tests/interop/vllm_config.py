#!/usr/bin/env python3
"""Exports in vLLM's own configuration and loading code, run by hand on a machine without a GPU; no kernel is run.

    pip install --no-deps -r tests/interop/requirements-vllm.txt       (large; see there)
    python tests/interop/vllm_config.py --qtool target/release/qtool

tiny-ernie45 is quantized by each recipe and exported. For each export vLLM's class for its `quantization_config` reads it; builds
every linear layer of the model, query, key and value in one and gate and up in one, as vLLM runs them, for a GPU of capability
9.0; vLLM's loaders put every stored tensor into place, and none is left over; and the layers' weights, unpacked by vLLM's own
functions in PyTorch, are docs/decode.py's, exactly. What vLLM refuses is a row with its words. vllm_stub.py says what is
put in the GPU's place. Prints a row of the table of docs/formats/vllm.md a case; status 1 when one fails.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.dont_write_bytecode = True

import torch  # noqa: E402
import vllm  # noqa: E402
import vllm_stub  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS  # noqa: E402
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig  # noqa: E402
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig  # noqa: E402

import harness  # noqa: E402

DENSE, MOE = "tiny-ernie45", "tiny-ernie45-moe"
F16 = ("--scale-dtype", "f16")
INT8 = ("--bits", "8")
INT4 = ("--bits", "4", "--group-size", "64")
ZERO_POINTS = (*INT4, "--asymmetric", *F16)
INT3 = ("--bits", "3", "--group-size", "64", *F16)
INT2 = ("--bits", "2", "--method", "mse", "--group-size", "64")
MIXED = (*INT4, "--rule", "down_proj=bits:8,group:row", "--skip", r"layers\.0\.mlp")
KEPT = (*INT4, "--skip", r"layers\.0\.mlp")
ACT_ORDER = harness.ROOT / "tests" / "golden" / "imports" / "gptq-act-order"  # a model of GPTQModel, exported again
# Model, format, recipe or model of others, what vLLM chooses, or a part of the sentence with which it refuses.
CASES = [
    (DENSE, "compressed-tensors", INT8, "CompressedTensorsWNA16"),
    (DENSE, "compressed-tensors", INT4, "CompressedTensorsWNA16"),
    (DENSE, "compressed-tensors", ZERO_POINTS, "CompressedTensorsWNA16"),
    (DENSE, "compressed-tensors", INT3, "CompressedTensorsWNA16"),
    (DENSE, "compressed-tensors", INT2, "CompressedTensorsWNA16"),
    (DENSE, "compressed-tensors", MIXED, "CompressedTensorsWNA16"),
    (DENSE, "compressed-tensors-int8", INT8, "CompressedTensorsW8A8Int8"),
    (DENSE, "gptq", INT8, "AutoGPTQLinearMethod"),
    (DENSE, "gptq", INT4, "AutoGPTQLinearMethod"),
    (DENSE, "gptq", KEPT, "AutoGPTQLinearMethod"),
    (DENSE, "gptq", INT3, "refuses: Unsupported quantization config: bits=3"),
    (DENSE, "gptq", INT2, "refuses: Unsupported quantization config: bits=2"),
    (DENSE, "gptq-v2", INT4, "AutoGPTQLinearMethod"),
    (DENSE, "gptq-v2", ZERO_POINTS, "refuses: Unsupported quantization config: bits=4, sym=False"),
    (DENSE, "gptq", ACT_ORDER, "refuses: GPTQ group activation ordering (desc_act=True) is no longer supported"),
    (DENSE, "awq", INT4, "AutoAWQMarlinLinearMethod"),
    (DENSE, "awq", ZERO_POINTS, "AutoAWQMarlinLinearMethod"),
    (DENSE, "awq", KEPT, "AutoAWQMarlinLinearMethod"),
    (DENSE, "bnb-nf4", ("--bits", "4", "--method", "nf4-dq"), "refuses: no method of this name"),
    (MOE, "compressed-tensors", INT4, "CompressedTensorsWNA16 CompressedTensorsWNA16MoEMethod"),
    (MOE, "compressed-tensors-int8", INT8, "CompressedTensorsW8A8Int8 CompressedTensorsW8A8Int8MoEMethod"),
    (MOE, "gptq", INT4, "AutoGPTQLinearMethod AutoGPTQMoEMethod"),
    (MOE, "awq", ZERO_POINTS, "AutoAWQMarlinLinearMethod AutoAWQMoEMethod"),
]


def configured(folder):
    """vLLM's configuration for a folder, made as its engine makes it."""
    quantization = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    name = quantization["quant_method"]
    if name not in QUANTIZATION_METHODS:
        raise ValueError(f"no method of this name, {name}")
    claims = [kind for kind in (AutoGPTQConfig, AutoAWQConfig) if kind.override_quantization_method(quantization, None)]
    kind = claims[0] if claims else CompressedTensorsConfig
    assert claims or name == "compressed-tensors", name
    made = kind.from_config(quantization)
    made.maybe_update_config(str(folder))
    made.packed_modules_mapping = vllm_stub.FUSED
    return made


def placed_linears(layers, stored, decoded, dtype):
    """Loads linear layers; returns (classes chosen, kernels chosen, tensors placed, weights that were compared)."""
    chosen, kernels, placed, equal = set(), set(), 0, 0
    for prefix, layer, shards in layers:
        method = getattr(layer, "scheme", None) or layer.quant_method
        chosen.add(type(method).__name__)
        kernels.add(type(getattr(method, "kernel", None)).__name__)
        for module, shard in shards:
            for parameter, value in layer.named_parameters():
                value.weight_loader(value, stored.pop(f"{module}.{parameter}"), *([] if shard is None else [shard]))
                placed += 1
        expected = torch.cat([torch.from_numpy(decoded[f"{module}.weight"]) for module, _ in shards])
        if type(method).__name__ == "UnquantizedLinearMethod":
            expected = expected.to(dtype).float()
        got = vllm_stub.decoded(vllm_stub.parts(layer), *expected.shape, *vllm_stub.meaning(method))
        assert got is None or torch.equal(got, expected), (prefix, (got - expected).abs().max())
        equal += 0 if got is None else len(shards)
    return chosen, kernels, placed, equal


def placed_experts(layers, stored, decoded):
    """The same of experts, whose kernels vLLM chooses later."""
    chosen, placed, equal = set(), 0, 0
    for prefix, layer in layers:
        method = layer.routed_experts.quant_method
        chosen.add(type(method).__name__)
        own = [name for name in stored if name.startswith(f"{prefix}.")]
        loaded = list(layer.load_weights((name.removeprefix(f"{prefix}."), stored.pop(name)) for name in own))
        assert len(loaded) == len(own), (len(loaded), len(own))
        placed += len(own)
        for expert in range(layer.routed_experts.global_num_experts):
            for part, names in (("w13_", ["gate_proj", "up_proj"]), ("w2_", ["down_proj"])):
                expected = torch.cat([torch.from_numpy(decoded[f"{prefix}.{expert}.{name}.weight"]) for name in names])
                parameters = vllm_stub.parts(layer.routed_experts, expert, part)
                got = vllm_stub.decoded(parameters, *expected.shape, *vllm_stub.meaning(method))
                assert torch.equal(got, expected), (prefix, expert, part, (got - expected).abs().max())
                equal += len(names)
    return chosen, placed, equal


def checked(context, model, name, recipe):
    """Loads an export layer by layer; returns (classes chosen, kernels chosen, what was found)."""
    artifact = recipe if recipe == ACT_ORDER else context.artifact(harness.MODELS / model, *recipe)
    folder = context.new(name)
    context.run("export", artifact, "--to", name, "-o", folder)
    quantization = configured(folder)
    decoded = harness.decoder().decode(artifact)
    # Of GPTQ and AWQ scales are F16, and so is what vLLM computes with when told --dtype float16.
    dtype = torch.bfloat16 if name.startswith("compressed") and "f16" not in recipe else torch.float16
    dropped = quantization.get_checkpoint_weight_mapper()
    apart = ("norm", "mlp.gate.weight", "moe_statics")  # what no format quantizes
    stored = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()
              if ".layers." in key and not any(word in key for word in apart) and dropped._map_name(key) is not None}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    matrices = len({key.rsplit(".", 1)[0] for key in stored})
    routed, tensors, compared = placed_experts(vllm_stub.experts(config, quantization, dtype), stored, decoded)
    chosen, kernels, placed, equal = placed_linears(vllm_stub.layers(config, quantization, dtype), stored, decoded, dtype)
    assert not stored and matrices >= 42, (matrices, list(stored)[:3])
    assert equal + compared == (0 if "3" in recipe else matrices), (equal, compared, matrices)
    found = f"{placed + tensors} tensors placed" + (f", {matrices} weights equal" if equal else "")
    return chosen | routed, kernels - {"NoneType"}, found


def named(context, model, recipe):
    """The codes of a case in words."""
    if recipe == ACT_ORDER:
        return "`w4-sym-g32-f16`, act-order"
    artifact = context.artifact(harness.MODELS / model, *recipe)
    schemes = json.loads((artifact / "qtool.json").read_text("utf-8"))["schemes"]
    noted = ", with experts" if model == MOE else ", three matrices kept" if "--skip" in recipe else ""
    return " ".join(f"`{each}`" for each in schemes) + noted


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qtool", type=Path, required=True)
    args = parser.parse_args()
    settings, failed = vllm_stub.started(), 0
    print(f"vLLM {vllm.__version__}")
    with tempfile.TemporaryDirectory(prefix="qtool-vllm-") as folder, set_current_vllm_config(settings):
        context = harness.Context(folder, args.qtool.resolve(), {})
        for model, name, recipe, expected in CASES:
            codes = named(context, model, recipe)
            try:
                chosen, kernels, found = checked(context, model, name, recipe)
                kept = {"UnquantizedLinearMethod"} if "kept" in codes else set()
                good = chosen == {*expected.split(), *kept}
                said = f"{', '.join(sorted(chosen))} | {', '.join(sorted(kernels))} | {found}"
            except (ValueError, NotImplementedError) as error:
                sentence = str(error).splitlines()[0]
                good = expected.startswith("refuses: ") and expected.removeprefix("refuses: ") in sentence
                said = f"refuses: {sentence} | |"
            failed += not good
            print(f"| `{name}` | {codes} | {said} |{'' if good else ' FAILED, expected ' + expected}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
