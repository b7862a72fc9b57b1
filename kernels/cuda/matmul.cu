// y (M, N) = x (M, K) times the transpose of w (N, K), w in any form.
//
//   y[m][n] = sum over k of x[m][k] * w[n][k]
//
// `gemv` is for few rows of x and forms that gemv.cu does not take: a warp for each output column, each of whose threads takes every 32nd input column, so packed
// weights are read once and decoded where they are used; sums are 32 in f32, fused, and a fixed tree. `exact_...` are for many, by
// exact_gemm.cuh, `exact_any` for sizes and forms that the others do not take. `decode` writes rows of w as they are (embeddings).
#include "exact_gemm.cuh"

extern "C" __global__ void gemv(float *y /* (M, N) */, const float *x /* (M, K) */, Weight w, i32 m) {
    i32 n = block_x() * (threads_x() / 32) + thread_x() / 32, lane = thread_x() % 32;
    if (n >= w.n) return; // the whole warp
    for (i32 from = 0; from < m; from += 8) {
        float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        i32 rows = m - from < 8 ? m - from : 8;
        for (i32 k = lane; k < w.k; k += 32) {
            float value = weight_at(w, n, k);
            UNROLL for (i32 i = 0; i < 8; i++)
                if (i < rows) sums[i] = fma_(x[(i64)(from + i) * w.k + k], value, sums[i]);
        }
        UNROLL for (i32 i = 0; i < 8; i++) { // a fixed count, so that the sums stay in registers
            float sum = warp_sum(sums[i]);
            if (lane == 0 && i < rows) y[(i64)(from + i) * w.n + n] = sum;
        }
    }
}

#define EXACT(name, FORM, BITS)                                                                                                       \
    extern "C" __global__ BOUNDS(256, 2) void name(float *y /* (M, N) */, const float *x /* (M, K) */, Weight w, i32 m) {             \
        exact_gemm<FORM, BITS, false>(y, x, w, block_y() * EXACT_TILE, m, block_x() * EXACT_TILE, nullptr, 0);                        \
    }
EXACT(exact_any, WINT25, 0)
EXACT(exact_f32, F32, 0)
EXACT(exact_bf16, BF16, 0)
EXACT(exact_int8, AFFINE, 8)
EXACT(exact_int4, AFFINE, 4)
EXACT(exact_wint2, WINT2, 0)
EXACT(exact_nf4, NF4, 0)

extern "C" __global__ void decode(float *y /* (rows, K) */, const u32 *ids /* (rows) */, Weight w) {
    i32 n = (i32)ids[block_x()];
    for (i32 k = thread_x(); k < w.k; k += threads_x()) y[(i64)block_x() * w.k + k] = weight_at(w, n, k);
}
