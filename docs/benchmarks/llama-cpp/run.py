#!/usr/bin/env python3
"""Runs GGUF exports by llama.cpp and compares it with qtool's own forward pass on the same artifact.

    pip install -r docs/benchmarks/llama-cpp/requirements.txt      (a source build: minutes)
    cargo build --release --bin qtool --example outputs
    python docs/benchmarks/llama-cpp/run.py --model MODEL --text TEXT [--case NAME ...] [--gguf FILE] [--decoded]

MODEL is quantized by each recipe of CASES, exported with --to gguf, and read by llama.cpp:

* the tokens of TEXT, against the model's own tokenizer (the library tokenizers);
* the likeliest next token after each of 100 prompts of 64 tokens (--length);
* ln p of every token of these prompts: their mean as perplexity, and the distance of single ones.

An encoder is asked for the mean of its last hidden states, or the logits of its head, instead. With --gguf both run that
file of somebody else's instead, and MODEL gives the tokenizer alone. Prints a row of a table a case; a recipe that qtool
refuses for the model's shapes is a row with its sentence; status 1 when a bound is broken. llama.cpp's CPU backend rounds
activations to 8 bits before it multiplies them with quantized weights, so a next token may differ where two are nearly as
likely: such a one is counted, and fails above LEAD nats. Two ways around that rounding: llama.cpp built with BLAS, and
--decoded, where llama.cpp is given every tensor as F32, decoded by gguf-py. In both every next token is to be the same.
The first line says which backend multiplies.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import control

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = 100
THREADS = 1  # more of them wait for each other on a shared machine
PERPLEXITY = 0.01  # relative
LEAD = 0.35  # nats by which the own choice may lead where llama.cpp's differs
VECTOR = 0.02  # of an encoder: difference as a share of the largest value
F16 = ("--scale-dtype", "f16")
CASES = {
    # All but one small matrix stays in BF16.
    "BF16": ("--bits", "8", *F16, "--skip", r"layers?\.\d\d|layers?\.[1-9]|(q|v|o|gate|up|down)_proj|query|value|dense"),
    "Q8_0": ("--bits", "8", "--group-size", "32", *F16),
    "Q4_0": ("--bits", "4", "--group-size", "32", *F16),
    "Q4_1": ("--bits", "4", "--group-size", "32", "--asymmetric", *F16, "--scale-bits", "7"),
    "Q4_K": ("--bits", "4", "--method", "q4-k"),
    "Q2_K": ("--bits", "2", "--method", "q2-k"),
    # For models whose narrow matrices have rows that 256 does not divide.
    "Q4_K, Q8_0": ("--bits", "8", "--group-size", "32", *F16, "--rule", "down_proj=bits:4,method:q4-k"),
    "Q2_K, Q8_0": ("--bits", "8", "--group-size", "32", *F16, "--rule", "down_proj=bits:2,method:q2-k"),
    # Kept matrices are in the model's own type, which is made F16 for it.
    "F16": None,
}
CASES["F16"] = CASES["BF16"]
REFUSED = ("whole number of GGML's blocks", "multiple of 256")


def call(*command, given=None):
    done = subprocess.run([str(part) for part in command], input=given, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def outputs(args, artifact, rows, *flags):
    given = "".join(json.dumps(row) + "\n" for row in rows)
    answers = [json.loads(line) for line in call(args.outputs, artifact, *flags, given=given).splitlines()]
    assert len(answers) == len(rows) > 0
    return answers


def halved(model, folder):
    """The model with all floats as F16."""
    folder.mkdir()
    for path in model.iterdir():
        if path.is_file() and not path.name.endswith(".safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    (file,) = model.glob("*.safetensors")
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data, at = json.loads(raw[8:8 + size]), [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw[start:end], dtype="<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw[start:end], dtype={"F16": "<f2", "F32": "<f4"}[entry["dtype"]])
        halves = values.astype("<f2")
        assert np.isfinite(halves).all(), name
        data.append(halves.tobytes())
        entry.update(dtype="F16", data_offsets=[at, at + len(data[-1])])
        at += len(data[-1])
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
    return folder


def opened(path, **options):
    import llama_cpp

    return llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, verbose=False, n_threads=THREADS, n_threads_batch=THREADS, **options)


def language_model(path):
    """All logits; keys and values cached as F32."""
    import llama_cpp

    return opened(path, logits_all=True, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def decoder(args, artifact, gguf, tokenizer, text):
    """Compares a language model; returns the row's cells and whether they keep the bounds."""
    model = language_model(gguf)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    some = text[:20_000]
    theirs = model.tokenize(some.encode(), add_bos=False, special=True)
    same_tokens = theirs == tokenizer.encode(some, add_special_tokens=False).ids
    count = min(PROMPTS, len(ids) // args.length)
    starts = [i * (len(ids) // args.length) // count * args.length for i in range(count)]
    prompts = [ids[start:start + args.length] for start in starts]
    own = outputs(args, artifact, prompts, "--next")
    differ, nats, apart = [], 0.0, []
    for prompt, answer in zip(prompts, own):
        model.reset()
        model.eval(prompt)
        logits = log_softmax(np.array(model.scores[:len(prompt)], dtype=np.float64))
        if int(logits[-1].argmax()) != answer["next"]:
            differ.append(answer["lead"])
        ln_p = logits[np.arange(len(prompt) - 1), prompt[1:]]
        nats -= ln_p.sum()
        apart.append(np.abs(ln_p - np.array(answer["ln_p"])))
    apart = np.concatenate(apart)
    mine = math.exp(-sum(sum(answer["ln_p"]) for answer in own) / len(apart))
    other = math.exp(nats / len(apart))
    off = other / mine - 1
    leads = np.median([answer["lead"] for answer in own])
    cells = [f"{'equal' if same_tokens else 'OTHER'} ({len(theirs)})", f"{count - len(differ)} of {count}",
             f"{max(differ):.3f}" if differ else "", f"{leads:.2f}", f"{mine:.4g}", f"{other:.4g}", f"{off * 100:+.3f} %",
             f"{apart.mean():.4f}, {apart.max():.3f}"]
    return cells, same_tokens and abs(off) <= PERPLEXITY and max(differ, default=0) <= LEAD


def encoder(args, artifact, gguf, tokenizer, text):
    """Compares an encoder: logits of its head where it has one, else mean-pooled vectors."""
    import llama_cpp

    texts = [text[at:at + 160] for at in range(0, min(len(text), 3200), 160)]
    rows = [tokenizer.encode(each).ids for each in texts]
    own = outputs(args, artifact, [[row, [0] * len(row)] for row in rows])
    headed = own[0]["logits"] is not None
    kind = llama_cpp.LLAMA_POOLING_TYPE_RANK if headed else llama_cpp.LLAMA_POOLING_TYPE_MEAN
    model = opened(gguf, embedding=True, pooling_type=kind)
    same_tokens = all(model.tokenize(each.encode(), special=True) == row for each, row in zip(texts, rows))
    worst = 0.0
    for each, answer in zip(texts, own):
        mine = np.array(answer["logits"] if headed else answer["mean"])
        theirs = np.array(model.embed(each, normalize=False), dtype=np.float64).reshape(-1)[:len(mine)]
        worst = max(worst, np.abs(theirs - mine).max() / np.abs(mine).max())
    cells = ["equal" if same_tokens else "OTHER", f"{len(texts)} texts, {'logits' if headed else 'means'}", "", "", "", "",
             f"{worst * 100:.3f} %", ""]
    return cells, same_tokens and worst <= VECTOR


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--gguf", type=Path, help="a file to run instead of exports")
    parser.add_argument("--decoded", action="store_true", help="llama.cpp runs the file with all tensors decoded to F32")
    parser.add_argument("--option", action="append", default=[], help="more for qtool quantize, such as --option=--rule --option=X")
    parser.add_argument("--qtool", type=Path, default=ROOT / "target/release/qtool")
    parser.add_argument("--outputs", type=Path, default=ROOT / "target/release/examples/outputs")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    text = args.text.read_text("utf-8")
    kind = json.loads((args.model / "config.json").read_text("utf-8"))["model_type"]
    print(f"{args.model.name} ({kind})")
    print("| case | tokens | next token | lead where not | lead, median | perplexity, qtool | llama.cpp | apart | ln p apart: mean, most |")
    print("|---|---|---|---|---|---|---|---|---|")
    failed, told = 0, None
    compare = encoder if kind == "bert" else decoder
    for name in ["as it lies"] if args.gguf else args.case or CASES:
        with tempfile.TemporaryDirectory(prefix="qtool-llama-cpp-") as folder:
            if args.gguf:
                artifact = gguf = args.gguf
            else:
                artifact, gguf = Path(folder) / "artifact", Path(folder) / "gguf" / "model.gguf"
                model = halved(args.model, Path(folder) / "halves") if name == "F16" else args.model
                try:
                    call(args.qtool, "quantize", model, "-o", artifact, *CASES[name], *args.option, "-q")
                    call(args.qtool, "export", artifact, "--to", "gguf", "-o", gguf.parent, "-q")
                except RuntimeError as error:
                    if not any(words in str(error) for words in REFUSED):
                        raise
                    print(f"| {name} | refused: {str(error).splitlines()[-1].split(': ', 1)[-1]} | | | | | | | |", flush=True)
                    continue
            if args.decoded:
                plain = Path(folder) / "decoded.gguf"
                assert control.decoded(gguf, plain), "nothing was quantized"
                gguf = plain
            made = control.products(language_model, gguf) if compare == decoder else told
            if made != told:
                print(f"| products: {made} | | | | | | | | |", flush=True)
                told = made
            cells, good = compare(args, artifact, gguf, tokenizer, text)
        failed += not good
        print("| " + " | ".join([name + ("" if good else " FAILED"), *cells]) + " |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
