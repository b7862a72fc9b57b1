#!/usr/bin/env python3
"""Measures the two sample models of this folder as they lie on disk.

    python evaluate.py --text TEXT

reads them with transformers' Auto classes (BF16 weights, float32 arithmetic)
and writes figures.json: the loss on the held-out and on the beginning of the
training text, per language, and the share of tokens of each expert.

The loss is taken over disjoint windows of 512 tokens; in each window all
tokens but the first are predicted, each from the ones before it in the window.
The remaining tokens (less than one window) are left out.  "Bits per byte" is
the sum of the losses of the predicted tokens, in bits, over the number of
UTF-8 bytes which these tokens stand for.
"""

import argparse
import hashlib
import json
import math
import platform
from pathlib import Path

import safetensors
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = ("tiny-ernie45", "tiny-ernie45-moe")
WINDOW = 512
TRAIN_BYTES = 100_000  # how much of the training text is measured, per language
PROMPTS = (
    "The apt command is used to",
    "To configure the network interface, the administrator",
    "管理员可以使用",
    "Debian 软件包的",
)


def token_bytes(tokenizer):
    """How many bytes each token stands for (a byte is a character there)."""
    special = set(tokenizer.all_special_ids)
    vocab = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return torch.tensor([0 if i in special else len(token) for i, token in vocab])


@torch.no_grad()
def measure(model, tokenizer, text):
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    nats = 0.0
    for part in windows.split(4):
        logits = model(part, use_cache=False).logits[:, :-1]
        targets = part[:, 1:]
        nats += F.cross_entropy(
            logits.flatten(0, 1).double(), targets.flatten(), reduction="sum"
        ).item()
    targets = windows[:, 1:]
    size = token_bytes(tokenizer)[targets].sum().item()
    return {
        "windows": len(windows),
        "tokens_predicted": targets.numel(),
        "bytes_predicted": size,
        "nats_per_token": round(nats / targets.numel(), 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def count_experts(model):
    """Hooks on the routers; {layer: counts}, filled by every forward pass."""
    counts = {}
    for number, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "gate"):
            continue
        counts[number] = torch.zeros(layer.mlp.gate.num_experts)

        def hook(router, _, output, total=counts[number]):
            total += torch.bincount(output[2].flatten(), minlength=router.num_experts)

        layer.mlp.gate.register_forward_hook(hook)
    return counts


@torch.no_grad()
def continuation(model, tokenizer, prompt):
    torch.manual_seed(0)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=60,
        do_sample=True,
        temperature=0.7,
        top_k=40,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="folder written by handbook.py")
    parser.add_argument("--models", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
        "texts": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(args.text.glob("*.??.txt"))
        },
        "window": WINDOW,
        "models": {},
    }
    for name in MODELS:
        folder = args.models / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = model.float().eval()
        experts = count_experts(model)
        weights = (folder / "model.safetensors").read_bytes()
        result = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        for part in ("train", "heldout"):
            for language in ("en", "zh"):
                data = (args.text / f"{part}.{language}.txt").read_bytes()
                if part == "train":
                    data = data[:TRAIN_BYTES]
                for counts in experts.values():
                    counts.zero_()
                key = f"{part}.{language}"
                result[key] = measure(model, tokenizer, data.decode("utf-8", "ignore"))
                if experts and part == "heldout":
                    shares = {
                        f"layer {layer}": [round(x, 4) for x in (c / c.sum()).tolist()]
                        for layer, c in experts.items()
                    }
                    result.setdefault("expert_shares", {})[key] = shares
        result["samples"] = {p: continuation(model, tokenizer, p) for p in PROMPTS}
        figures["models"][name] = result
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    (args.models / "figures.json").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
