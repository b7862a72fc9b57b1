#!/usr/bin/env python3
"""Times qtool's forward pass beside PyTorch's, in turn on the same cores, and prints a Markdown table.

    cargo build --release && cargo build --release --example forward
    DIR/venv/bin/python docs/benchmarks/cpu-forward/run.py --work DIR

DIR is the folder of the quality benchmark: its `prepare.py` has made `DIR/base`, its requirements are in `DIR/venv`.
Every round asks each contestant once, so that a busy machine disturbs all of them alike; figures are medians of
rounds, and ratios are medians of the rounds' ratios.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Set for old OpenBLAS builds on some machines; they slow current numeric libraries.
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[3]
ARTIFACTS = {"int8": ["--bits", "8"], "int4-g64": ["--bits", "4", "--group-size", "64"], "wint2": ["--bits", "2"]}
PROMPT, STEPS = 512, 32


class Qtool:
    """The example program, asked line by line."""

    def __init__(self, program, folder, threads):
        env = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([program, str(folder)], stdin=pipe, stdout=pipe, text=True, env=env)

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if len(answer) != 2:
            sys.exit(f"the forward example stopped at {line!r}; see its message above")
        return float(answer[0]), int(answer[1])

    def prefill(self):
        return self.ask(f"prefill {PROMPT} last")

    def decode(self):
        return self.ask(f"decode {PROMPT // 8} {STEPS}")


class Torch:
    """Transformers' model in one float type."""

    def __init__(self, folder, dtype):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.vocabulary = self.model.config.vocab_size

    def prompt(self, n):
        return torch.tensor([[(i * 7919 + 13) % self.vocabulary for i in range(n)]])

    @torch.inference_mode()
    def prefill(self):
        ids = self.prompt(PROMPT)
        start = time.perf_counter()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start, int(out.logits[0, -1].argmax())

    @torch.inference_mode()
    def decode(self):
        out = self.model(self.prompt(PROMPT // 8), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - start, int(out.logits[0, -1].argmax())


def prepare(work, qtool):
    """The base in F32, and the artifacts, where they are not there yet."""
    base, out = work / "base", work / "cpu-forward"
    out.mkdir(exist_ok=True)
    folders = {"bf16": base, "f32": out / "f32"}
    if not (folders["f32"] / "model.safetensors").exists():
        folders["f32"].mkdir(exist_ok=True)
        tensors = load_file(base / "model.safetensors")
        save_file({k: v.float() for k, v in tensors.items()}, folders["f32"] / "model.safetensors")
        (folders["f32"] / "config.json").write_bytes((base / "config.json").read_bytes())
    for name, options in ARTIFACTS.items():
        folders[name] = out / name
        if not folders[name].exists():
            subprocess.run([qtool, "quantize", base, "-o", folders[name], *options], check=True, stdout=subprocess.DEVNULL)
    return folders


def race(contestants, act, rounds):
    """Seconds of each contestant in each round, after one round to warm up; and the tokens they end in."""
    seconds = {name: [] for name in contestants}
    tokens = {}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            taken, tokens[name] = getattr(contestant, act)()
            if number:
                seconds[name].append(taken)
            print(f"{act} round {number} {name}: {taken:.3f} s", file=sys.stderr)
    return seconds, tokens


def ratio(seconds, name, base):
    return statistics.median(b / a for a, b in zip(seconds[name], seconds[base]))


def main():
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--qtool", default=ROOT / "target/release/qtool")
    parser.add_argument("--program", default=ROOT / "target/release/examples/forward")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folders = prepare(args.work, args.qtool)
    ours = {name: Qtool(args.program, folder, args.threads) for name, folder in folders.items()}
    theirs = {
        "torch-f32": Torch(folders["bf16"], torch.float32),
        "torch-bf16": Torch(folders["bf16"], torch.bfloat16),
    }

    load = os.getloadavg()[0]
    print(f"{args.rounds} rounds, {args.threads} threads, load average {load:.1f} at the start; "
          f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}.\n")
    contestants = {"bf16": ours["bf16"], "int4-g64": ours["int4-g64"], "wint2": ours["wint2"], **theirs}
    seconds, tokens = race(contestants, "prefill", args.rounds)
    if tokens["bf16"] != tokens["torch-f32"]:
        sys.exit(f"the next token differs: {tokens}")
    print(f"| {PROMPT} tokens of prompt | median s | least s | tokens/s (median) | times PyTorch f32 |\n|---|---|---|---|---|")
    for name, taken in seconds.items():
        label = name if name.startswith("torch") else f"qtool {name}"
        middle = statistics.median(taken)
        print(f"| {label} | {middle:.3f} | {min(taken):.3f} | {PROMPT / middle:.0f} | {ratio(seconds, name, 'torch-f32'):.2f} |")

    contestants = {**ours, "torch-f32": theirs["torch-f32"]}
    seconds, _ = race(contestants, "decode", args.rounds)
    print(f"\n| {STEPS} single tokens | tokens/s (median) | tokens/s (best) | times qtool f32 |\n|---|---|---|---|")
    for name, taken in seconds.items():
        label = name if name.startswith("torch") else f"qtool {name}"
        middle, best = statistics.median(taken), min(taken)
        print(f"| {label} | {STEPS / middle:.1f} | {STEPS / best:.1f} | {ratio(seconds, name, 'f32'):.2f} |")


if __name__ == "__main__":
    main()
