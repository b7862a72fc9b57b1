"""Models that other libraries quantize here and now, read by qtool: the errors `qtool verify --base` measures against the
errors of what these libraries decode, for every weight, and `qtool validate` with the quantized folder as candidate and as base
against the perplexity these libraries' models have in transformers. GGUF files of encoders and of models with experts, for which
gguf-py has a reader and no writer of its own: qtool's, as gguf-py reads them, against what qtool reads.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from harness import MODELS, ROOT, decoder
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


def read_as_others_do(context, model, options, own_names):
    """A GGUF file that qtool wrote of a model and its `f32` export, held against what gguf-py reads from that file, tensor by
    tensor; the folder of the export."""
    import gguf

    file = context.new("written")
    context.run("export", context.artifact(model, *options), "--to", "gguf", "-o", file)
    reader = gguf.GGUFReader(file / "model.gguf")
    back = context.new("back")
    context.run("export", file / "model.gguf", "--to", "f32", "-o", back)
    ours, compared = load_file(back / "model.safetensors"), 0
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        for name, value in own_names(tensor.name, values):
            got = ours.pop(name).float().numpy()
            assert np.array_equal(got, value), (name, got.shape, value.shape)
            compared += 1
    assert not ours and compared >= 37, (list(ours), compared)
    return reader, back, compared


@torch.no_grad()
def test_gguf_bert(context):
    """Names by gguf-py's own table, but for the head's; then transformers loads what became of the file: its labels, its tokens,
    and the logits of the model with the decoded weights."""
    import gguf
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    model = ROOT / "tests" / "golden" / "encoders" / "bert"
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 2)
    modules = [name.rsplit(".", 1)[0].removeprefix("bert.") for name in load_file(model / "model.safetensors")]
    known = {table.get_name(module): f"bert.{module}" for module in modules if table.get_name(module)}
    known |= {"cls": "bert.pooler.dense", "cls.output": "classifier"}

    def own_names(name, values):
        module, ending = name.rsplit(".", 1)
        yield f"{known[module]}.{ending}", values

    options = ("--bits", "8", "--group-size", "32", "--scale-dtype", "f16", "--skip", "classifier|pooler")
    _, back, compared = read_as_others_do(context, model, options, own_names)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    expected = AutoModelForSequenceClassification.from_pretrained(model).eval()
    assert loaded.config.id2label == expected.config.id2label
    for name, value in decoder().decode(context.artifact(model, *options)).items():
        expected.get_parameter(name).copy_(torch.from_numpy(value))
    texts = [("The cat sat on the mat.", "A dog ran, unable!"), ("\u4f60\u597d", "Caf\u00e9 cats")]
    ours, theirs = AutoTokenizer.from_pretrained(back), Tokenizer.from_file(str(model / "tokenizer.json"))
    difference = 0.0
    for pair in texts:
        ids, encoding = ours(*pair), theirs.encode(*pair)
        assert (ids["input_ids"], ids["token_type_ids"]) == (encoding.ids, encoding.type_ids), pair
        batch = {key: torch.tensor([ids[key]]) for key in ("input_ids", "token_type_ids")}
        difference = max(difference, (loaded.eval()(**batch).logits - expected(**batch).logits).abs().max().item())
    assert difference == 0.0, difference
    return f"{compared} tensors, logits equal"


@torch.no_grad()
def test_gguf_ernie_moe(context):
    """Experts taken apart, names by gguf-py's own table; then transformers loads what became of the file and gives the logits of
    the artifact's own export."""
    import gguf

    model = MODELS / "tiny-ernie45-moe"
    config = json.loads((model / "config.json").read_text("utf-8"))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.ERNIE4_5_MOE, config["num_hidden_layers"])
    known = {}
    for name in load_file(model / "model.safetensors"):
        layer, _, rest = name.partition(".mlp.experts.")
        # llama.cpp's converter names the bias of the router like this.
        key = f"{layer}.mlp.experts.{rest.partition('.')[2]}" if rest else name.replace("correction_bias", "correction.bias")
        known.setdefault(table.get_name(key, try_suffixes=(".weight", ".bias")), []).append(name)

    def own_names(name, values):
        names = known[name]
        if len(names) == 1:
            # The router's bias is a row in the checkpoint.
            yield names[0], values.reshape(1, -1) if name.endswith("exp_probs_b.bias") else values
            return
        assert len(names) == len(values) == config["moe_num_experts"], name
        for whole in names:
            yield whole, values[int(whole.partition(".mlp.experts.")[2].partition(".")[0])]

    options = ("--bits", "8", "--group-size", "32", "--scale-dtype", "f16")
    _, back, compared = read_as_others_do(context, model, options, own_names)
    straight = context.new("straight")
    context.run("export", context.artifact(model, *options), "--to", "f32", "-o", straight)
    ids = AutoTokenizer.from_pretrained(model)(context.texts["heldout.en"][:400], return_tensors="pt")["input_ids"]
    logits = []
    for folder in (back, straight):
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        logits.append(loaded.eval()(ids).logits)
    assert torch.equal(*logits), (logits[0] - logits[1]).abs().max()
    return f"{compared} tensors, logits equal"
