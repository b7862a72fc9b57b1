// What the inputs of a layer add up to, for calibration: magnitudes and squares of columns, and the other half of second moments.
#include "device.cuh"

// tops[c] = max(tops[c], |x[r][c]|) over rows r, as bits, in whose order infinity and NaN come last; and where `squared` is set
// squares[c] += sum of x[r][c]^2 in f64: eight sums of every eighth row, one after the other. A block of 256 threads for 32 columns.
extern "C" __global__ void watch_columns(u32 *tops /* (K) */, double *squares /* (K) */, const float *x /* (M, K) */, i32 m, i32 k,
                                         i32 squared) {
    __shared__ u32 top_of[8][32];
    __shared__ double sum_of[8][32];
    i32 lane = thread_x() % 32, part = thread_x() / 32, c = block_x() * 32 + lane;
    u32 top = 0;
    double sum = 0.0;
    for (i32 r = part; r < m && c < k; r += 8) {
        float value = x[(i64)r * k + c];
        u32 magnitude = bits_of(value) & 0x7fffffffu;
        top = top > magnitude ? top : magnitude;
        sum += (double)value * (double)value;
    }
    top_of[part][lane] = top;
    sum_of[part][lane] = sum;
    barrier();
    if (part != 0 || c >= k) return;
    for (i32 i = 1; i < 8; i++) {
        top = top > top_of[i][lane] ? top : top_of[i][lane];
        sum += sum_of[i][lane];
    }
    if (top > tops[c]) tops[c] = top;
    if (squared) squares[c] += sum;
}

// moment[j][i] = moment[i][j] for i < j. A block of 256 threads for the 32 x 32 of tile row block_y() and tile column block_x(), where the
// latter is not the smaller.
extern "C" __global__ void mirror(double *moment /* (K, K) */, i32 k) {
    __shared__ double tile[32][33];
    if (block_x() < block_y()) return; // the whole block
    i32 lane = thread_x() % 32, part = thread_x() / 32, row = block_y() * 32, column = block_x() * 32;
    for (i32 r = part; r < 32; r += 8)
        if (row + r < k && column + lane < k) tile[r][lane] = moment[(i64)(row + r) * k + column + lane];
    barrier();
    for (i32 c = part; c < 32; c += 8) {
        i32 i = row + lane, j = column + c;
        if (i < j && j < k) moment[(i64)j * k + i] = tile[lane][c];
    }
}
