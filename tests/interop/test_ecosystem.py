"""Exports in the libraries of their ecosystems, on a CPU: compressed-tensors by transformers, GPTQ and AWQ by
GPTQModel, NF4 by transformers with bitsandbytes, GGUF by gguf-py and by transformers' own GGUF reader.

Every decoded weight is compared with docs/decode.py's, exactly, where the library rounds, after the same
rounding; logits with those of the model with these weights put in. The last check writes what was found into
the table of docs/formats/README.md.
"""

import gc
import json
import os
import shutil

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing here is worth compiling
os.environ["GPTQ_TORCH_TRITON_DEQUANT"] = "0"

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from harness import MODELS, ROOT, decoder
from test_weights import DENSE

IDS = torch.tensor([[5, 77, 900, 1234, 42, 7, 3000, 12, 2048, 4, 99, 1001]])
PAGE = ROOT / "docs" / "formats" / "README.md"
ROWS = []  # (format, codes, reader, weights, logits)

F16 = ("--scale-dtype", "f16")
INT8 = ("--bits", "8")
INT4 = ("--bits", "4", "--group-size", "64")
INT4_ZP = (*INT4, "--asymmetric", *F16)
INT3 = ("--bits", "3", "--group-size", "32", *F16)
INT2 = ("--bits", "2", "--method", "mse", "--group-size", "32")
INT2_ZP = (*INT2, "--asymmetric", *F16)
MIXED = (*INT4, "--rule", "down_proj=bits:8,group:row", "--skip", r"layers\.0\.mlp")


def exported(context, artifact, name):
    out = context.new(f"{artifact.name[4:]}-{name}")
    context.run("export", artifact, "--to", name, "-o", out)
    return out


def scheme(artifact):
    """Names of an artifact's schemes."""
    return " ".join(json.loads((artifact / "qtool.json").read_text("utf-8"))["schemes"])


def reference(model, artifact, dtype):
    """The base model with decoded weights put in, and these."""
    decoded = decoder().decode(artifact)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    with torch.no_grad():
        for name, value in loaded.named_parameters():
            value.copy_(torch.from_numpy(decoded[name]).to(dtype))
    return loaded, decoded


def assert_linears(loaded, decoded, value, rounded, least):
    """Every linear module's weight equals the decoded one after the library's rounding."""
    compared = 0
    for name, module in loaded.named_modules():
        got = None if name.endswith("lm_head") else value(module)
        if got is not None:
            expected = rounded(torch.from_numpy(decoded[f"{name}.weight"])).to(got.dtype)
            assert torch.equal(got, expected), (name, (got - expected).abs().max())
            compared += 1
    assert compared >= least, compared


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits.float()


@torch.no_grad()
def reply(model):
    return model.generate(IDS, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()


def check_compressed_tensors(context, options, name="compressed-tensors", dequantize=False, bound=0.0):
    from transformers import CompressedTensorsConfig

    artifact = context.artifact(MODELS / DENSE, *options)
    folder = exported(context, artifact, name)
    config = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **config)
    assert not any(info.values()), {key: value for key, value in info.items() if value}
    expected, decoded = reference(MODELS / DENSE, artifact, torch.float32)
    got = logits(loaded.eval())  # decompresses
    rounded = (lambda w: w.half().float()) if dequantize else (lambda w: w)  # to the type of the scales
    linear = lambda module: module.weight if isinstance(module, torch.nn.Linear) else None
    assert_linears(loaded, decoded, linear, rounded, 42)
    difference = (got - logits(expected)).abs().max().item()
    assert difference <= bound and got.isfinite().all(), difference
    if not bound:
        assert reply(loaded) == reply(expected)
    mode = "dequantize=True" if dequantize else "float32"
    ROWS.append((name, scheme(artifact), f"transformers + compressed-tensors, {mode}",
                 "equal" if not dequantize else "equal after rounding to F16",
                 "equal, 20 tokens too" if not bound else f"within {bound}"))
    return f"logits differ by {difference:.2g}"


def test_compressed_tensors_int8(context):
    return check_compressed_tensors(context, INT8)


def test_compressed_tensors_int4(context):
    return check_compressed_tensors(context, INT4)


def test_compressed_tensors_int3(context):
    return check_compressed_tensors(context, INT3)


def test_compressed_tensors_int2(context):
    return check_compressed_tensors(context, INT2)


