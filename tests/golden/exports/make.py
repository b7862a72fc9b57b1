#!/usr/bin/env python3
"""Lays out random codes with the libraries that own each format, and decodes them with these again.

    pip install torch==2.15.0 bitsandbytes==0.50.2 compressed-tensors==0.20.0 gguf==0.19.0 safetensors==0.8.0
    pip install --no-build-isolation gptqmodel==7.7.0
    python tests/golden/exports/make.py [FORMAT ...]

For each format a file FORMAT.safetensors with, for each case SCHEME (named as in qtool):
    SCHEME/codes    U8 (N, K)    what qtool's neutral weight holds
    SCHEME/scales   F32 (N, G)
    SCHEME/zeros    U8 (N, G)    only where the grid has stored zero points
    SCHEME/source   (N, K)       of NF4, what the library chose its codes for
    SCHEME/scales   U8 (N, G)    under double quantization; and nested F32 (blocks), offset F32 (1)
    SCHEME/scales, mins U8 (N, G), super_scales, super_mins F16 (N, K / 256)   of the K types
    SCHEME/values   (N, K)       what the library decodes, in the type it decodes to
    SCHEME/out.X    each tensor X the library stores
"""

import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["GPTQ_TORCH_TRITON_DEQUANT"] = "0"

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
FLOATS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def weight(scheme, n, k, seed):
    """Codes over the whole range, scales of the scheme's type, zero points; and the parsed scheme."""
    bits, grid, group, dtype = scheme.split("-")
    bits, dtype = int(bits[1:]), FLOATS[dtype]
    group = k if group == "row" else int(group[1:])
    random = np.random.default_rng(seed)
    low = int(grid == "narrow" or (grid == "sym" and bits == 8))
    codes = torch.from_numpy(random.integers(low, 1 << bits, (n, k)).astype(np.uint8))
    scales = torch.from_numpy(random.uniform(0.001, 0.05, (n, k // group)).astype(np.float32))
    zeros = None
    if grid == "zp":
        zeros = torch.from_numpy(random.integers(0, 1 << bits, (n, k // group)).astype(np.uint8))
    return dict(bits=bits, group=group, dtype=dtype, codes=codes, scales=scales.to(dtype).float(),
                zeros=zeros, n=n, k=k, row=scheme.split("-")[2] == "row", double="nf4dq" in scheme)


def inputs(case):
    names = ("codes", "scales", "zeros", "source", "nested", "offset", "mins", "super_scales", "super_mins")
    out = {name: case.get(name) for name in names}
    return {name: value for name, value in out.items() if value is not None}


def full_zeros(case):
    """Zero points (N, G) as integers."""
    if case["zeros"] is not None:
        return case["zeros"].to(torch.int32)
    return torch.full(case["scales"].shape, 1 << (case["bits"] - 1), dtype=torch.int32)


def compressed_tensors(case, int8=False):
    from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    middle = 1 << (case["bits"] - 1)
    args = QuantizationArgs(num_bits=case["bits"], symmetric=case["zeros"] is None,
                            group_size=-1 if case["row"] else case["group"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    codes = (case["codes"].to(torch.int16) - middle).to(torch.int8)
    state = {"weight_scale": case["scales"].to(case["dtype"])}
    if int8:
        state["weight"] = codes
        values = IntQuantizationCompressor.decompress(state, scheme)["weight"]
        return state, values
    state["weight_packed"] = pack_to_int32(codes, case["bits"])
    state["weight_shape"] = torch.tensor(case["codes"].shape)
    if case["zeros"] is not None:
        zeros = (case["zeros"].to(torch.int16) - middle).to(torch.int8)
        state["weight_zero_point"] = pack_to_int32(zeros, case["bits"], packed_dim=0)
    return state, PackedQuantizationCompressor.decompress(state, scheme)["weight"]


def gptq(case, version):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    groups = torch.arange(case["k"]) // case["group"]
    zeros = full_zeros(case)
    linear = torch.nn.Linear(case["k"], case["n"], bias=False)
    values = (case["codes"].int() - zeros[:, groups]).float() * case["scales"][:, groups]
    linear.weight.data = values
    module = TorchLinear(bits=case["bits"], group_size=-1 if case["row"] else case["group"],
                         sym=case["zeros"] is None, desc_act=False, in_features=case["k"],
                         out_features=case["n"], bias=False)
    module.eval()
    module.pack(linear, case["scales"].clone(), zeros.float(), g_idx=groups.int())
    decoded = module.dequantize_weight().t().contiguous()
    if version == 1:
        from gptqmodel.quantization import QuantizeConfig
        config = QuantizeConfig(bits=case["bits"], group_size=case["group"])
        convert_gptq_v2_to_v1_format_module(module, config)
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(module, name) for name in names}, decoded


def awq(case):
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq

    qweight, qzeros = pack_awq(case["codes"].int().t().contiguous(),
                               full_zeros(case).t().contiguous(), case["bits"])
    scales = case["scales"].half().t().contiguous()
    values = dequantize_gemm(qweight, qzeros, scales, case["bits"], case["group"]).t()
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, values.contiguous()


def gguf_blocks(case):
    """Q8_0, Q4_0 and Q4_1 by the library's own quantizer, which finds our codes again where each block
    reaches the end of its grid; types of 256 weights, for which it has none, laid out here by the structures of
    ggml-common.h. All are decoded by the library."""
    import gguf
    from gguf import GGMLQuantizationType as T

    n, k, bits, codes = case["n"], case["k"], case["bits"], case["codes"].numpy()
    groups = np.arange(k) // case["group"]
    scales, zeros = case["scales"].numpy(), full_zeros(case).numpy()
    values = (codes.astype(np.int32) - zeros[:, groups]).astype(np.float32) * scales[:, groups]
    small = case["group"] < 256 or (bits == 8) or (bits == 4 and case["zeros"] is None)
    if small:
        kind = {8: T.Q8_0, 4: T.Q4_0 if case["zeros"] is None else T.Q4_1}[bits]
        blocks = gguf.quants.quantize(values, kind)
    else:
        kind = {4: T.Q4_K, 3: T.Q3_K, 2: T.Q2_K}[bits]
        c = codes.reshape(n, k // 256, 256)
        d = np.ascontiguousarray(scales[:, groups[::256]].astype("<f2")).view(np.uint8).reshape(n, k // 256, 2)
        zero = zeros[:, groups[::256]].astype(np.uint8)[:, :, None]

        def fold(codes, run, width):  # bytes of `run` neighbours: element i in bits i // run * width
            parts = codes.reshape(*codes.shape[:2], -1, 8 // width, run)
            shifts = (np.arange(8 // width) * width).astype(np.uint8)[:, None]
            return np.bitwise_or.reduce(parts << shifts, axis=3).reshape(*codes.shape[:2], -1)

        ones = np.ones_like(zero)
        if kind == T.Q4_K:
            low = [np.repeat(x, 4, 2) for x in (ones, zero, ones | zero << 4)]
            parts = [d, d, *low, fold(c, 32, 4)]
        elif kind == T.Q2_K:
            parts = [np.repeat(ones | zero << 4, 16, 2), fold(c, 32, 2), d, d]
        else:
            scale = np.tile(np.uint8([0x11] * 8 + [0xAA] * 4), (n, k // 256, 1))  # 33 sixteen times
            parts = [fold(c >> 2, 32, 1), fold(c & 3, 32, 2), scale, d]
        blocks = np.concatenate(parts, axis=2).reshape(n, -1)
    decoded = gguf.quants.dequantize(blocks, kind)
    assert np.array_equal(decoded, values), "the library decodes other values"
    return {"blocks": torch.from_numpy(blocks.copy()), "kind": torch.tensor([int(kind)])}, torch.from_numpy(decoded.copy())


def k_weight(scheme, n, k, seed):
    """Random numbers of a K type: each of as many bits as it has, halves up to a hundredth."""
    bits, group, small = {"q4-k": (4, 32, 6), "q2-k": (2, 16, 4)}[scheme]
    random = np.random.default_rng(seed)
    whole = lambda count, bits: torch.from_numpy(random.integers(0, 1 << bits, (n, count)).astype(np.uint8))
    halves = lambda: torch.from_numpy(random.uniform(0, 0.01, (n, k // 256)).astype(np.float16))
    return dict(kind=scheme, n=n, k=k, codes=whole(k, bits), scales=whole(k // group, small),
                mins=whole(k // group, small), super_scales=halves(), super_mins=halves())


def k_blocks(case):
    """Blocks laid out here by the structures of ggml-common.h, and decoded by the library."""
    import gguf
    from gguf import GGMLQuantizationType as T

    n, supers = case["n"], case["k"] // 256
    number = lambda name: case[name].numpy().reshape(n, supers, -1)
    codes, scales, mins = number("codes"), number("scales"), number("mins")
    halves = [number(name).astype("<f2").view(np.uint8) for name in ("super_scales", "super_mins")]
    run = 32

    def fold(width):  # bytes of `run` neighbours: element i in bits i // run * width
        parts = codes.reshape(n, supers, -1, 8 // width, run)
        shifts = (np.arange(8 // width) * width).astype(np.uint8)[:, None]
        return np.bitwise_or.reduce(parts << shifts, axis=3).reshape(n, supers, -1)

    if case["kind"] == "q4-k":
        kind = T.Q4_K
        packed = [scales[..., :4] | (scales[..., 4:] >> 4 << 6), mins[..., :4] | (mins[..., 4:] >> 4 << 6),
                  (scales[..., 4:] & 15) | (mins[..., 4:] << 4)]
        parts = [*halves, *packed, fold(4)]
    else:
        kind = T.Q2_K
        parts = [scales | mins << 4, fold(2), *halves]
    blocks = np.ascontiguousarray(np.concatenate(parts, axis=2).reshape(n, -1))
    decoded = gguf.quants.dequantize(blocks, kind)
    return {"blocks": torch.from_numpy(blocks), "kind": torch.tensor([int(kind)])}, torch.from_numpy(decoded.copy())


def bnb_nf4(case):
    """bitsandbytes' own quantizer and decoder; the codes are those it chose."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    source = torch.from_numpy(np.random.default_rng(case["n"]).normal(0, 0.05, (case["n"], case["k"])))
    source = source.to(case["dtype"])
    packed, state = quantize_4bit(source, blocksize=64, compress_statistics=case["double"], quant_type="nf4")
    values = dequantize_4bit(packed, state)
    bytes_ = packed.reshape(-1)
    case["codes"] = torch.stack([bytes_ >> 4, bytes_ & 15], 1).reshape(case["n"], case["k"])
    case["scales"], case["zeros"], case["source"] = state.absmax.reshape(case["n"], -1), None, source
    if case["double"]:
        case["nested"], case["offset"] = state.state2.absmax, state.offset.reshape(1)
    saved = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": packed, **saved}, values


def reaching(case):
    """The same weight with codes at both ends of the grid in every 32, and small scales for Q4_1."""
    low = int(case["codes"].min())
    case["codes"][:, ::32], case["codes"][:, 1::32] = low, (1 << case["bits"]) - 1
    if case["zeros"] is not None and case["group"] < 256:  # scale times zero point must be an F16 value
        case["scales"] = torch.exp2(torch.randint(-9, -4, case["scales"].shape).float())
    return case


FORMATS = {
    "gguf": (lambda case: k_blocks(case) if "kind" in case else gguf_blocks(reaching(case)), [
        ("w8-sym-g32-f16", 4, 96), ("w8-sym-row-bf16", 4, 64), ("w4-sym-g32-bf16", 4, 96),
        ("w4-sym-g64-f16", 4, 128), ("w4-zp-g32-f16", 4, 96), ("w4-zp-g256-f16", 4, 512),
        ("w3-sym-g256-f16", 4, 512), ("w3-narrow-row-f16", 4, 512), ("w2-zp-g256-f16", 4, 512),
        ("w2-sym-g512-bf16", 4, 512), ("q4-k", 3, 512), ("q2-k", 3, 512)]),
    "compressed-tensors": (compressed_tensors, [
        ("w8-sym-row-bf16", 48, 96), ("w8-zp-g32-f16", 48, 96), ("w4-sym-g32-bf16", 48, 96),
        ("w4-zp-g32-f16", 37, 96), ("w4-narrow-row-f32", 5, 33), ("w3-sym-g16-f16", 48, 96),
        ("w3-zp-row-f16", 37, 43), ("w2-sym-g32-f32", 48, 96), ("w2-zp-g16-bf16", 37, 96)]),
    "compressed-tensors-int8": (lambda case: compressed_tensors(case, True), [
        ("w8-sym-row-bf16", 37, 43), ("w8-sym-row-f32", 48, 96)]),
    "gptq": (lambda case: gptq(case, 1), [
        ("w8-sym-row-f16", 96, 64), ("w4-sym-g32-bf16", 96, 128), ("w4-narrow-row-f16", 64, 96),
        ("w3-sym-g32-f16", 64, 96), ("w2-sym-g32-f16", 96, 64)]),
    "gptq-v2": (lambda case: gptq(case, 2), [
        ("w8-zp-g32-f16", 96, 64), ("w4-zp-g32-f16", 96, 128), ("w4-sym-row-f16", 64, 96),
        ("w3-zp-g32-f16", 64, 96), ("w2-zp-g32-f16", 96, 64)]),
    # Named by the source's type: the schemes are nf4 and nf4-dq. Rows of nine scales: blocks of 256 end within rows.
    "bnb-nf4": (bnb_nf4, [("w4-nf4-g64-bf16", 24, 128), ("w4-nf4-g64-f32", 7, 192),
                          ("w4-nf4dq-g64-bf16", 31, 576), ("w4-nf4dq-g64-f32", 7, 192)]),
    "awq": (awq, [
        ("w4-zp-g32-f16", 72, 96), ("w4-sym-g32-bf16", 64, 96), ("w4-zp-row-f16", 72, 33)]),
}


if __name__ == "__main__":
    for name in sys.argv[1:] or FORMATS:
        lay_out, cases = FORMATS[name]
        tensors = {}
        for seed, (scheme, n, k) in enumerate(cases):
            case = (weight if scheme.startswith("w") else k_weight)(scheme, n, k, seed)
            out, values = lay_out(case)
            assert values.shape == (n, k) and len(out) >= 2, (name, scheme)
            tensors |= {f"{scheme}/{key}": value for key, value in inputs(case).items()}
            tensors |= {f"{scheme}/out.{key}": value.clone().contiguous() for key, value in out.items()}
            tensors[f"{scheme}/values"] = values.contiguous()
        save_file(tensors, HERE / f"{name}.safetensors")
        print(name, len(cases), "cases")
