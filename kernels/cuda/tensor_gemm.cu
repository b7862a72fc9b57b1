// y (M, N) = x (M, K) times the transpose of w (N, K) on tensor cores, by tensor_gemm.cuh.
#include "tensor_gemm.cuh"

// x (M, K) of f32 to bf16, rows of `padded` values, zeros behind the K-th.
extern "C" __global__ void narrow(u32 *y /* (M, padded / 2) */, const float *x /* (M, K) */, i64 pairs /* M * padded / 2 */, i32 k, i32 padded) {
    i64 i = (i64)block_x() * threads_x() + thread_x();
    if (i >= pairs) return;
    i64 row = i / (padded / 2);
    i32 column = (i32)(i % (padded / 2)) * 2;
    const float *from = x + row * k + column;
    y[i] = pair_bf16(column < k ? from[0] : 0.0f, column + 1 < k ? from[1] : 0.0f);
}

#define TENSOR_GEMM(NAME, FORM, BITS)                                                                                          \
    extern "C" __global__ void NAME(float *y /* (M, N) */, const u16 *x /* (M, padded) */, Weight w, i32 m, i32 padded) {        \
        tensor_gemm<FORM, BITS, false>(y, Left{x, nullptr, 0}, w, block_y() * TILE, m, block_x() * TILE, padded);               \
    }
TENSOR_GEMM(gemm_any, F32, 0)     // no alignment needed
TENSOR_GEMM(gemm_bf16, BF16, 0)   // K a multiple of 8
TENSOR_GEMM(gemm_int8, AFFINE, 8) // the others: K a multiple of 32, groups of 16 or more
TENSOR_GEMM(gemm_int4, AFFINE, 4)
TENSOR_GEMM(gemm_wint2, WINT2, 0)
TENSOR_GEMM(gemm_nf4, NF4, 0)
