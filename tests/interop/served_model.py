#!/usr/bin/env python3
"""qtool asking a real server: llama-cpp-python serving SmolLM2 on loopback.

    cargo build --release --example served
    pip install 'llama-cpp-python[server]==0.3.36'        (a source build: minutes)
    python tests/interop/served_model.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Run by hand; the build is too long for every change. What is checked:

* what the first meeting finds out. This server's echo is off by one position
  (each token is given the log-probability that it has one step later), so qtool
  must refuse it and fall back to next tokens; its repetition penalty is switched off
* ln p of single-token answers, texts and chats, against llama.cpp itself in a
  process of its own: logits of the last position, log-softmax in f64
* greedy replies against the same, token by token
* replies held to a JSON schema parse, all of them
* 64 questions under way at once, and the server killed in the middle: every
  question is answered or counted

Prints a line for each check; status 1 when any failed.
"""

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The capital of France is",
    "One, two, three, four,",
    "Water boils at one hundred degrees",
    "The opposite of hot is",
    "My name is",
]
QUESTIONS = ["Say yes or no: is water wet?", "Answer 0 or 1: is two more than one?", "Is Paris in France? Answer yes or no."]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(gguf, port, log):
    command = [sys.executable, "-m", "llama_cpp.server", "--model", gguf, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_ctx", "1024", "--logits_all", "true", "--seed", "1"]
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).read()
            return server
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.5)
    server.kill()
    raise SystemExit("the server did not start")


class Reference:
    """llama.cpp in this process: the same library, none of the server's code."""

    def __init__(self, gguf):
        from llama_cpp import Llama

        self.model = Llama(gguf, n_ctx=1024, logits_all=True, verbose=False)

    def last(self, ids):
        import numpy as np

        self.model.reset()
        self.model.eval(ids)
        logits = np.array(self.model.scores[len(ids) - 1], dtype=np.float64)
        return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())

    def ids(self, text, special=True):
        return self.model.tokenize(text.encode(), add_bos=False, special=special)

    def text(self, token):
        return self.model.detokenize([token]).decode(errors="replace")

    def greedy(self, text, most):
        """Token by token on the cache, as the server does: a prompt run anew at every step gives other last bits, and
        with this model's 4-bit weights other favourites where two are 0.1 nats apart."""
        import numpy as np

        ids = self.ids(text)
        self.model.reset()
        self.model.eval(ids)
        own = []
        while len(own) < most:
            token = int(np.argmax(self.model.scores[len(ids) + len(own) - 1]))
            if token == self.model.token_eos():
                break
            own.append(token)
            self.model.eval([token])
        return self.model.detokenize(own).decode()


def ask(example, url, jobs, folder, concurrency=8, retries=2):
    """Answers of examples/served.rs, a JSON value a job, and what it says of the server."""
    given, found = folder / "jobs.jsonl", folder / "found.jsonl"
    given.write_text("".join(json.dumps(j) + "\n" for j in jobs))
    command = [example, url, given, found, str(concurrency), str(retries)]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [json.loads(line) for line in found.read_text().splitlines()], json.loads(done.stdout)


def chat(content):
    return [{"role": "user", "content": content}]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--example", type=Path, default=ROOT / "target/release/examples/served")
    args = parser.parse_args()
    failed = []

    def check(name, good, detail=""):
        print(f"{'passed' if good else 'FAILED'}  {name}{': ' + str(detail) if detail else ''}", flush=True)
        if not good:
            failed.append(name)

    reference = Reference(args.gguf)
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as log:
        folder, port = Path(name), free_port()
        url = f"http://127.0.0.1:{port}"
        server = start(args.gguf, port, log)
        try:
            # The three likeliest next tokens of each text, as answers.
            jobs, expected = [], []
            for text in TEXTS:
                logp = reference.last(reference.ids(text))
                top = [int(t) for t in logp.argsort()[::-1][:3]]
                jobs.append({"prompt": text, "answers": [reference.text(t) for t in top]})
                expected.append([float(logp[t]) for t in top])
            found, met = ask(args.example, url, jobs, folder)
            notes = " | ".join(met["notes"])
            check("the false echo is found out", "echo is not used" in notes, notes)
            misses = [f for f in found if "nats" not in f]
            worst = max(abs(a - b) / abs(b) for f, e in zip(found, expected, strict=True) if "nats" in f for a, b in zip(f["nats"], e, strict=True))
            check("ln p of next tokens of texts", not misses and worst < 1e-2, f"worst {worst:.1e} relative; {len(misses)} missed")

            found, _ = ask(args.example, url, [{"prompt": t, "most": 12} for t in TEXTS], folder)
            same = [f.get("text") == reference.greedy(t, 12) for t, f in zip(TEXTS, found, strict=True)]
            check("greedy replies", all(same), f"{sum(same)} of {len(same)} equal; the first is {found[0].get('text')!r}")

            schema = {"type": "object", "properties": {"result": {"enum": [0, 1]}}, "required": ["result"]}
            jobs = [{"messages": chat(f"{q} Reply as JSON with the key result."), "most": 24, "schema": schema} for q in QUESTIONS]
            found, met = ask(args.example, url, jobs, folder)
            good = 0
            for f in found:
                try:
                    good += json.loads(f["text"])["result"] in (0, 1)
                except (KeyError, ValueError, TypeError):
                    print("   ", f)
            check("replies held to a schema", good == len(jobs), f"{good} of {len(jobs)}; {[n for n in met['notes'] if 'format' in n]}")

            jobs = [{"messages": chat(q), "answers": ["Yes", "No"]} for q in QUESTIONS]
            found, _ = ask(args.example, url, jobs, folder)
            counted = sum("nats" in f or f.get("kind") == "not among next tokens" for f in found)
            check("chats are scored or missed by name", counted == len(jobs), found)

            jobs = [{"prompt": f"Question {i}: {t}", "most": 8} for i in range(13) for t in TEXTS]
            found, met = ask(args.example, url, jobs, folder, concurrency=64)
            answered = sum("text" in f for f in found)
            check("64 at once", answered == len(jobs), f"{answered} of {len(jobs)} in {met['seconds']:.1f} s")

            given, out = folder / "jobs.jsonl", folder / "killed.jsonl"
            given.write_text("".join(json.dumps(j) + "\n" for j in jobs))
            command = [str(args.example), url, str(given), str(out), "8", "2"]
            asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            asking.stderr.readline()  # it has met the server
            time.sleep(max(2, met["seconds"] / 3))
            server.send_signal(signal.SIGKILL)
            asking.communicate(timeout=300)
            found = [json.loads(line) for line in out.read_text().splitlines()]
            kept, kinds = sum("text" in f for f in found), sorted({f["kind"] for f in found if "kind" in f})
            good = asking.returncode == 0 and len(found) == len(jobs) and kept > 0 and kept < len(jobs)
            check("the server dies under way", good, f"{kept} of {len(jobs)} answered, the others {kinds}")
        finally:
            server.kill()
            server.wait()
    print(f"{len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
