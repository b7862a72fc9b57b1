"""The questions of the benchmark: pairs of short texts behind an instruction and four examples.

The examples are made up for this page. Answers are single tokens of SmolLM2's
tokenizer, so that the other library may score both from one row of logits.
"""

import json
from pathlib import Path

ANSWERS = ["0", "1"]
INSTRUCTION = "Do the two questions ask the same thing? Answer 1 if they do and 0 if they do not.\n\n"
EXAMPLES = [
    ("明天早上七点叫我起床", "明早七点的闹钟帮我定一个", 1),
    ("今天会下雨吗", "今天的股票会涨吗", 0),
    ("给妈妈打个电话", "拨打妈妈的号码", 1),
    ("这首歌叫什么名字", "这首歌是谁唱的", 0),
]


def one(a, b):
    return f"Question 1: {a}\nQuestion 2: {b}\nAnswer: "


def read_pairs(path):
    """[(a, b, label)] of a tab-separated file."""
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split("\t")
        if len(cells) != 3 or cells[2] not in ("0", "1"):
            raise SystemExit(f"{path}, line {number}: expected two texts and a label 0 or 1, got {len(cells)} columns")
        pairs.append((cells[0], cells[1], int(cells[2])))
    if not pairs:
        raise SystemExit(f"{path}: holds no pairs")
    return pairs


def questions(pairs):
    shots = INSTRUCTION + "".join(one(a, b) + f"{label}\n\n" for a, b, label in EXAMPLES)
    return [{"prompt": shots + one(a, b), "answers": ANSWERS} for a, b, _ in pairs]


def write(path, items):
    Path(path).write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), encoding="utf-8")
