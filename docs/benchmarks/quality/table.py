"""Results as a Markdown page: one table per text, one of cost, one of bars."""

from rows import BARS, MEMORY, ROWS, SECONDS

TITLES = {"handbook": "Debian handbook, the held-out chapter", "news": "BBC news, another domain"}

COST = """Of `qtool quantize`, or of the script that stands for it. Rows that are not sequential use statistics measured
once, which are rows of their own here; sequential ones measure within. Processor time is summed over cores; rows without it
were measured before it was recorded.
"""


def _markdown(head, lines):
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)) + "\n"


def _quality(results, missing, text):
    head = ["row", "bits per weight", "perplexity", "mean KL", "+-", "median KL", "p99 KL", "top-1"]
    lines = []
    for row in ROWS:
        if row.name in results:
            r = results[row.name]
            f = r["texts"][text]
            numbers = [f"{r['bits_per_weight']:.2f}", f"{f['perplexity']:.2f}"]
            numbers += [f"{f[k]:.4f}" for k in ("kl_mean", "kl_mean_error", "kl_median")]
            lines.append([row.label, *numbers, f"{f['kl_p99']:.3f}", f"{100 * f['top1']:.1f} %"])
        elif row.name in missing:
            lines.append([row.label, "not available", *[""] * 6])
    return _markdown(head, lines)


def _cost(results, statistics):
    """`statistics`: {folder: its cost}, what rows that are not sequential share."""
    head = ["row", "stored, MB", "seconds", "processor s", "peak anonymous, MB", "peak resident, MB"]
    costs = [(f"`qtool calibrate`: {name}", cost) for name, cost in statistics.items()]
    costs += [(row.label, results[row.name]) for row in ROWS if row.name in results]
    lines = []
    for label, r in costs:
        sizes = [f"{r[k] / 1e6:.0f}" for k in ("peak_anonymous", "peak_rss")]
        processor = f"{r['processor_seconds']:.1f}" if "processor_seconds" in r else ""
        lines.append([label, f"{r['stored_bytes'] / 1e6:.1f}", f"{r['seconds']:.1f}", processor, *sizes])
    return _markdown(head, lines)


def _figure(results, row, figure, text):
    result = results[row]
    return result[figure] if figure in result else result["texts"][text][figure]


def _bar(results, bar, text):
    """[row, figure, text, limit, found, verdict], or None where a row is missing."""
    if bar.row not in results or (bar.times and bar.times not in results):
        return None
    limit = bar.limit * (_figure(results, bar.times, bar.figure, text) if bar.times else 1)
    found = _figure(results, bar.row, bar.figure, text)
    verdict = "met" if found <= limit else f"**not met**, {found / limit:.2f} times the bar"
    wanted = f"{bar.limit:g} x {bar.times} = {limit:.3g}" if bar.times else f"{limit:.3g}"
    return [bar.row, bar.figure, text, wanted, f"{found:.3g}", verdict]


def _bars(results, texts):
    found = [_bar(results, bar, text) for bar in BARS for text in texts]
    found += [_bar(results, bar, "") for bar in (SECONDS, MEMORY)]
    lines = [line for line in found if line]
    if not lines:
        return "No row that has a bar is available yet.\n"
    return _markdown(["row", "figure", "text", "at most", "found", "bar"], lines)


def page(results, missing, statistics, date, machine):
    """The page.  `results`: {row: result}; `missing`: {row: why it is not available}; `statistics`: {folder: cost}."""
    texts = sorted({text for r in results.values() for text in r["texts"]})
    parts = [
        f"# Quality on SmolLM2-135M, {date}\n",
        "What is measured and how: `docs/benchmarks/quality/README.md`. Bits per weight are of the 210 block\n"
        "linears, everything stored counted; KL is to the base, in nats per token; +- is one standard error.\n"
        f"{machine}\n",
    ]
    for text in texts:
        some = next(r for r in results.values() if text in r["texts"])["texts"][text]
        parts.append(f"## {TITLES.get(text, text)}\n")
        parts.append(f"{some['tokens']} tokens, perplexity of the base {some['base_perplexity']:.2f}.\n")
        parts.append(_quality(results, missing, text))
    parts += ["## Cost\n", COST]
    parts += [_cost(results, statistics), "## Bars\n", _bars(results, texts)]
    if missing:
        parts.append("## Not available\n")
        parts.append("".join(f"- {row}: {why}\n" for row, why in missing.items()))
    return "\n".join(parts)
