// y (entries, N) = rows of x times the transpose of their expert's weight (N, K) on tensor cores, by tensor_gemm.cuh. Entries
// stand expert after expert, tile after tile of at most 128; see moe.cu. Row of x of the entry at place i: the token of entry
// grouped[i], or i itself when `top` is 0.
#include "experts.cuh"
#include "tensor_gemm.cuh"

#define GROUPED_GEMM(NAME, FORM, BITS)                                                                                         \
    extern "C" __global__ void NAME(float *y /* (entries, N) */, const u16 *x /* (rows, padded) */,                            \
                                    const Weight *experts /* first ... last - 1 */, const ExpertTile *tiles,                   \
                                    const i32 *starts /* (E + 1) */, const i32 *grouped, i32 top, i32 padded, i32 first,       \
                                    i32 last) {                                                                                \
        ExpertTile tile = tiles[block_y()];                                                                                    \
        if (tile.expert < first || tile.expert >= last) return; /* the whole block */                                          \
        const Weight w = experts[tile.expert - first];                                                                         \
        i32 end = starts[tile.expert + 1];                                                                                     \
        tensor_gemm<FORM, BITS, true>(y, Left{x, grouped, top}, w, tile.first, end, block_x() * TILE, padded);                  \
    }
GROUPED_GEMM(grouped_any, F32, 0)     // no alignment needed
GROUPED_GEMM(grouped_bf16, BF16, 0)   // K a multiple of 8
GROUPED_GEMM(grouped_int8, AFFINE, 8) // the others: K a multiple of 32, groups of 16 or more
GROUPED_GEMM(grouped_int4, AFFINE, 4)
GROUPED_GEMM(grouped_wint2, WINT2, 0)
GROUPED_GEMM(grouped_nf4, NF4, 0)
