"""Runs the benchmark: makes what is missing, measures every row, writes the table.

    python run.py --work DIR [--rows REGEX] [--again REGEX] [--strict]

Results are lines of DIR/results.jsonl; a row that is there with the same
commands is not run again (--again REGEX runs it anyway).  A row whose command
fails is "not available", with the first line of its message; --strict then
ends with status 1.  Written: results-DATE.md and results-DATE.json beside this
script (--out for another folder).
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import candidate
import evaluate
import measure
import prepare
import table
import text
from rows import MEASURED, ROWS, TEXT

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def prepared(work, rows):
    """Makes the base, the texts and, for rows of other tools, the second moments unless they are there."""
    prepare.prepare(work)
    if not (work / "text.json").exists():
        text.prepare(work)
    if any(row.script for row in rows) and not (work / "hessians.safetensors").exists():
        subprocess.run([sys.executable, str(HERE / "second_moments.py"), "--work", str(work)], check=True)


def key(row):
    """What a stored result must have been made by to be taken for this row's."""
    return " ".join(row.quantize or row.script)


def measured(work, qtool, placeholder):
    """The folder of statistics that a placeholder stands for, made when first asked for, with its cost beside it."""
    folder = work / placeholder.strip("{}")
    if not folder.exists():
        print(f"{folder.name}: qtool calibrate", file=sys.stderr, flush=True)
        command = [qtool, "calibrate", str(work / "smollm2"), "--data", str(work / "calib.txt"), "-o", str(folder)]
        cost = measure.run([*command, *MEASURED[placeholder], "--quiet"])
        cost.pop("stdout")
        cost["stored_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        (work / f"{folder.name}.json").write_text(json.dumps(cost))
    return folder


def filled(options, work, qtool):
    """Options with their placeholders replaced by paths."""
    paths = {TEXT: lambda: work / "calib.txt", **{name: lambda n=name: measured(work, qtool, n) for name in MEASURED}}
    return [str(paths[option]()) if option in paths else option for option in options]


def make(row, work, folder, qtool):
    """Makes the candidate; returns (its folder, figures of cost and size)."""
    out = folder / "bf16"
    if row.script:
        script = [sys.executable, str(HERE / row.script[0]), "--work", str(work), "--out", str(out)]
        cost = measure.run([*script, *row.script[1:]])
        size = json.loads(cost.pop("stdout").splitlines()[-1])
        return out, {**cost, **size}
    artifact = folder / "artifact"
    options = filled(row.quantize, work, qtool)
    command = [qtool, "quantize", str(work / "smollm2"), "-o", str(artifact), *options, "--quiet"]
    cost = measure.run(command)
    cost.pop("stdout")
    measure.run([qtool, "export", str(artifact), "--to", "bf16", "-o", str(out), "--quiet"])
    return out, {**cost, **candidate.bits(work, artifact)}


def one(row, work, qtool, keep):
    """The result of one row, as stored."""
    folder = work / "rows" / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        out, figures = make(row, work, folder, qtool)
        figures["texts"] = evaluate.evaluate(work, out)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    model = json.loads((work / "smollm2" / "prepared.json").read_text())["model_sha256"]
    date = datetime.date.today().isoformat()
    tool = None if row.script else measure.run([qtool, "--version"])["stdout"].strip()
    return {"row": row.name, "key": key(row), "tool": tool, "base": model, "date": date, **figures}


def stored(work):
    """{row: result}: the newest of each row that this base and these commands made."""
    path = work / "results.jsonl"
    if not path.exists():
        return {}
    model = json.loads((work / "smollm2" / "prepared.json").read_text())["model_sha256"]
    keys = {row.name: key(row) for row in ROWS}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["row"]: r for r in lines if r["base"] == model and keys.get(r["row"]) == r["key"]}


def machine():
    """The processor in words."""
    try:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        model = platform.machine()
    return f"Measured on {os.cpu_count()} cores of {model}."


def write(work, out, results, missing):
    date = datetime.date.today().isoformat()
    costs = {name.strip("{}"): work / f"{name.strip('{}')}.json" for name in MEASURED}
    statistics = {name: json.loads(path.read_text()) for name, path in costs.items() if path.exists()}
    page = table.page(results, missing, statistics, date, machine())
    (out / f"results-{date}.md").write_text(page)
    ordered = [results[row.name] for row in ROWS if row.name in results]
    (out / f"results-{date}.json").write_text(json.dumps(ordered, indent=1) + "\n")
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, type=Path, help="working folder, about 3 GB")
    parser.add_argument("--qtool", default=str(ROOT / "target" / "release" / "qtool"))
    parser.add_argument("--rows", default=".", help="run only the rows whose name this regular expression finds")
    parser.add_argument("--again", help="run these even if they are there")
    parser.add_argument("--keep", action="store_true", help="keep artifacts and candidates below DIR/rows")
    parser.add_argument("--strict", action="store_true", help="fail when a row is not available")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the page")
    parser.add_argument("--threads", type=int, default=2, help="of the evaluation")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    prepared(args.work, [row for row in ROWS if re.search(args.rows, row.name)])
    results, missing = stored(args.work), {}
    for row in ROWS:
        again = args.again and re.search(args.again, row.name)
        if not re.search(args.rows, row.name) or (row.name in results and not again):
            continue
        print(f"{row.name}: {key(row)}", file=sys.stderr, flush=True)
        try:
            result = one(row, args.work, args.qtool, args.keep)
        except measure.Failed as error:
            missing[row.name] = str(error)
            print(f"  not available: {error}", file=sys.stderr, flush=True)
            continue
        results[row.name] = result
        with open(args.work / "results.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
        for name, figures in result["texts"].items():
            print(f"  {evaluate.line(name, figures)}", file=sys.stderr, flush=True)
        write(args.work, args.out, results, missing)
    print(write(args.work, args.out, results, missing))
    if missing and args.strict:
        sys.exit(1)


if __name__ == "__main__":
    main()
