#!/usr/bin/env python3
"""Small random models of the architectures that no sample of the repository has, for run.py.

    pip install torch transformers
    python docs/benchmarks/llama-cpp/models.py FOLDER

Writes FOLDER/qwen2, FOLDER/qwen3, FOLDER/llama and FOLDER/bert. A random model's predictions are flat, and then any two
programs differ by chance: the output head is made so large here that the likeliest token leads by about a nat (run.py
prints the median). Tokenizers are those of the repository's samples. Rows are multiples of 256, so that K types fit.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import (BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "tests" / "models" / "tiny-ernie45"
ENCODER = ROOT / "tests" / "golden" / "encoders" / "bert"
HEAD = 0.4  # standard deviation of the output head's weights


def filled(model, head=None):
    torch.manual_seed(7)
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 0.1 if value.dim() < 2 else head if head and "lm_head" in name else 0.06
            value.copy_(torch.randn_like(value) * spread + ("norm" in name.lower() and name.endswith("weight")))
    return model


def save(model, folder, tokenizer):
    model.save_pretrained(folder)
    for path in tokenizer.glob("*token*.json"):
        shutil.copy(path, folder)


def main():
    out = Path(sys.argv[1])
    for name, config, kind in (("llama", LlamaConfig, LlamaForCausalLM), ("qwen2", Qwen2Config, Qwen2ForCausalLM),
                               ("qwen3", Qwen3Config, Qwen3ForCausalLM)):
        shape = config(vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=128 if name == "qwen3" else 64, max_position_embeddings=512,
                       bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
        save(filled(kind(shape), HEAD), out / name, SAMPLE)
    vocabulary = json.loads((ENCODER / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    shape = BertConfig(vocab_size=len(vocabulary), hidden_size=256, intermediate_size=512, num_hidden_layers=3,
                       num_attention_heads=4, max_position_embeddings=512)
    save(filled(BertModel(shape, add_pooling_layer=False)), out / "bert", ENCODER)


if __name__ == "__main__":
    main()
