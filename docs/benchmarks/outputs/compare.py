#!/usr/bin/env python3
"""Compares what qtool computes with a model and what Hugging Face transformers computes with it.

    pip install torch==2.15.0 transformers==5.23.0 tokenizers==0.23.3
    cargo build --release --example outputs
    python docs/benchmarks/outputs/compare.py language MODEL TEXT [--windows 12]
    python docs/benchmarks/outputs/compare.py encoder MODEL PAIRS

`language`: perplexity of TEXT over windows of 512 tokens spread over it, by both; fails above 1e-3 relative.
`encoder`: PAIRS is a file of two texts a line with a tab between; mean-pooled vectors of both, and their cosine;
fails when a vector differs by more than 1e-4 of its largest value.
Both print one JSON object. The forward pass of transformers is in f32.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
CONTEXT = 512


def ours(program, model, lines):
    done = subprocess.run([program, model], input="".join(json.dumps(line) + "\n" for line in lines), text=True,
                          stdout=subprocess.PIPE, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(lines) > 0
    return answers


def language(args):
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    available = len(ids) // CONTEXT
    count = min(args.windows, available)
    starts = [i * available // count * CONTEXT for i in range(count)]
    windows = [ids[start:start + CONTEXT] for start in starts]
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    theirs = []
    with torch.no_grad():
        for window in windows:
            row = torch.tensor([window])
            logits = model(input_ids=row).logits[0, :-1].double()
            theirs.append(logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0])
    got = [torch.tensor(line, dtype=torch.float64) for line in ours(args.program, args.model, windows)]
    perplexities = [math.exp(-torch.cat(values).mean().item()) for values in (got, theirs)]
    off = abs(perplexities[0] / perplexities[1] - 1)
    worst = (torch.cat(got) - torch.cat(theirs)).abs().max().item()
    return off <= 1e-3, dict(windows=count, tokens=count * (CONTEXT - 1), perplexity_qtool=perplexities[0],
                             perplexity_transformers=perplexities[1], relative_difference=off,
                             largest_difference_of_a_token_in_nats=worst)


def encoder(args):
    pairs = [line.split("\t") for line in args.text.read_text(encoding="utf-8").splitlines() if line]
    assert pairs and all(len(pair) == 2 for pair in pairs)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    tokenizer.no_padding()
    rows = [tokenizer.encode(text).ids for pair in pairs for text in pair]
    model = transformers.AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = torch.stack([model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows])
    lines = [[row, [0] * len(row)] for row in rows]
    got = torch.tensor([line["mean"] for line in ours(args.program, args.model, lines)])
    off = ((got - theirs).abs().amax(1) / theirs.abs().amax(1)).max().item()
    cosines = [[torch.cosine_similarity(v[2 * i], v[2 * i + 1], dim=0).item() for i in range(len(pairs))]
               for v in (got, theirs)]
    return off <= 1e-4, dict(
        largest_relative_difference=off,
        pairs=[dict(a=a, b=b, cosine_qtool=round(x, 6), cosine_transformers=round(y, 6))
               for (a, b), x, y in zip(pairs, *cosines)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["language", "encoder"])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--program", default=ROOT / "target/release/examples/outputs", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    passed, result = (language if args.kind == "language" else encoder)(args)
    print(json.dumps(dict(torch=torch.__version__, transformers=transformers.__version__, passed=passed, **result),
                     indent=1, ensure_ascii=False))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
