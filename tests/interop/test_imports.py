"""Models that other libraries quantize here and now, read by qtool: the errors `qtool verify --base` measures against the
errors of what these libraries decode, for every weight, and `qtool validate` with the quantized folder as candidate and as base
against the perplexity these libraries' models have in transformers.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from harness import MODELS
from test_transformers import load
from test_weights import DENSE

CHARACTERS = 4_000
WINDOW = 512


def check_figures(context, folder, decoded, least):
    """`decoded`: what the library decodes, in float32, by name."""
    base = MODELS / DENSE
    source = load_file(base / "model.safetensors")
    found = json.loads(context.run("verify", folder, "--base", base, "--json"))
    assert found["sound"], found
    figures = {figure["name"]: figure for figure in found["verification"]["figures"]}
    for name, value in decoded.items():
        expected, got = source[name].double().numpy(), value.double().numpy()
        relative = np.square(expected - got).sum() / np.square(expected).sum()
        assert math.isclose(figures[name]["relative_mse"], relative, rel_tol=1e-9), (name, figures[name], relative)
        assert math.isclose(figures[name]["max_abs_error"], np.abs(expected - got).max(), rel_tol=1e-6), name
    assert len(decoded) >= least, len(decoded)


@torch.no_grad()
def perplexity(model, windows):
    nats = tokens = 0
    for window in windows:
        logs = F.log_softmax(model(torch.tensor([window]), use_cache=False).logits[0, :-1].double(), -1)
        nats += F.nll_loss(logs, torch.tensor(window[1:]), reduction="sum").item()
        tokens += len(window) - 1
    return math.exp(nats / tokens)


def check_perplexity(context, folder, decoded):
    """As candidate and as base."""
    base = MODELS / DENSE
    text = context.texts["heldout.en"][:CHARACTERS] + context.texts["heldout.zh"][:CHARACTERS]
    file = context.new("text.txt")
    file.write_text(text, encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False)["input_ids"]
    windows = [ids[i:i + WINDOW] for i in range(0, len(ids), WINDOW)]
    windows = [w for w in windows if len(w) > 1]
    model, changed = load(base), load(base)
    with torch.no_grad():
        for name, value in decoded.items():
            changed.get_parameter(name).copy_(value)
    expected = [perplexity(model, windows), perplexity(changed, windows)]
    for models, expected in (((base, folder), expected), ((folder, base), expected[::-1])):
        report = json.loads(context.run("validate", *models, "--task", f"perplexity={file}", "--window", WINDOW, "--json"))
        rows = {row["name"]: row for row in report["tasks"][0]["metrics"]}
        for got, wanted in zip(rows["perplexity"]["values"], expected):
            assert math.isclose(got["value"], wanted, rel_tol=1e-3), (got, expected)
    return f"perplexity {expected[1]:.2f}, quantized {expected[0]:.2f}"


def check_bnb(context, kind, double):
    from bitsandbytes.functional import dequantize_4bit

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
                                bnb_4bit_compute_dtype=torch.float32)
    folder = context.new(f"bnb-{kind}-{double}")
    AutoModelForCausalLM.from_pretrained(MODELS / DENSE, quantization_config=config, dtype=torch.float32).save_pretrained(folder)
    for path in (MODELS / DENSE).glob("*token*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    decoded = {}
    for name, module in AutoModelForCausalLM.from_pretrained(folder).named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            assert state.nested == double
            decoded[f"{name}.weight"] = dequantize_4bit(module.weight.data, state)
    check_figures(context, folder, decoded, 42)
    return check_perplexity(context, folder, decoded)


def test_bnb_nf4(context):
    return check_bnb(context, "nf4", False)


def test_bnb_nf4_double(context):
    return check_bnb(context, "nf4", True)


def test_bnb_fp4_double(context):
    return check_bnb(context, "fp4", True)


def test_gguf(context):
    """Types that gguf-py quantizes itself, one for each kind of layer, in a file of its own writing."""
    import gguf
    from gguf import GGMLQuantizationType as T

    base = MODELS / DENSE
    exported = context.new("gguf")  # dimensions and tokenizer; its weights are not used
    context.run("export", context.artifact(base, "--bits", "8", "--scale-dtype", "f16"), "--to", "gguf", "-o", exported)
    reader = gguf.GGUFReader(exported / "model.gguf")
    config = json.loads((base / "config.json").read_text("utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.ERNIE4_5, config["num_hidden_layers"])
    file = context.new("q.gguf")
    writer = gguf.GGUFWriter(file, "ernie4_5")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner[0] if inner else None)
    kinds = {"q_proj": T.Q4_0, "k_proj": T.Q4_1, "v_proj": T.Q5_0, "o_proj": T.Q5_1, "gate_proj": T.Q8_0, "up_proj": T.Q4_1,
             "down_proj": T.Q5_0}
    decoded = {}
    for name, value in load_file(base / "model.safetensors").items():
        module = name.split(".")[-2]
        theirs, value = names.get_name(name, try_suffixes=(".weight", ".bias")), value.float().numpy()
        if module not in kinds:
            writer.add_tensor(theirs, value)
            continue
        blocks = gguf.quants.quantize(value, kinds[module])
        decoded[name] = torch.from_numpy(gguf.quants.dequantize(blocks, kinds[module]).copy())
        writer.add_tensor(theirs, blocks, raw_dtype=kinds[module])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_figures(context, file, decoded, 42)
    return check_perplexity(context, file, decoded)
