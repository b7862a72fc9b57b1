// y (M, N) = x (M, K) times the transpose of w (N, K), w in any form.
//
//   y[m][n] = sum over k of x[m][k] * w[n][k]
//
// `gemv` is for few rows of x and forms that gemv.cu does not take: a warp for each output column, each of whose threads takes every 32nd input column, so packed
// weights are read once and decoded where they are used. `gemm` is for many: a block computes a tile of 64 x 64 outputs,
// 4 x 4 a thread, over slices of 16 input columns decoded into shared memory. Sums are f32, fused, in rising k (gemm), or
// 32 such sums and a fixed tree (gemv). `decode` writes rows of w as they are (embeddings).
#include "weight.cuh"

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

extern "C" __global__ void gemm(float *y /* (M, N) */, const float *x /* (M, K) */, Weight w, i32 m) {
    __shared__ float left[16][64 + 4];  // (k, row of x)
    __shared__ float right[16][64 + 4]; // (k, row of w)
    i32 row = block_y() * 64, column = block_x() * 64;
    i32 ty = thread_x() / 16, tx = thread_x() % 16; // 256 threads
    float sums[4][4];
    for (i32 i = 0; i < 4; i++)
        for (i32 j = 0; j < 4; j++) sums[i][j] = 0.0f;
    for (i32 k0 = 0; k0 < w.k; k0 += 16) {
        for (i32 i = thread_x(); i < 16 * 64; i += 256) {
            i32 k = i % 16, r = i / 16;
            bool inside = k0 + k < w.k;
            left[k][r] = inside && row + r < m ? x[(i64)(row + r) * w.k + k0 + k] : 0.0f;
            right[k][r] = inside && column + r < w.n ? weight_at(w, column + r, k0 + k) : 0.0f;
        }
        barrier();
        for (i32 k = 0; k < 16; k++)
            for (i32 i = 0; i < 4; i++)
                for (i32 j = 0; j < 4; j++)
                    sums[i][j] = fma_(left[k][ty * 4 + i], right[k][tx * 4 + j], sums[i][j]);
        barrier();
    }
    for (i32 i = 0; i < 4; i++)
        for (i32 j = 0; j < 4; j++)
            if (row + ty * 4 + i < m && column + tx * 4 + j < w.n)
                y[(i64)(row + ty * 4 + i) * w.n + column + tx * 4 + j] = sums[i][j];
}

extern "C" __global__ void decode(float *y /* (rows, K) */, const u32 *ids /* (rows) */, Weight w) {
    i32 n = (i32)ids[block_x()];
    for (i32 k = thread_x(); k < w.k; k += threads_x()) y[(i64)block_x() * w.k + k] = weight_at(w, n, k);
}
