// Rows moved about: gathered, added to where they came from, put into a cache.
#include "device.cuh"

// y (rows, K): row i is row `from[i]` of x.
extern "C" __global__ void gather(float *y /* (rows, K) */, const float *x /* (M, K) */, const u32 *from /* (rows) */, i32 k) {
    for (i32 i = thread_x(); i < k; i += threads_x())
        y[(i64)block_x() * k + i] = x[(i64)from[block_x()] * k + i];
}

// into[rows[i]] += weights[i] * x[i], i rising: rows may repeat, so a thread owns a column and walks over all rows.
extern "C" __global__ void scatter_add(float *into /* (M, K) */, const float *x /* (count, K) */, const u32 *rows /* (count) */,
                                       const float *weights /* (count) */,
                                       i32 count, i32 k) {
    i32 column = block_x() * threads_x() + thread_x();
    if (column >= k) return;
    for (i32 i = 0; i < count; i++) into[(i64)rows[i] * k + column] += weights[i] * x[(i64)i * k + column];
}

// The same where no row repeats: a block for each.
extern "C" __global__ void scatter_apart(float *into /* (M, K) */, const float *x /* (count, K) */, const u32 *rows /* (count) */,
                                         const float *weights /* (count) */, i32, i32 k) {
    i64 to = (i64)rows[block_x()] * k, from = (i64)block_x() * k;
    float weight = weights[block_x()];
    for (i32 i = thread_x(); i < k; i += threads_x()) into[to + i] += weight * x[from + i];
}

// into[at + i] = x[i] for `count` values.
extern "C" __global__ void place(float *into /* (M, K) */, const float *x /* (count) */, i64 at, i64 count) {
    i64 i = (i64)block_x() * threads_x() + thread_x();
    if (i < count) into[at + i] = x[i];
}
