"""Results as a Markdown page: one table per text, one of cost, one of bars."""

from rows import BARS, MEMORY, ROWS, SECONDS

TITLES = {"handbook": "Debian handbook, the held-out chapter", "news": "BBC news, another domain"}


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


def _cost(results):
    head = ["row", "model, MB", "seconds", "peak anonymous, MB", "peak resident, MB"]
    lines = []
    for row in ROWS:
        if row.name in results:
            r = results[row.name]
            sizes = [f"{r[k] / 1e6:.0f}" for k in ("peak_anonymous", "peak_rss")]
            lines.append([row.label, f"{r['stored_bytes'] / 1e6:.1f}", f"{r['seconds']:.1f}", *sizes])
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


def page(results, missing, date, machine):
    """The page.  `results`: {row: result}; `missing`: {row: why it is not available}."""
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
    parts += ["## Cost\n", "Of `qtool quantize`, calibration included, or of the script that stands for it.\n"]
    parts += [_cost(results), "## Bars\n", _bars(results, texts)]
    if missing:
        parts.append("## Not available\n")
        parts.append("".join(f"- {row}: {why}\n" for row, why in missing.items()))
    return "\n".join(parts)
