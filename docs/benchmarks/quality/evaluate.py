"""How far a candidate model is from the base: perplexity, KL divergence, top-1 agreement.

    python evaluate.py --work DIR CANDIDATE [--windows 24] [--json]

CANDIDATE is a Hugging Face folder with dequantized weights (BF16 or F32; tied
or untied).  The base is DIR/smollm2, the texts DIR/eval/*.txt; of each, 24
windows of 512 tokens, spread evenly, are run and every token but a window's
first is scored.  KL is KL(base || candidate) in nats over the full vocabulary,
per token, everything in f32.  Of the base, the output of its last norm and the
logits' normalizers are stored below DIR/cache; logits are made from them again.

`+-` is one standard error over windows.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch

import windows

WINDOWS = 24
CHUNK = 512  # positions whose logits are held at once


@torch.inference_mode()
def hidden_states(model, ids):
    """Outputs of the last norm, [windows * (context - 1), d]: one row per scored token."""
    rows = []
    for window in ids:
        states = model.model(window[None], use_cache=False).last_hidden_state[0, :-1]
        rows.append(states.float())
    return torch.cat(rows)


def head(model):
    return model.get_output_embeddings().weight.float()


def _digest(path):
    """Enough of a model file to tell two apart: its size and the SHA-256 of every 64th MiB."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with open(path, "rb") as file:
        for at in range(0, path.stat().st_size, 64 << 20):
            file.seek(at)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def _base_states(work, texts):
    """{text: (ids, hidden states)} of the base and its head, from the cache if it is of these inputs."""
    base = work / "smollm2"
    key = hashlib.sha256(_digest(base / "model.safetensors").encode())
    for name in sorted(texts):
        key.update(name.encode() + texts[name].numpy().tobytes())
    cache = work / "cache" / f"base-{key.hexdigest()[:16]}.pt"
    if cache.exists():
        return torch.load(cache)
    model = windows.model(base)
    result = {"head": head(model).clone()}
    for name, ids in texts.items():
        result[name] = hidden_states(model, ids)
    cache.parent.mkdir(parents=True, exist_ok=True)
    part = cache.with_suffix(".part")
    torch.save(result, part)
    part.rename(cache)
    return result


@torch.inference_mode()
def compare(ids, base, candidate):
    """Figures of one text; base and candidate are (hidden states, head)."""
    targets = ids[:, 1:].reshape(-1)
    kl, nll, nll_base, same = [], [], [], []
    for at in range(0, len(targets), CHUNK):
        part = slice(at, at + CHUNK)
        log_p = torch.log_softmax(base[0][part] @ base[1].T, -1)
        log_q = torch.log_softmax(candidate[0][part] @ candidate[1].T, -1)
        chosen = targets[part, None]
        nll_base.append(-log_p.gather(1, chosen)[:, 0])
        nll.append(-log_q.gather(1, chosen)[:, 0])
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
        kl.append((log_p.exp() * log_p.sub(log_q)).sum(-1))
    kl, nll, nll_base = torch.cat(kl).double(), torch.cat(nll).double(), torch.cat(nll_base).double()
    if not torch.isfinite(kl).all():
        raise ValueError(f"{int((~torch.isfinite(kl)).sum())} tokens have a KL that is not finite")
    per_window = kl.reshape(len(ids), -1).mean(1)
    return {
        "tokens": len(targets),
        "perplexity": math.exp(nll.mean()),
        "base_perplexity": math.exp(nll_base.mean()),
        "kl_mean": kl.mean().item(),
        "kl_mean_error": (per_window.std() / math.sqrt(len(ids))).item() if len(ids) > 1 else None,
        "kl_median": kl.median().item(),
        "kl_p99": kl.quantile(0.99).item(),
        "top1": torch.cat(same).double().mean().item(),
    }


def evaluate(work, folder, count=WINDOWS):
    """{text: figures} of the candidate in `folder`, with "all" for the texts taken together."""
    work = Path(work)
    paths = sorted((work / "eval").glob("*.txt"))
    if not paths:
        raise ValueError(f"no texts in {work / 'eval'}")
    texts = {path.stem: windows.cut(windows.token_ids(work / "smollm2", path), count) for path in paths}
    base = _base_states(work, texts)
    model = windows.model(folder)
    result = {}
    for name, ids in texts.items():
        result[name] = compare(ids, (base[name], base["head"]), (hidden_states(model, ids), head(model)))
    return result


def line(name, f):
    return (
        f"{name:10} ppl {f['perplexity']:.3f} (base {f['base_perplexity']:.3f})  "
        f"KL mean {f['kl_mean']:.5f} +- {f['kl_mean_error'] or 0:.5f}  median {f['kl_median']:.5f}  "
        f"p99 {f['kl_p99']:.4f}  top-1 {100 * f['top1']:.2f} %  ({f['tokens']} tokens)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, help="the benchmark's working folder")
    parser.add_argument("candidate", help="folder of the model to judge")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of each text (default 24)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    try:
        result = evaluate(args.work, args.candidate, args.windows)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, figures in result.items():
        print(line(name, figures))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
