#!/usr/bin/env python3
"""Trains the tokenizer and the two sample models of this folder, on a CPU.

    python handbook.py --deb debian-handbook_*.deb --out TEXT
    python train.py tokenizer --text TEXT
    python train.py dense     --text TEXT --curve dense.jsonl
    python train.py moe       --text TEXT --curve moe.jsonl

`dense` writes tiny-ernie45/, `moe` writes tiny-ernie45-moe/, next to this file
(or under --out).  The models are transformers' own Ernie4_5ForCausalLM and
Ernie4_5_MoeForCausalLM.  Weights are kept in float32 while training, the
arithmetic is bfloat16 autocast; what is stored is the checkpoint with the
best held-out loss, in bfloat16 (the router and its bias in float32).

Every half epoch one JSON line is printed, and appended to the file --curve.
Training stops when the held-out loss has not improved for PATIENCE
evaluations, or after EPOCHS epochs.  With --max-minutes the learning-rate
schedule is squeezed, if need be, so that it ends within that time.  --resume
goes on from the stored model, with a new schedule (and a fresh optimizer).
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sample_models import FOLDERS, SEED, Routers, new_model, save_model
from sample_tokenizer import read_texts, train_tokenizer
from tokenizers import Tokenizer

# Training.
EPOCHS = {"dense": 10, "moe": 9}
PATIENCE = 4  # evaluations, that is two epochs
BATCH_TOKENS = 2048
SHORT, LONG = 256, 512  # context: short windows first (cheaper), then long ones
SHORT_SHARE = 0.6
PEAK_LR, RESUME_LR, END_LR, WARMUP_STEPS = 1.5e-3, 1.2e-3, 5e-5, 100
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
BOS_SHARE = 0.1  # share of the training windows that start with <s>
BALANCE_RATE = 1e-3  # step of the experts' selection bias
BALANCE_LOSS = 0.02  # weight of the load-balancing loss (Switch Transformer)


def losses(model, windows):
    """Per-token loss (nats) of predicting each window's tokens but the first."""
    hidden = model.model(windows[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def heldout_loss(model, ids):
    """Mean loss over disjoint windows of LONG tokens."""
    model.eval()
    windows = ids[: len(ids) // LONG * LONG].view(-1, LONG)
    with torch.autocast("cpu", torch.bfloat16):
        total = sum(losses(model, part).sum().item() for part in windows.split(8))
    model.train()
    return total / (windows.numel() - len(windows))


def epoch_windows(ids, context, generator):
    """All training text, cut at a random offset, in windows in random order."""
    windows = []
    for text in ids.values():
        start = int(torch.randint(context, (1,), generator=generator))
        count = (len(text) - start - 1) // context
        cut = text[start : start + count * context + 1]
        windows.append(cut.unfold(0, context + 1, context))
    windows = torch.cat(windows)
    windows = windows[torch.randperm(len(windows), generator=generator)].clone()
    windows[torch.rand(len(windows), generator=generator) < BOS_SHARE, 0] = 1
    return windows


def train(kind, text_folder, out, curve, max_minutes, resume):
    folder = out / FOLDERS[kind]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {
        part: {
            x: torch.tensor(tokenizer.encode(text).ids)
            for x, text in read_texts(text_folder, part).items()
        }
        for part in ("train", "heldout")
    }
    per_epoch = sum(len(t) for t in ids["train"].values()) // BATCH_TOKENS
    total = per_epoch * EPOCHS[kind]
    model = new_model(kind)
    if resume:
        stored = type(model).from_pretrained(folder, dtype=torch.bfloat16).float()
        model.load_state_dict(stored.state_dict())
    model.train()
    routers = Routers(model)
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}]
    groups += [{"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(SEED + resume)
    peak = RESUME_LR if resume else PEAK_LR
    started, best, bad, batches = time.time(), math.inf, 0, []
    sum_loss, sum_steps = 0.0, 0
    for step in range(1, total + 1):
        done = max(step / total, (time.time() - started) / 60 / max_minutes)
        if not batches:
            context = SHORT if done < SHORT_SHARE else LONG
            windows = epoch_windows(ids["train"], context, generator)
            batches = list(windows.split(BATCH_TOKENS // context))
        lr = END_LR + (peak - END_LR) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        lr *= min(1.0, step / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses(model, batches.pop()).mean()
        (loss + BALANCE_LOSS * routers.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        routers.move_bias(BALANCE_RATE * lr / PEAK_LR)
        sum_loss, sum_steps = sum_loss + loss.item(), sum_steps + 1
        last = step == total or done >= 1
        if step % (per_epoch // 2) and not last:
            continue
        held = {x: heldout_loss(model, t) for x, t in ids["heldout"].items()}
        mean = sum(held[x] * len(ids["heldout"][x]) for x in held)
        mean /= sum(len(t) for t in ids["heldout"].values())
        line = {
            "epoch": round(step / per_epoch, 2),
            "step": step,
            "lr": round(lr, 6),
            "train": round(sum_loss / sum_steps, 4),  # with dropout on
            "heldout": round(mean, 4),
            **{f"heldout.{x}": round(value, 4) for x, value in held.items()},
            "minutes": round((time.time() - started) / 60, 1),
        }
        print(json.dumps(line), flush=True)
        if curve:
            with open(curve, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        sum_loss, sum_steps, bad = 0.0, 0, bad + 1
        if mean < best:
            best, bad = mean, 0
            save_model(model, kind, folder)
        if bad >= PATIENCE or last:
            break


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tokenizer", "dense", "moe"))
    parser.add_argument("--text", required=True, help="folder written by handbook.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--curve", help="file for the loss curve (JSON lines)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-minutes", type=float, default=math.inf)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "tokenizer":
        train_tokenizer(args.text, args.out)
    else:
        train(args.what, args.text, args.out, args.curve, args.max_minutes, args.resume)


if __name__ == "__main__":
    main()
