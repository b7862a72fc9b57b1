"""A reference row: every linear in one type of llama.cpp, with importance, rows laid end to end.

    python flat_gguf.py --work DIR --out FOLDER --type IQ2_XXS

Super-blocks of 256 weights do not divide this model's rows of 576, where
llama-quantize silently takes a larger type.  So as many rows as are needed
(four) are laid end to end and super-blocks straddle them: true bits, fair rows.

Importance is the mean square of each input channel over the calibration text,
which is what llama.cpp's imatrix is; it is the diagonal of the second moments
in DIR/hessians.safetensors.  Weights are decoded by the `gguf` package and
written as BF16; bits and bytes are printed as JSON.
"""

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

import candidate
import ggml

THREADS = 2


def importances(work):
    """{name: mean square of each input channel}."""
    with safe_open(Path(work) / "hessians.safetensors", "np") as file:
        tokens = int(file.metadata()["tokens"])
        return {name: file.get_tensor(name).diagonal() / tokens for name in file.keys()}


def through(quantizer, kind, weight, importance):
    """(decoded weight, bytes stored) of one matrix."""
    rows, columns = weight.shape
    together = math.lcm(columns, gguf.GGML_QUANT_SIZES[kind][0]) // columns
    if rows % together:
        raise ValueError(f"{rows} rows, {together} of which are to lie end to end")
    flat = weight.reshape(rows // together, columns * together)
    values = None if importance is None else np.tile(importance, together)
    data = quantizer.quantize(kind, flat, values)
    decoded = gguf.quants.dequantize(data, kind).reshape(rows, columns)
    return torch.from_numpy(np.ascontiguousarray(decoded)).to(torch.bfloat16), data.nbytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--type", required=True, help="a ggml type, such as Q4_K")
    parser.add_argument("--no-importance", action="store_true", help="without calibration")
    args = parser.parse_args()
    kind = gguf.GGMLQuantizationType[args.type]
    tensors = candidate.base_tensors(args.work)
    importance = {} if args.no_importance else importances(args.work)
    quantizer = ggml.Quantizer(args.work)
    quantizer.prepare(kind)
    linears = [name for name in tensors if candidate.LINEAR.fullmatch(name)]

    def one(name):
        values = None if args.no_importance else importance[candidate.input_of(name)]
        return through(quantizer, kind, tensors[name].float().numpy(), values)

    count = sum(tensors[name].numel() for name in linears)
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(one, linears))
    kept = [tensor for name, tensor in tensors.items() if name not in set(linears)]
    tensors.update({name: weight for name, (weight, _) in zip(linears, results, strict=True)})
    candidate.write(args.work, args.out, tensors)
    print(candidate.report(8 * sum(size for _, size in results), count, kept))


if __name__ == "__main__":
    main()
