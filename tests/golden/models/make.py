#!/usr/bin/env python3
"""Makes the tiny random models of this folder, and what Hugging Face transformers computes with them.

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/models/make.py

For each architecture: NAME/config.json and model.safetensors (F32), and NAME/golden.safetensors:
    ids.I       I64 (T): token ids of sequence I; lengths differ
    logits.I    F32 (T, V): logits of that sequence run alone
    padded.I    F32 (T, V): logits of the same tokens when the sequences run as one left-padded batch
    reply       I64 (8): greedy continuation of sequence 0
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (Ernie4_5_MoeConfig, Ernie4_5Config, LlamaConfig, MistralConfig, Qwen2Config,
                          Qwen3Config)

HERE = Path(__file__).parent
COMMON = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
              bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
CASES = {
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=False, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**COMMON, head_dim=32, sliding_window=64),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=32),
    "ernie45": Ernie4_5Config(**COMMON, head_dim=32, use_bias=False, tie_word_embeddings=True),
    "ernie45-moe": Ernie4_5_MoeConfig(
        **COMMON, moe_intermediate_size=64, moe_num_experts=6, moe_k=2, moe_num_shared_experts=2,
        moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1, tie_word_embeddings=True),
}
LENGTHS = [23, 9, 40, 1]


def make(name, config, seed):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Larger than usual initial weights: attention and routing must matter in the logits.
            value.copy_(torch.randn_like(value) * (0.3 if value.dim() < 2 else 0.15) + ("norm" in key))
        for key, value in model.named_buffers():
            if "correction_bias" in key:
                value.copy_(torch.randn_like(value) * 0.05)
    ids = [torch.randint(3, config.vocab_size, (n,)) for n in LENGTHS]
    out = {}
    with torch.no_grad():
        width = max(LENGTHS)
        batch = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, tokens in enumerate(ids):
            batch[row, width - len(tokens):] = tokens
            mask[row, width - len(tokens):] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together = model(input_ids=batch, attention_mask=mask, position_ids=positions).logits
        for row, tokens in enumerate(ids):
            out[f"ids.{row}"] = tokens
            out[f"logits.{row}"] = model(input_ids=tokens[None]).logits[0].contiguous()
            out[f"padded.{row}"] = together[row, width - len(tokens):].contiguous()
        reply = model.generate(ids[0][None], max_new_tokens=8, do_sample=False, eos_token_id=None)
        out["reply"] = reply[0, len(ids[0]):].contiguous()
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(out, folder / "golden.safetensors")
    assert (out["logits.0"] - out["padded.0"]).abs().max() < 1e-4, name
    print(name, sum(p.numel() for p in model.parameters()), "parameters", out["reply"].tolist())


if __name__ == "__main__":
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for seed, (name, config) in enumerate(CASES.items()):
        make(name, config, seed)