def test_compressed_tensors_mixed(context):
    return check_compressed_tensors(context, MIXED)


def test_compressed_tensors_zero_points(context):
    return check_compressed_tensors(context, INT4_ZP, dequantize=True, bound=0.01)


def test_compressed_tensors_int8_activations(context):
    """The runtime rounds activations, so that logits differ by more than sums in another order do."""
    return check_compressed_tensors(context, INT8, "compressed-tensors-int8", bound=0.5)


def check_gptqmodel(context, options, name):
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    artifact = context.artifact(MODELS / DENSE, *options)
    folder = exported(context, artifact, name)
    backend = BACKEND.AWQ_TORCH if name == "awq" else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model

    def value(module):
        if not hasattr(module, "qweight"):
            return None
        if name != "awq":
            return module.dequantize_weight().t()
        return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size).t()

    expected, decoded = reference(MODELS / DENSE, artifact, torch.float32)
    skipped = 3 if "--skip" in options else 0
    assert_linears(loaded, decoded, value, lambda w: w.half(), 42 - skipped)
    # Scales in F32 give the decoded weights unrounded. Sums in F16 of a deep model differ from themselves in another order by
    # more than any bound worth stating.
    loaded = loaded.float().eval()
    assert_linears(loaded, decoded, value, lambda w: w, 42 - skipped)
    got = logits(loaded)
    difference = (got - logits(expected)).abs().max().item()
    bound = 0.2 if name == "awq" else 1e-3  # its product for AWQ rounds to F16 on the way
    assert difference <= bound and got.isfinite().all(), difference
    assert reply(loaded) == reply(expected)
    reader = "GPTQModel, float16 and float32" + (", three matrices kept" if skipped else "")
    ROWS.append((name, scheme(artifact), reader, "equal after rounding to F16, and in float32", f"within {bound:g}, 20 tokens equal"))
    del loaded
    gc.collect()
    return f"logits differ by {difference:.2g}"


def test_gptq_int8(context):
    return check_gptqmodel(context, INT8, "gptq")


def test_gptq_int4(context):
    return check_gptqmodel(context, INT4, "gptq")


def test_gptq_int4_with_kept_layers(context):
    return check_gptqmodel(context, (*INT4, "--skip", r"layers\.0\.mlp"), "gptq")


def test_gptq_int3(context):
    return check_gptqmodel(context, INT3, "gptq")


def test_gptq_int2(context):
    return check_gptqmodel(context, INT2, "gptq")


def test_gptq_v2_zero_points(context):
    return check_gptqmodel(context, INT4_ZP, "gptq-v2")


def test_gptq_v2_int2_zero_points(context):
    return check_gptqmodel(context, INT2_ZP, "gptq-v2")


def test_awq(context):
    return check_gptqmodel(context, INT4, "awq")


def test_awq_zero_points(context):
    return check_gptqmodel(context, INT4_ZP, "awq")


