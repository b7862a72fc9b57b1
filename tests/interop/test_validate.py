"""`qtool validate` against transformers (log-likelihoods, perplexity, divergence) and scikit-learn (accuracy,
precision, recall, F1), on a sample model and an INT4 artifact of it."""

import json
import math

import torch
import torch.nn.functional as F
from sklearn import metrics
from transformers import AutoTokenizer

from harness import MODELS, decoder
from test_transformers import load
from test_weights import DENSE, INT4

WINDOW = 512
RELATIVE = 1e-3
CHARACTERS = 12_000  # of the held-out text, per language: about nine windows

# The built-in prompts are the tool's own; these are simple enough to be written twice.
PROMPT = '{%- set answers = ["no", "yes"] -%}{%- set lead = " " -%}Q: {{ text_a }}\nQ: {{ text_b }}\nSame:'


def validate(context, *arguments):
    """The report of a run."""
    return json.loads(context.run("validate", *arguments, "--json", "--items"))


def models(context):
    """The sample model, its artifact, and both in transformers, computing in float32."""
    folder, artifact = MODELS / DENSE, context.artifact(MODELS / DENSE, *INT4)
    base, candidate = load(folder), load(folder)
    with torch.no_grad():
        for name, values in decoder().decode(artifact).items():
            parameter = candidate.get_parameter(name)
            parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
    return folder, artifact, base, candidate


def close(got, expected, what):
    assert math.isclose(got, expected, rel_tol=RELATIVE), f"{what}: {got}, expected {expected}"


@torch.no_grad()
def test_running_text(context):
    folder, artifact, base, candidate = models(context)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = context.texts["heldout.en"][:CHARACTERS] + context.texts["heldout.zh"][:CHARACTERS]
    file = context.new("text.txt")
    file.write_text(text, encoding="utf-8")
    report = validate(context, folder, artifact, "--task", f"perplexity={file}",
                      "--task", f"divergence={file}", "--window", WINDOW)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = [ids[i:i + WINDOW] for i in range(0, len(ids), WINDOW)]
    windows = [w for w in windows if len(w) > 1]
    nats, tokens = [[], []], sum(len(w) - 1 for w in windows)
    divergence, agreed = [], 0
    for window in windows:
        targets = torch.tensor(window[1:])
        logs = [F.log_softmax(model(torch.tensor([window]), use_cache=False).logits[0, :-1].double(), -1)
                for model in (base, candidate)]
        for log, out in zip(logs, nats):
            out.append(F.nll_loss(log, targets, reduction="sum").item())
        divergence += (logs[0].exp() * (logs[0] - logs[1])).sum(-1).tolist()
        agreed += (logs[0].argmax(-1) == logs[1].argmax(-1)).sum().item()
    tasks = {task["task"]: task for task in report["tasks"]}
    rows = {row["name"]: row for task in tasks.values() for row in task["metrics"]}
    for model in (0, 1):
        mean = sum(nats[model]) / tokens
        close(rows["nats per token"]["values"][model]["value"], mean, "nats per token")
        close(rows["perplexity"]["values"][model]["value"], math.exp(mean), "perplexity")
    items = tasks["perplexity"]["items"]
    assert len(items) == len(windows)
    for item, *expected in zip(items, *nats):
        for got, nat in zip(item["nats"], expected):
            close(got, nat, f"window {item['window']}")
    close(rows["KL to base"]["values"][1]["value"], sum(divergence) / tokens, "KL")
    divergence.sort()
    for name, share in (("KL median", 0.5), ("KL p95", 0.95), ("KL p99", 0.99)):
        expected = divergence[math.ceil(share * tokens) - 1]
        close(rows[name]["values"][1]["value"], expected, name)
    assert abs(rows["top-1 agreement"]["values"][1]["value"] - agreed / tokens) < 2 / tokens
    return f"{tokens} tokens, KL {sum(divergence) / tokens:.4f} nats"


def pairs(texts, count):
    """Pairs of neighbouring and of distant words of the held-out text, with made-up labels."""
    words = " ".join(texts["heldout.en"].split()).split(". ")
    words = [w.replace("\t", " ")[:80].strip() for w in words if len(w) > 30]
    return [(words[2 * i], words[2 * i + 1], i % 3 % 2) for i in range(count)]


