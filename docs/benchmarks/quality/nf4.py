"""A reference row: NF4 with double quantization, by bitsandbytes.

    python nf4.py --work DIR --out FOLDER

writes the dequantized weights (BF16) and prints bits and bytes as JSON.  Per
weight a 4-bit code, per 64 weights an 8-bit scale, per 256 scales an f32, and
per tensor an f32 mean: 4.127 bits.  The two code books are constants.
"""

import argparse

import torch
from bitsandbytes import functional

import candidate

BLOCK = 64
NESTED = 256


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    tensors = candidate.base_tensors(args.work)
    bits = count = 0
    kept = []
    for name, weight in tensors.items():
        if not candidate.LINEAR.fullmatch(name):
            kept.append(weight)
            continue
        codes, state = functional.quantize_4bit(
            weight.float(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        blocks = weight.numel() // BLOCK
        bits += 4 * weight.numel() + 8 * blocks + 32 * -(-blocks // NESTED) + 32
        count += weight.numel()
        tensors[name] = functional.dequantize_4bit(codes, state).reshape(weight.shape).to(torch.bfloat16)
    candidate.write(args.work, args.out, tensors)
    print(candidate.report(bits, count, kept))


if __name__ == "__main__":
    main()
