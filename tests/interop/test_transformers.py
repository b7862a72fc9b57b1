"""The bf16 export in Hugging Face transformers' own ERNIE-4.5 classes."""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoints
from harness import MODELS, decoder
from test_weights import DENSE, INT2, INT4, INT8, MOE

sys.path.insert(0, str(MODELS))
from evaluate import measure  # noqa: E402  the one definition of bits per byte

transformers.logging.set_verbosity_error()  # no word on texts longer than the model's context,
transformers.logging.disable_progress_bar()  # which are cut into windows here

# INT8 may cost this share of the base model's bits per byte.
INT8_MAY_COST = 0.005


def load(folder):
    """The model with its stored values, computing in float32."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model.float().eval()


@torch.no_grad()
def replace(model, name, values):
    """Puts decoded weights, rounded to bfloat16, in place of the model's own."""
    values = torch.from_numpy(values).to(torch.bfloat16).float()
    block, _, rest = name.partition(".experts.")
    if not rest:
        target = model.get_parameter(name)
    else:  # transformers holds all experts of a layer in one tensor, gate and up in another
        number, kind, _ = rest.split(".")
        experts = model.get_submodule(f"{block}.experts")
        half = values.shape[0]
        rows = {"gate_proj": slice(0, half), "up_proj": slice(half, 2 * half)}
        target = (experts.down_proj[int(number)] if kind == "down_proj"
                  else experts.gate_up_proj[int(number)][rows[kind]])
    assert target.shape == values.shape, name
    assert not torch.equal(target, values), f"{name}: nothing to replace"
    target.copy_(values)


@torch.no_grad()
def check_export(context, model, options, class_name):
    """Export and base with replaced weights: all parameters and all logits equal, bit for bit."""
    artifact = context.artifact(MODELS / model, *options)
    export = load(context.export(artifact))
    assert type(export).__name__ == class_name, type(export)
    names = checkpoints.linear_names(checkpoints.config(MODELS / model))[0]
    decoded = decoder().decode(artifact)
    expected = load(MODELS / model)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / model)
    ids = torch.stack([
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:256])
        for text in (context.texts["heldout.en"], context.texts["heldout.zh"])])
    before = expected(ids, use_cache=False).logits
    replaced = 0
    for name in names:
        replace(expected, name, decoded[name])
        replaced += 1
    assert replaced == {DENSE: 6 * 7, MOE: 7 + 3 * (4 + 3 + 8 * 3)}[model], replaced
    parameters = dict(export.named_parameters())
    assert parameters and len(parameters) == len(list(expected.named_parameters()))
    for name, value in expected.named_parameters():
        assert torch.equal(value, parameters[name]), name
    logits, reference = export(ids, use_cache=False).logits, expected(ids, use_cache=False).logits
    assert logits.shape == (2, 256, 4096) and bool(logits.isfinite().all())
    difference = (logits - reference).abs().max().item()
    assert difference == 0.0, difference
    moved = (logits - before).abs().max().item()
    assert moved > 0.0
    return f"{replaced} weights, logits differ by {difference}, from the base by {moved:.3f}"


def test_dense_int8(context):
    return check_export(context, DENSE, INT8, "Ernie4_5ForCausalLM")


def test_dense_int4(context):
    return check_export(context, DENSE, INT4, "Ernie4_5ForCausalLM")


def test_moe_int8(context):
    return check_export(context, MOE, INT8, "Ernie4_5_MoeForCausalLM")


def test_export_is_a_plain_model_folder(context):
    """config.json without a trace of quantization; the tokenizer loads and encodes alike."""
    text = context.texts["heldout.zh"][:2000]
    expected = AutoTokenizer.from_pretrained(MODELS / DENSE)(text)["input_ids"]
    assert len(expected) > 100
    for options in (INT8, INT4):
        artifact = context.artifact(MODELS / DENSE, *options)
        assert "quantization_config" in checkpoints.config(artifact)
        export = context.export(artifact)
        assert checkpoints.config(export) == checkpoints.config(MODELS / DENSE)
        assert not (export / "qtool.json").exists()
        for folder in (artifact, export):
            assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == expected
    return f"{len(expected)} tokens"


def test_artifact_config_names_qtool(context):
    """quantization_config says whose format it is; the rest is the source's config."""
    for options in (INT8, INT4):
        about = checkpoints.config(context.artifact(MODELS / DENSE, *options))
        block = about.pop("quantization_config")
        assert block["quant_method"] == "qtool" and block["format_version"] == 1, block
        assert about == checkpoints.config(MODELS / DENSE)
    return json.dumps(block)


def bits_per_byte(context, folder):
    """(all, en, zh) over the held-out text."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    results = [measure(model, tokenizer, context.texts[f"heldout.{x}"]) for x in ("en", "zh")]
    assert all(result["windows"] >= 20 for result in results), results
    sizes = [result["bytes_predicted"] for result in results]
    each = [result["bits_per_byte"] for result in results]
    return (each[0] * sizes[0] + each[1] * sizes[1]) / sum(sizes), *each


def test_bits_per_byte(context):
    """Held-out bits per byte of base, INT8, INT4 and WINT2; INT8 has a limit."""
    rows = 0
    for model in (DENSE, MOE):
        base = bits_per_byte(context, MODELS / model)
        for label, options in (("base", None), ("INT8", INT8), ("INT4", INT4), ("INT2", INT2)):
            got = base
            if options:
                artifact = context.artifact(MODELS / model, *options)
                got = bits_per_byte(context, context.export(artifact))
            cost = got[0] / base[0] - 1
            print(f"   {model:17} {label}: held-out bits per byte {got[0]:.4f}"
                  f" (en {got[1]:.4f}, zh {got[2]:.4f}), {cost:+.2%}", flush=True)
            assert label != "INT8" or cost <= INT8_MAY_COST, cost
            rows += 1
    assert rows == 8
    return f"INT8 costs at most {INT8_MAY_COST:.1%}"
