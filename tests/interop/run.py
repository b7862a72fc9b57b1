#!/usr/bin/env python3
"""Checks qtool's artifacts and exports against software that is not qtool.

    python tests/interop/run.py --qtool target/release/qtool --deb debian-handbook_*.deb

What is checked: docs/decode.py on artifacts written by hand (test_decode.py); decoded weights of
the sample models, HF and Paddle form, against a second decode and the source (test_weights.py);
2-bit weights, bit for bit, against a decoder written from the specification (test_wint2.py);
folders for FastDeploy against what its loader asks for (test_fastdeploy.py); exports in the
libraries of compressed-tensors, GPTQ, AWQ and GGUF (test_ecosystem.py); models quantized by
bitsandbytes and gguf-py read back (test_imports.py), models of others exported to a third library (test_foreign.py); the bf16 export in
Hugging Face transformers, logits and held-out bits per byte (test_transformers.py); validation:
log-likelihoods, perplexity and divergence of transformers, figures of scikit-learn (test_validate.py);
intervals and tests of SciPy and statsmodels (test_statistics.py).
Ends in a line "N passed, N failed"; status 1 when any failed.
requirements.txt beside this file pins the versions.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be looked up
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # cores may be shared
sys.dont_write_bytecode = True

import harness  # noqa: E402
import test_decode  # noqa: E402
import test_ecosystem  # noqa: E402
import test_fastdeploy  # noqa: E402
import test_foreign  # noqa: E402
import test_imports  # noqa: E402
import test_statistics  # noqa: E402
import test_transformers  # noqa: E402
import test_validate  # noqa: E402
import test_weights  # noqa: E402
import test_wint2  # noqa: E402

CHECKS = [test_decode, test_weights, test_wint2, test_fastdeploy, test_transformers,
          test_ecosystem, test_imports, test_foreign, test_validate, test_statistics]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qtool", type=Path, required=True, help="the built program")
    parser.add_argument("--deb", type=Path, required=True, help="package debian-handbook")
    args = parser.parse_args()
    for path in (args.qtool, args.deb):
        if not path.is_file():
            sys.exit(f"run.py: {path}: no such file")
    handbook = harness.module(harness.MODELS / "handbook.py")
    texts = handbook.load(deb=args.deb)
    assert all(len(texts[f"heldout.{x}"]) > 10_000 for x in ("en", "zh"))
    with tempfile.TemporaryDirectory(prefix="qtool-interop-") as folder:
        context = harness.Context(folder, args.qtool.resolve(), texts)
        passed, failed = harness.run(context, CHECKS)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
