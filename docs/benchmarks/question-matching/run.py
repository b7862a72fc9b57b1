"""Question matching: items a second of qtool beside transformers, and whether their numbers agree.

    cargo build --release --example likelihoods && cargo build --release
    python docs/benchmarks/question-matching/run.py FILE --model FOLDER --work DIR

FILE holds `text_a<TAB>text_b<TAB>label` lines; --items of them are taken, evenly
spread. FOLDER is a model in BF16 or F32; an INT8 artifact of it is made in DIR.
Each round runs every setting once, one after the other, on the same cores.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import prompts

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
AGREE = 1e-3


def run(command):
    # The variable slows PyTorch's matrix products down where it is set for NumPy's sake.
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def answers(path):
    found = [json.loads(line)["nats"] for line in Path(path).read_text().splitlines()]
    assert all(math.isfinite(n) for nats in found for n in nats)
    return found


def distance(a, b):
    """Largest relative difference of two programs' ln p, and how often they choose alike."""
    assert len(a) == len(b) and a
    worst = max(abs(x - y) / abs(y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    alike = sum((p[1] > p[0]) == (q[1] > q[0]) for p, q in zip(a, b, strict=True))
    return worst, alike / len(a)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--items", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch in transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="also let qtool score all pairs of the file, once per model")
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)

    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    pairs = prompts.read_pairs(args.file)
    count = min(args.items, len(pairs))
    chosen = [pairs[i * len(pairs) // count] for i in range(count)]
    questions = work / "questions.jsonl"
    prompts.write(questions, prompts.questions(chosen))
    int8 = work / "int8"
    if not int8.exists():
        run([ROOT / "target/release/qtool", "quantize", args.model, "-o", int8, "--bits", "8"])

    ours = ROOT / "target/release/examples/likelihoods"
    reference = [sys.executable, HERE / "reference.py"]
    threads = ["--threads", args.threads, "--batch", args.batch]
    settings = {
        "qtool, base": [ours, args.model, questions],
        "qtool, INT8": [ours, int8, questions],
        "qtool, base, no shared prefixes": [ours, args.model, questions, "--alone"],
        "transformers f32, plain": [*reference, args.model, questions, "--setting", "plain", *threads],
        "transformers f32, lean": [*reference, args.model, questions, "--setting", "lean", *threads],
        "transformers f32, cached": [*reference, args.model, questions, "--setting", "cached", *threads],
    }
    rates = {name: [] for name in settings}
    found = {}
    for number in range(args.rounds):
        for name, command in settings.items():
            out = work / f"answers-{list(settings).index(name)}.jsonl"
            at = 3 if command[0] == ours else 4
            took = json.loads(run([*command[:at], out, *command[at:]]))
            rates[name].append(took["questions"] / took["seconds"])
            found[name] = answers(out)
            print(f"round {number + 1}: {name}: {rates[name][-1]:.2f} items/s", file=sys.stderr)

    labels = [label for _, _, label in chosen]
    print(f"{platform.machine()}, {args.threads} threads, {count} of {len(pairs)} pairs, {args.rounds} rounds\n")
    print("| setting | items/s, median (least to most) | beside plain, by round | worst ln p, relative | same choice | accuracy |")
    print("|---|---|---|---|---|---|")
    truth = found["transformers f32, lean"]
    for name, each in rates.items():
        ratios = [a / b for a, b in zip(each, rates["transformers f32, plain"], strict=True)]
        worst, alike = distance(found[name], truth)
        right = sum((nats[1] > nats[0]) == (label == 1) for nats, label in zip(found[name], labels, strict=True)) / count
        spread = f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
        print(f"| {name} | {spread} | {statistics.median(ratios):.2f} | {worst:.1e} | {alike:.1%} | {right:.1%} |")
    print(f"\nA constant answer reaches {max(sum(labels), count - sum(labels)) / count:.1%}.")
    best = max((name for name in rates if name.startswith("transformers")), key=lambda n: statistics.median(rates[n]))
    for name in ("qtool, base", "qtool, INT8"):
        ratios = [a / b for a, b in zip(rates[name], rates[best], strict=True)]
        print(f"{name}: {statistics.median(ratios):.2f} x {best}, its best setting")
    base, _ = distance(found["qtool, base"], truth)
    print(f"log-likelihoods of the base {'agree' if base <= AGREE else 'DO NOT AGREE'} with transformers: {base:.1e}, bound {AGREE:.0e}")

    if args.all:
        prompts.write(questions, prompts.questions(pairs))
        for name in ("qtool, base", "qtool, INT8"):
            out = work / "answers-all.jsonl"
            command = settings[name]
            took = json.loads(run([*command[:3], out]))
            print(f"{name}, all {len(pairs)} pairs: {took['questions'] / took['seconds']:.2f} items/s, {took['tokens_run']} tokens, {took['seconds']:.1f} s")
    if base > AGREE:
        sys.exit(1)


if __name__ == "__main__":
    main()
