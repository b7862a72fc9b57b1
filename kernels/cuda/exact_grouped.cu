// Products of routed experts in f32: as exact_gemm.cuh, over tiles of entries grouped by expert; see moe.cu.
#include "exact_gemm.cuh"
#include "experts.cuh"

// y (entries, N) = rows of x times the transpose of their expert's weight (N, K). Row of x of the entry at place i: the token of
// entry grouped[i], or i itself when `top` is 0. `BLOCKS` on a multiprocessor at a time: two where 128 registers a thread are enough. Of experts `first`... before `last`, the only ones whose weights are there.
#define EXACT_GROUPED(name, FORM, BITS, BLOCKS)                                                                                                 \
    extern "C" __global__ BOUNDS(256, BLOCKS) void name(float *y /* (entries, N) */, const float *x /* (M or entries, K) */,               \
                                                   const Weight *experts /* first ... last - 1 */,                                    \
                                                   const ExpertTile *tiles /* (count) */, const i32 *starts /* (E + 1) */,            \
                                                   const i32 *grouped /* (entries) */, i32 top, i32 first, i32 last) {                \
        ExpertTile tile = tiles[block_y()];                                                                                           \
        if (tile.expert < first || tile.expert >= last) return; /* the whole block */                                                 \
        __shared__ Weight w; /* registers are scarce */                                                                               \
        if (thread_x() == 0) w = experts[tile.expert - first];                                                                        \
        barrier();                                                                                                                    \
        exact_gemm<FORM, BITS, true>(y, x, w, tile.first, starts[tile.expert + 1], block_x() * EXACT_TILE, grouped, top);             \
    }
EXACT_GROUPED(exact_grouped_any, WINT25, 0, 1)
EXACT_GROUPED(exact_grouped_f32, F32, 0, 2)
EXACT_GROUPED(exact_grouped_bf16, BF16, 0, 2)
EXACT_GROUPED(exact_grouped_int8, AFFINE, 8, 2)
EXACT_GROUPED(exact_grouped_int4, AFFINE, 4, 2)
EXACT_GROUPED(exact_grouped_wint2, WINT2, 0, 2)
EXACT_GROUPED(exact_grouped_nf4, NF4, 0, 1)