@torch.no_grad()
def test_answers(context):
    folder, artifact, base, candidate = models(context)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    items = pairs(context.texts, 40)
    data, prompt = context.new("pairs.tsv"), context.new("prompt.jinja")
    data.write_text("".join(f"{a}\t{b}\t{label}\n" for a, b, label in items), encoding="utf-8")
    prompt.write_text(PROMPT, encoding="utf-8")
    report = validate(context, folder, artifact, "--task", f"question-matching={data}", "--prompt", prompt)
    task = report["tasks"][0]
    assert len(task["items"]) == len(items)
    for item, (a, b, _) in zip(task["items"], items):
        start = tokenizer(f"Q: {a}\nQ: {b}\nSame:", add_special_tokens=False)["input_ids"]
        for index, model in enumerate((base, candidate)):
            sums = []
            for word in (" no", " yes"):
                whole = tokenizer(f"Q: {a}\nQ: {b}\nSame:{word}", add_special_tokens=False)["input_ids"]
                assert whole[:len(start)] == start, "the border lies between tokens here"
                logs = F.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
                sums.append(sum(logs[i - 1, whole[i]].item() for i in range(len(start), len(whole))))
            share = 1 / (1 + math.exp(min(sums) - max(sums)))
            close(item["scores"][index], share, f"{a} / {b}")
            if abs(sums[0] - sums[1]) > 1e-3:
                assert item["predictions"][index] == str(int(sums[1] > sums[0]))
    truth = [item["label"] for item in task["items"]]
    for index in (0, 1):
        said = [item["predictions"][index] for item in task["items"]]
        close(task["metrics"][0]["values"][index]["value"], metrics.accuracy_score(truth, said), "accuracy")
        tn, fp, fn, tp = metrics.confusion_matrix(truth, said, labels=["0", "1"]).ravel().tolist()
        table = next(t for t in task["tables"] if t["name"] == "right and wrong" and t["model"] == index)
        assert table["rows"][0][1] == [tp, tn, fp, fn], table
    return f"{len(items)} pairs"


def test_classification(context):
    """Labels are arbitrary: what is checked is the counting."""
    folder, artifact = MODELS / DENSE, context.artifact(MODELS / DENSE, *INT4)
    names = ["network", "packages", "users", "storage"]
    items = pairs(context.texts, 90)
    data, labels = context.new("texts.txt"), context.new("label.txt")
    labels.write_text("\n".join(names), encoding="utf-8")
    data.write_text("".join(f"{a}\t{names[i * i % 7 % 4]}\n" for i, (a, _, _) in enumerate(items)),
                    encoding="utf-8")
    report = validate(context, folder, artifact, "--task", f"classification={data}", "--labels", labels,
                      "--content-free")
    task = report["tasks"][0]
    truth = [item["label"] for item in task["items"]]
    spread = set()
    for index in (0, 1):
        said = [item["predictions"][index] for item in task["items"]]
        spread |= set(said)
        macro = metrics.precision_recall_fscore_support(
            truth, said, labels=names, average="macro", zero_division=0)
        for name, expected in zip(("precision", "recall", "F1"), macro):
            row = next(m for m in task["metrics"] if m["name"] == name)
            close(row["values"][index]["value"], expected, name)
        each = metrics.precision_recall_fscore_support(truth, said, labels=names, zero_division=0)
        table = next(t for t in task["tables"] if t["name"] == "per class" and t["model"] == index)
        for row, (name, *expected) in zip(table["rows"], zip(names, *each)):
            assert row[0] == name
            for got, value in zip(row[1], expected):
                assert math.isclose(got, value, rel_tol=1e-12), (row, expected)
        table = next(t for t in task["tables"] if t["name"] == "confusion" and t["model"] == index)
        matrix = metrics.confusion_matrix(truth, said, labels=names).tolist()
        assert [row[1] for row in table["rows"]] == matrix, table
    assert len(spread) > 1, "a constant answer would check little"
    return f"{len(truth)} texts"
