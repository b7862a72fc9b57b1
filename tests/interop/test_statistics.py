"""Intervals and tests of `qtool validate` against SciPy and statsmodels, from the items of a real report."""

import math

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from harness import MODELS
from test_validate import pairs, validate
from test_weights import DENSE, INT2, INT8

KINDS, ITEMS, RESAMPLES = 4, 240, 10_000


def answers(task, index, base):
    """Whether each item is right: by the candidate, by the base; and its kind."""
    right = np.array([[p == item["label"] for p in item["predictions"]] for item in task["items"]], float)
    kinds = np.array([item["kind"] for item in task["items"]])
    return right[:, index], right[:, base], kinds


def near(got, expected, tolerance, what):
    assert abs(got - expected) <= tolerance, f"{what}: {got}, expected {expected} within {tolerance}"


def same(got, expected, what):
    assert math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-12), f"{what}: {got}, expected {expected}"


def check_interval(interval, means, draw, what):
    """A bootstrap interval against SciPy's percentile one; both wander by the draws, ours is a little wider for the
    two disagreements that it imagines."""
    rng = np.random.default_rng(5)
    found = stats.bootstrap(draw, means, paired=False, vectorized=True, axis=-1, method="percentile",
                            n_resamples=RESAMPLES, rng=rng).confidence_interval
    width = found.high - found.low
    near(interval["low"], found.low, 0.12 * width, f"{what}, low")
    near(interval["high"], found.high, 0.12 * width, f"{what}, high")


def test_question_matching(context):
    folder = MODELS / DENSE
    candidates = [context.artifact(folder, *options) for options in (INT8, INT2)]
    data = context.new("kinds.tsv")
    data.write_text("".join(f"{a}\t{b}\t{label}\tkind {i % KINDS}\n"
                            for i, (a, b, label) in enumerate(pairs(context.texts, ITEMS))), encoding="utf-8")
    report = validate(context, folder, *candidates, "--task", f"question-matching={data}", "--content-free",
                      "--seed", 3)
    task = report["tasks"][0]
    rows = [row for row in task["metrics"] if row["name"] == "accuracy"]
    assert len(rows) == KINDS + 1 and rows[0]["group"] == "macro average", [r["group"] for r in rows]
    disagreements = 0
    for index in (1, 2):
        candidate, base, kinds = answers(task, index, 0)
        p = []
        for row in rows[1:]:
            of = kinds == row["group"]
            assert of.sum() == row["items"] == ITEMS // KINDS
            for model, right in ((0, base), (index, candidate)):
                low, high = proportion_confint(right[of].sum(), of.sum(), method="wilson")
                value = row["values"][model]
                same(value["value"], right[of].mean(), "accuracy")
                same(value["low"], low, "Wilson, low")
                same(value["high"], high, "Wilson, high")
            gained = int(((candidate > base) & of).sum())
            lost = int(((candidate < base) & of).sum())
            exact = float(mcnemar([[0, lost], [gained, 0]], exact=True).pvalue)
            p.append(exact)
            delta = row["deltas"][index]
            same(delta["p"], exact, "McNemar")
            same(delta["interval"]["value"], (gained - lost) / of.sum(), "difference")
            disagreements += gained + lost
        for row, corrected in zip(rows[1:], multipletests(p, method="holm")[1].tolist()):
            same(row["deltas"][index]["p_holm"], corrected, "Holm")
        # Kinds of one size: the macro average is the mean, resampled within kinds.
        groups = [candidate[kinds == row["group"]] - base[kinds == row["group"]] for row in rows[1:]]
        if sum(int((g != 0).sum()) for g in groups) >= 30:
            check_interval(rows[0]["deltas"][index]["interval"],
                           lambda *g, axis=-1: sum(x.mean(axis=axis) for x in g) / len(g), groups, "macro")
            # Sign flips over equal weights are McNemar's test.
            d = np.concatenate(groups)
            exact = float(stats.binomtest(int((d > 0).sum()), int((d != 0).sum())).pvalue)
            near(rows[0]["deltas"][index]["p"], exact, 4 * math.sqrt(exact / RESAMPLES) + 2 / RESAMPLES, "flips")
    assert disagreements >= 30, f"{disagreements} disagreements test too little"
    return f"{disagreements} disagreements of {2 * ITEMS}"


def test_windows(context):
    """Means over windows, weighted by their tokens: perplexity's ratio."""
    folder, artifact = MODELS / DENSE, context.artifact(MODELS / DENSE, *INT2)
    file = context.new("text.txt")
    file.write_text(context.texts["heldout.en"][:24_000], encoding="utf-8")
    report = validate(context, folder, artifact, "--task", f"perplexity={file}", "--window", 128)
    task = report["tasks"][0]
    items = task["items"]
    assert len(items) >= 30, len(items)
    # The last window is shorter: sums and tokens are resampled together.
    tokens = np.array([item["scored_tokens"] for item in items], float)
    nats = np.array([item["nats"] for item in items], float)
    row = next(row for row in task["metrics"] if row["name"] == "nats per token")
    difference = nats[:, 1] - nats[:, 0]
    delta = row["deltas"][1]["interval"]
    same(delta["value"], difference.sum() / tokens.sum(), "nats per token")
    found = stats.bootstrap((difference, tokens), lambda d, t, axis=-1: d.sum(axis) / t.sum(axis), paired=True,
                            vectorized=True, method="percentile", n_resamples=RESAMPLES,
                            rng=np.random.default_rng(5)).confidence_interval
    width = found.high - found.low
    near(delta["low"], found.low, 0.1 * width, "low")
    near(delta["high"], found.high, 0.1 * width, "high")
    ratio = next(row for row in task["metrics"] if row["name"] == "perplexity")["deltas"][1]["interval"]
    for end in ("value", "low", "high"):
        same(ratio[end], math.exp(delta[end]), f"ratio, {end}")
    return f"{len(items)} windows"
