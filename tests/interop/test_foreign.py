"""Models that others quantized, exported by qtool and loaded by a third library: the golden models of tests/golden/imports,
and a file of llama.cpp, which transformers reads itself for comparison.
"""

import os
import shutil
import subprocess

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["GPTQ_TORCH_TRITON_DEQUANT"] = "0"

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness import MODELS, ROOT

GOLDEN = ROOT / "tests" / "golden" / "imports"
IDS = torch.tensor([[5, 77, 90, 12, 42, 7, 30, 12, 48, 4, 9, 1]])


def exported(context, model, name):
    out = context.new(f"{model.name}-{name}")
    context.run("export", model, "--to", name, "-o", out)
    assert (out / "README.md").read_text("utf-8").startswith("---\nbase_model: ")
    return out


def answers(name):
    """What the library that quantized a golden model decodes, and the logits with these weights in float32."""
    tensors = load_file(GOLDEN / name / "golden.safetensors")
    values = {key.removeprefix("values/"): value for key, value in tensors.items() if key.startswith("values/")}
    assert len(values) == 7
    return values, tensors["ids"].long()[None], tensors["logits"]


def check_transformers(context, name, to, bound, **options):
    """All linear weights and the logits, in transformers with the package of the format."""
    folder = exported(context, GOLDEN / name, to)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(info.values()), {key: value for key, value in info.items() if value}
    values, ids, logits = answers(name)
    with torch.no_grad():
        got = loaded.eval()(ids, use_cache=False).logits[0]
    modules, compared = dict(loaded.named_modules()), 0
    for key, value in values.items():
        weight = modules[key.removesuffix(".weight")].weight
        if to == "bf16":  # the library's F16 was rounded before: a tie may fall to the other side
            assert torch.allclose(weight, value.float(), rtol=2 ** -7, atol=0), key
        else:
            assert torch.equal(weight.to(value.dtype), value), key
        compared += 1
    difference = (got - logits).abs().max().item()
    assert difference <= bound, difference
    return f"{compared} weights, logits differ by {difference:.2g}"


def test_gptq_to_bf16(context):
    return check_transformers(context, "gptq", "bf16", 0.1)


def test_act_order_to_f32(context):
    return check_transformers(context, "gptq-act-order", "f32", 0.01)


def test_awq_to_f32(context):
    return check_transformers(context, "awq", "f32", 0.01)


def test_nf4_to_f32(context):
    return check_transformers(context, "bnb-nf4-double", "f32", 0.01)


def test_gptq_to_compressed_tensors(context):
    return check_transformers(context, "gptq", "compressed-tensors", 0.01)


def check_gptqmodel(context, name, to):
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    folder = exported(context, GOLDEN / name, to)
    for path in (MODELS / "tiny-ernie45").glob("*token*.json"):  # the loader asks for one; the golden models have none
        shutil.copy(path, folder)
    backend = BACKEND.AWQ_TORCH if to == "awq" else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model
    modules, (values, _, _) = dict(loaded.named_modules()), answers(name)
    for key, value in values.items():
        module = modules[key.removesuffix(".weight")]
        if to == "awq":
            got = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size).t()
        else:
            got = module.dequantize_weight().t()
        assert torch.equal(got.half(), value.half()), key
    return f"{len(values)} weights"


def test_act_order_to_gptq(context):
    return check_gptqmodel(context, "gptq-act-order", "gptq")


def test_act_order_to_gptq_v2(context):
    return check_gptqmodel(context, "gptq-act-order", "gptq-v2")


def test_act_order_to_compressed_tensors(context):
    """Refused, because the format's library refuses what it would be: to be looked at again when this check fails."""
    from compressed_tensors.quantization import QuantizationArgs

    try:
        QuantizationArgs(num_bits=4, strategy="group", group_size=32, actorder="group")
    except ValueError as error:
        assert "has been removed" in str(error), error
    else:
        raise AssertionError("the library knows columns in the order of groups again")
    out = context.new("act-order-compressed-tensors")
    command = [str(context.qtool), "export", str(GOLDEN / "gptq-act-order"), "--to", "compressed-tensors", "-o", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "actorder: group" in ran.stderr and not out.exists(), ran
    return "refused"


def test_awq_to_gptq_v2(context):
    return check_gptqmodel(context, "awq", "gptq-v2")


def test_compressed_tensors_to_awq(context):
    return check_gptqmodel(context, "ct-w4", "awq")


def test_gguf_to_f32(context):
    """llama.cpp's file by transformers' own reader and by way of the export: parameters, logits, tokens."""
    file = GOLDEN / "gguf" / "model.gguf"
    folder = exported(context, file, "f32")
    ours, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), {key: value for key, value in info.items() if value}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected, compared = dict(theirs.named_parameters()), 0
    for name, value in ours.named_parameters():
        assert torch.equal(value, expected[name]), name
        compared += 1
    assert compared >= 11, compared
    with torch.no_grad():
        got, wanted = (model.eval()(IDS, use_cache=False).logits for model in (ours, theirs))
    assert (got - wanted).abs().max() <= 1e-5
    golden = load_file(GOLDEN / "gguf" / "model.safetensors")
    text = bytes(golden["text"].to(torch.uint8).tolist()).decode()
    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert tokens == golden["tokens"].tolist(), (tokens[:20], golden["tokens"][:20])
    return f"{compared} parameters, {len(tokens)} tokens"