def check_bnb_nf4(context, method):
    """bitsandbytes decodes to the source's type, BF16: that is compared. It computes in float32 here, because BF16 sums of a deep
    model differ from themselves in another order by more than any bound worth stating."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    artifact = context.artifact(MODELS / DENSE, "--bits", "4", "--method", method)
    folder = exported(context, artifact, "bnb-nf4")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), {key: value for key, value in info.items() if value}
    expected, decoded = reference(MODELS / DENSE, artifact, torch.float32)

    def value(module):
        if isinstance(module, Linear4bit):
            return dequantize_4bit(module.weight.data, module.weight.quant_state)
        return None

    assert_linears(loaded, decoded, value, lambda w: w.bfloat16(), 42)
    linears = {name: module for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    assert len(linears) >= 42 and all(m.weight.quant_state.nested == (method == "nf4-dq") for m in linears.values())
    for parameter in loaded.parameters():  # what is not quantized comes in the source's type
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    for module in linears.values():  # its product decodes to the type it computes in
        module.compute_dtype, module.compute_type_is_set = torch.float32, True
        module.support_avx512bf16_for_cpu = False  # that kernel rounds activations to BF16 whatever is asked for
    difference = (logits(loaded.eval()) - logits(expected)).abs().max().item()
    assert difference <= 1e-3, difference
    assert reply(loaded) == reply(expected)
    ROWS.append(("bnb-nf4", scheme(artifact), "transformers + bitsandbytes, float32",
                 "equal after rounding to BF16", "within 1e-3, 20 tokens equal"))
    return f"logits differ by {difference:.2g}"


def test_bnb_nf4(context):
    return check_bnb_nf4(context, "nf4")


def test_bnb_nf4_double(context):
    return check_bnb_nf4(context, "nf4-dq")


def made(context, kind):
    """A random model of an architecture that transformers reads from GGUF, with the sample's tokenizer."""
    folder = context.folder / f"made-{kind.__name__}"
    if not folder.exists():
        torch.manual_seed(7)
        config = {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config, Qwen3ForCausalLM: Qwen3Config}[kind](
            vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            head_dim=128 if kind is Qwen3ForCausalLM else 64,  # its GGUF reader takes every Qwen3 head for 128
            bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
        model = kind(config).to(torch.bfloat16)
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(torch.randn_like(value) * (0.1 if value.dim() < 2 else 0.06) + ("norm" in name))
        model.save_pretrained(folder)
        for path in (MODELS / DENSE).glob("*token*.json"):
            shutil.copy(path, folder)
    return folder


def unpaired(rows, heads):
    """Rows of a Llama's query and key in the checkpoint's order again."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def check_gguf(context, model, options, types):
    import gguf

    artifact = context.artifact(model, *options)
    path = exported(context, artifact, "gguf") / "model.gguf"
    reader = gguf.GGUFReader(path)
    decoded = decoder().decode(artifact)
    config = json.loads((model / "config.json").read_text("utf-8"))
    architecture = reader.get_field("general.architecture").contents()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(decoded) >= 20, (len(tensors), len(decoded))
    for name, expected in decoded.items():
        tensor = tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            got = unpaired(got, config[key])
        assert np.array_equal(got, expected), name
    found = {tensor.tensor_type.name for tensor in tensors.values()}
    assert types <= found, found
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    assert len(tokens) == config["vocab_size"]
    assert all(tokens[i] == token for token, i in tokenizer["model"]["vocab"].items())
    assert reader.get_field("tokenizer.ggml.merges").contents()[7] in (
        tokenizer["model"]["merges"][7], " ".join(tokenizer["model"]["merges"][7]))
    ROWS.append((f"gguf ({architecture})", scheme(artifact), "gguf-py", "equal", ""))
    if architecture not in ("llama", "qwen2", "qwen3"):
        return f"{sorted(found)}"
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected, _ = reference(model, artifact, torch.float32)
    parameters = dict(loaded.named_parameters())
    for name, value in expected.named_parameters():
        assert torch.equal(parameters[name], value), name
    difference = (logits(loaded.eval()) - logits(expected)).abs().max().item()
    assert difference <= 1e-4, difference
    assert reply(loaded) == reply(expected)
    ROWS.append((f"gguf ({architecture})", scheme(artifact), "transformers, gguf_file=", "equal", "within 1e-4, 20 tokens equal"))
    return f"{sorted(found)}, logits differ by {difference:.2g}"


def test_gguf_llama_q4_0(context):
    return check_gguf(context, made(context, LlamaForCausalLM), ("--bits", "4", "--group-size", "32", *F16), {"Q4_0", "BF16", "F32"})


def test_gguf_llama_q4_1(context):
    options = ("--bits", "4", "--group-size", "32", "--asymmetric", "--scale-bits", "7", *F16)
    return check_gguf(context, made(context, LlamaForCausalLM), options, {"Q4_1"})


def test_gguf_llama_q4_k(context):
    return check_gguf(context, made(context, LlamaForCausalLM), ("--bits", "4", "--group-size", "256", "--asymmetric", *F16), {"Q4_K"})


def test_gguf_qwen2_q8_0(context):
    return check_gguf(context, made(context, Qwen2ForCausalLM), INT8, {"Q8_0"})


def test_gguf_qwen2_q2_k(context):
    options = ("--bits", "2", "--method", "mse", "--group-size", "256", "--asymmetric", *F16)
    return check_gguf(context, made(context, Qwen2ForCausalLM), options, {"Q2_K"})


def test_gguf_qwen3_q4_0(context):
    return check_gguf(context, made(context, Qwen3ForCausalLM), INT4, {"Q4_0"})


def test_gguf_llama_q3_k(context):
    return check_gguf(context, made(context, LlamaForCausalLM), ("--bits", "3", "--group-size", "256", *F16), {"Q3_K"})


def test_gguf_llama_q4_k_scheme(context):
    return check_gguf(context, made(context, LlamaForCausalLM), ("--bits", "4", "--method", "q4-k"), {"Q4_K"})


def test_gguf_qwen2_q2_k_scheme(context):
    return check_gguf(context, made(context, Qwen2ForCausalLM), ("--bits", "2", "--method", "q2-k"), {"Q2_K"})


def test_gguf_bert(context):
    """Names by gguf-py's own table, but for the head's, which is llama.cpp's alone."""
    import gguf

    model = ROOT / "tests" / "golden" / "encoders" / "bert"
    artifact = context.artifact(model, *INT8, "--group-size", "32", *F16, "--skip", "classifier|pooler")
    reader = gguf.GGUFReader(exported(context, artifact, "gguf") / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 2)
    head = {"bert.pooler.dense": "cls", "classifier": "cls.output"}
    decoded = decoder().decode(artifact)
    assert len(tensors) == len(decoded) >= 40, (len(tensors), len(decoded))
    for name, expected in decoded.items():
        module, ending = name.rsplit(".", 1)
        known = head.get(module) or names.get_name(module.removeprefix("bert."))
        tensor = tensors[f"{known}.{ending}"]
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        assert np.array_equal(got, expected), name
    field = lambda key: reader.get_field(f"tokenizer.ggml.{key}").contents()
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    vocabulary, tokens = tokenizer["model"]["vocab"], field("tokens")
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    for text, i in vocabulary.items():
        expected = text if text in special else text[2:] if text.startswith("##") else "\u2581" + text
        assert tokens[i] == expected, (i, text, tokens[i])
    assert (field("bos_token_id"), field("seperator_token_id")) == (vocabulary["[CLS]"], vocabulary["[SEP]"])
    ROWS.append(("gguf (bert)", scheme(artifact), "gguf-py", "equal", ""))
    return f"{len(tensors)} tensors"


def test_gguf_ernie(context):
    return check_gguf(context, MODELS / DENSE, INT4, {"Q4_0"})


def test_gguf_ernie_moe(context):
    """Experts of a layer in one tensor, in the order of their numbers; names by gguf-py's own table."""
    import gguf

    model = MODELS / "tiny-ernie45-moe"
    artifact = context.artifact(model, *INT8, "--group-size", "32", *F16)
    reader = gguf.GGUFReader(exported(context, artifact, "gguf") / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = json.loads((model / "config.json").read_text("utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.ERNIE4_5_MOE, config["num_hidden_layers"])
    stacked = {}
    for name, value in decoder().decode(artifact).items():
        layer, _, rest = name.partition(".mlp.experts.")
        number, _, module = rest.partition(".")
        # llama.cpp's converter names the bias of the router like this.
        key = f"{layer}.mlp.experts.{module}" if rest else name.replace("correction_bias", "correction.bias")
        stacked.setdefault(names.get_name(key, try_suffixes=(".weight", ".bias")), []).append((int(number or 0), value))
    assert stacked.keys() == tensors.keys(), stacked.keys() ^ tensors.keys()
    experts = 0
    for name, parts in stacked.items():
        assert [number for number, _ in sorted(parts, key=lambda part: part[0])] == list(range(len(parts)))
        expected = np.stack([value for _, value in sorted(parts, key=lambda part: part[0])])
        got = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert np.array_equal(got.reshape(expected.shape), expected), name
        experts += len(parts) > 1
    assert experts >= 9, experts
    ROWS.append(("gguf (ernie4_5-moe)", scheme(artifact), "gguf-py", "equal", ""))
    return f"{len(tensors)} tensors, {experts} of them of experts"


def test_matrix_is_written(context):
    """The table of docs/formats/README.md says what was found here. Runs last."""
    assert len(ROWS) == 39, len(ROWS)  # a check that failed leaves none, and the page as it was
    lines = ["| format | codes | reader | weights | logits |", "|---|---|---|---|---|"]
    lines += [f"| `{row[0]}` | {' '.join(f'`{s}`' for s in row[1].split())} | {' | '.join(row[2:])} |" for row in ROWS]
    text = PAGE.read_text("utf-8")
    begin, end = "<!-- matrix begins -->\n", "<!-- matrix ends -->"
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    PAGE.write_text(head + begin + "\n".join(lines) + "\n" + end + tail, "utf-8")
    return f"{len(ROWS)} rows"
