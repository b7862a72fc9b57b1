// Rows moved about: gathered, added to where they came from, put into a cache; and second moments.
#include "device.cuh"

// y (rows, K): row i is row `from[i]` of x.
extern "C" __global__ void gather(float *y, const float *x, const u32 *from, i32 k) {
    for (i32 i = thread_x(); i < k; i += threads_x())
        y[(i64)block_x() * k + i] = x[(i64)from[block_x()] * k + i];
}

// into[rows[i]] += weights[i] * x[i], i rising: rows may repeat, so a thread owns a column and walks over all rows.
extern "C" __global__ void scatter_add(float *into, const float *x /* (count, K) */, const u32 *rows, const float *weights,
                                       i32 count, i32 k) {
    i32 column = block_x() * threads_x() + thread_x();
    if (column >= k) return;
    for (i32 i = 0; i < count; i++) into[(i64)rows[i] * k + column] += weights[i] * x[(i64)i * k + column];
}

// into[at + i] = x[i] for `count` values.
extern "C" __global__ void place(float *into, const float *x, i64 at, i64 count) {
    i64 i = (i64)block_x() * threads_x() + thread_x();
    if (i < count) into[at + i] = x[i];
}

// moment (K, K) of f64: x^T x, tiles of 16 x 16 on and above the diagonal. Products of at most 512 rows are summed in
// f32, those sums in f64, rows rising.
extern "C" __global__ void gram(double *moment, const float *x /* (M, K) */, i32 m, i32 k) {
    __shared__ float left[16][16], right[16][16]; // (row, column)
    if (block_x() < block_y()) return; // the whole block
    i32 ty = thread_x() / 16, tx = thread_x() % 16; // 256 threads
    i32 i = block_y() * 16 + ty, j = block_x() * 16 + tx;
    double total = 0.0;
    for (i32 block = 0; block < m; block += 512) {
        float sum = 0.0f;
        i32 end = m < block + 512 ? m : block + 512;
        for (i32 row = block; row < end; row += 16) {
            i32 r = row + ty, a = block_y() * 16 + tx, b = block_x() * 16 + tx;
            left[ty][tx] = r < end && a < k ? x[(i64)r * k + a] : 0.0f;
            right[ty][tx] = r < end && b < k ? x[(i64)r * k + b] : 0.0f;
            barrier();
            for (i32 l = 0; l < 16; l++) sum = fma_(left[l][ty], right[l][tx], sum);
            barrier();
        }
        total += (double)sum;
    }
    if (i < k && j < k && i <= j) moment[(i64)i * k + j] = total;
}
