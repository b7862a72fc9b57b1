#!/usr/bin/env python3
"""A tiny Llama quantized and saved by other people's libraries, with what these decode and the logits they give.

    pip install torch==2.15.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2 compressed-tensors==0.20.0 safetensors==0.8.0
    pip install --no-build-isolation gptqmodel==7.7.0
    python tests/golden/imports/make.py [FOLDER ...]

Each folder is a model as its library saves it, and beside it golden.safetensors:
    values/NAME     every quantized weight as the library decodes it, (N, K), in the type it decodes to
    ids, logits     an input and the logits of a float32 model with these values in it
The folder `base` holds the model all were made from.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["GPTQ_TORCH_TRITON_DEQUANT"] = "0"
os.cpu_count = lambda: 8  # GPTQModel does not start its threads on two cores

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
IDS = torch.tensor([[5, 77, 90, 12, 42, 7, 30, 12, 48, 4, 9, 1]])


def base():
    """Random weights of a shape that all formats hold."""
    torch.manual_seed(11)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=4, head_dim=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
                         tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(torch.float16)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * (0.1 if value.dim() < 2 else 0.08) + ("norm" in name))
    model.save_pretrained(HERE / "base")


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name}


@torch.no_grad()
def finish(folder, values):
    """Keeps what the library decodes, and the logits of a model with these weights and the folder's other tensors."""
    assert len(values) == 7, len(values)
    model = LlamaForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32).eval()
    saved = load_file(folder / "model.safetensors")
    for name, value in model.named_parameters():
        value.copy_(values[name].float() if name in values else saved[name].float())
    logits = model(IDS, use_cache=False).logits
    tensors = {f"values/{name}": value.contiguous() for name, value in values.items()}
    save_file(tensors | {"ids": IDS[0].to(torch.int32), "logits": logits[0].contiguous()}, folder / "golden.safetensors")
    for path in list(folder.iterdir()):  # what no reader needs
        if path.name not in ("config.json", "model.safetensors", "golden.safetensors"):
            path.unlink()
        else:
            path.chmod(0o644)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("_name_or_path", None)  # paths of the machine it was made on
    config["quantization_config"].get("meta", {}).pop("offload_to_disk_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    print(folder.name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


def bnb(folder, kind, double, **more):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
                                bnb_4bit_compute_dtype=torch.float32, **more)
    model = AutoModelForCausalLM.from_pretrained(HERE / "base", quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    # As it is after loading: what was saved, not what it was saved from.
    model = AutoModelForCausalLM.from_pretrained(folder)
    values = {}
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            assert state.nested == double
            values[f"{name}.weight"] = dequantize_4bit(module.weight.data, state)
    finish(folder, values)


def gptqmodel(folder, **options):
    """GPTQModel's own quantizer, on rows of random ids."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "base"
        shutil.copytree(HERE / "base", source)
        tokenizer(source)
        awq = options.get("method") == "awq"
        config = QuantizeConfig(bits=4, group_size=32, **options)
        model = GPTQModel.load(str(source), config)
        torch.manual_seed(3)
        rows = [{"input_ids": torch.randint(3, 96, (48,)).tolist(), "attention_mask": [1] * 48} for _ in range(32)]
        model.quantize(rows, batch_size=1)
        model.save(str(folder))
    loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    values = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "qweight"):
            value = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, 32) if awq else module.dequantize_weight()
            values[f"{name}.weight"] = value.t()
    finish(folder, values)


def tokenizer(folder):
    """One that GPTQModel can load; the ids are random all the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t2").save_pretrained(folder)


def compressed(folder, weights, format_):
    """Weights rounded by compressed-tensors' own functions, compressed and saved by it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus,
                                                 apply_quantization_config, fake_quantize)
    from compressed_tensors.quantization.utils import calculate_qparams

    model = LlamaForCausalLM.from_pretrained(HERE / "base", dtype=torch.float16)
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format_)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=format_,
                                quantization_status=QuantizationStatus.INITIALIZED)
    apply_quantization_config(model, config)
    values = {}
    for name, module in linears(model).items():
        weight = module.weight.data
        n, k = weight.shape
        group = args.group_size or 0
        if str(getattr(args.strategy, "value", args.strategy)) == "tensor":
            grouped = weight.reshape(1, 1, -1)
        else:
            grouped = weight.reshape(n, -1, group if group > 0 else k)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        if str(getattr(args.strategy, "value", args.strategy)) == "tensor":
            scale, zero = scale.reshape(-1), zero.reshape(-1)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
        zero = None if args.symmetric else module.weight_zero_point
        values[f"{name}.weight"] = fake_quantize(weight, module.weight_scale, zero, args).detach()
        module.weight.data.copy_(values[f"{name}.weight"])
    config.quantization_status = QuantizationStatus.COMPRESSED
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=format_)
    compressor.compress_model(model)
    folder.mkdir()
    state = {key: value.contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_file(state, folder / "model.safetensors")
    shutil.copy(HERE / "base" / "config.json", folder)
    compressor.update_config(folder)
    finish(folder, values)


FOLDERS = {
    "bnb-nf4": lambda f: bnb(f, "nf4", False),
    "bnb-nf4-double": lambda f: bnb(f, "nf4", True),
    "bnb-fp4-double": lambda f: bnb(f, "fp4", True),
    "gptq": lambda f: gptqmodel(f, sym=True, desc_act=False),
    "gptq-act-order": lambda f: gptqmodel(f, sym=True, desc_act=True),
    "gptq-v2-zp": lambda f: gptqmodel(f, sym=False, desc_act=False, format="gptq_v2"),
    "awq": lambda f: gptqmodel(f, method="awq", format="gemm", sym=False),
    "ct-w4": lambda f: compressed(f, dict(num_bits=4, symmetric=True, strategy="group", group_size=32), "pack-quantized"),
    "ct-w4-zp": lambda f: compressed(f, dict(num_bits=4, symmetric=False, strategy="group", group_size=32), "pack-quantized"),
    "ct-w8-zp": lambda f: compressed(f, dict(num_bits=8, symmetric=False, strategy="channel"), "int-quantized"),
    "ct-w8-tensor": lambda f: compressed(f, dict(num_bits=8, symmetric=True, strategy="tensor"), "int-quantized"),
}

if __name__ == "__main__":
    if not (HERE / "base").exists():
        base()
    for name in sys.argv[1:] or FOLDERS:
        shutil.rmtree(HERE / name, ignore_errors=True)
        FOLDERS[name](HERE / name)
