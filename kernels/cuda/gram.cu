// Second moments of activations for calibration: moment (K, K) of f64 = x^T x for x (M, K), on and above the diagonal.
//
//   moment[i][j] = sum over rows r of x[r][i] * x[r][j],   at most 512 products in f32, those sums in f64, rows rising
//
// `gram` multiplies in f32: a block of 256 threads computes 128 x 128 moments, 8 x 8 a thread. `gram_split` does so on tensor cores,
// 128 x 128 a block: each number is the sum of two of bf16, high + low, and high high + high low + low high is added up. What is left
// out, low low and the rest behind low, is below 3 * 2^-18 of the sum of the products' magnitudes. A moment belongs to one
// block, so nothing is added by two at a time.
#include "exact_tile.cuh"
#include "tensor.cuh"

enum { GRAM_ROWS = 512, SPLIT_TILE = 128, SPLIT_SLICE = 32, SPLIT_STAGES = 3 };

// Starts copying 16 rows from row `from` of x, those below `end`, of 128 columns from `column` on.
INLINE void copy_columns(float *to, const float *x, i32 from, i32 end, i32 column, i32 k) {
    UNROLL for (i32 t = 0; t < 2; t++) {
        i32 i = t * 256 + thread_x(), r = i / 32, c = i % 32 * 4, left = k - column - c;
        bool inside = from + r < end && left > 0;
        const float *at = x + (inside ? (i64)(from + r) * k + column + c : 0);
        float *place = to + r * EXACT_PITCH + c;
        if (k % 4 == 0) copy_16(place, at, inside ? 16 : 0);
        else UNROLL for (i32 e = 0; e < 4; e++) place[e] = inside && e < left ? at[e] : 0.0f;
    }
}

extern "C" __global__ BOUNDS(256, 2) void gram(double *moment /* (K, K), added to */, const float *x /* (M, K) */, i32 m, i32 k) {
    typedef float Slice[EXACT_SLICE * EXACT_PITCH]; // (row, column)
    Slice(*slices)[2] = (Slice(*)[2])shared_bytes;  // (now and next, left and right)
    i32 row, column;
    tile_of(block_x(), (k + EXACT_TILE - 1) / EXACT_TILE, &row, &column);
    row *= EXACT_TILE, column *= EXACT_TILE;
    copy_columns(slices[0][0], x, 0, m, row, k);
    copy_columns(slices[0][1], x, 0, m, column, k);
    close_copies();
    float sums[8][8];
    UNROLL for (i32 i = 0; i < 8; i++)
        UNROLL for (i32 j = 0; j < 8; j++) sums[i][j] = 0.0f;
    i32 now = 0;
    KEEP_LOOP for (i32 from = 0; from < m; from += EXACT_SLICE) {
        i32 t = thread_x(), next = from + EXACT_SLICE;
        wait_copies<0>();
        barrier(); // this slice is there for all, and the one before is done with
        if (next < m) {
            copy_columns(slices[now ^ 1][0], x, next, m, row, k);
            copy_columns(slices[now ^ 1][1], x, next, m, column, k);
        }
        close_copies();
        KEEP_LOOP for (i32 half = 0; half < EXACT_SLICE; half += 8) {
            i32 at = half * EXACT_PITCH;
            multiply_half(sums, slices[now][0] + at + first_row(t), slices[now][1] + at + first_column(t));
        }
        now ^= 1;
        if (next % GRAM_ROWS != 0 && next < m) continue;
        UNROLL for (i32 i = 0; i < 8; i++)
            UNROLL for (i32 j = 0; j < 8; j++) {
                i32 a = row + first_row(t) + i / 4 * 16 + i % 4, b = column + first_column(t) + j / 4 * 32 + j % 4;
                if (a <= b && b < k) moment[(i64)a * k + b] += (double)sums[i][j];
                sums[i][j] = 0.0f;
            }
    }
}

// x (M, K) to its high and low halves, rows of `padded` bf16 with zeros behind the K-th: y (2, M, padded).
extern "C" __global__ void split(u32 *y /* (2, M, padded / 2) */, const float *x /* (M, K) */, i64 pairs /* M * padded / 2 */, i32 k, i32 padded) {
    i64 i = (i64)block_x() * threads_x() + thread_x();
    if (i >= pairs) return;
    i64 row = i / (padded / 2);
    i32 column = (i32)(i % (padded / 2)) * 2;
    const float *from = x + row * k + column;
    float a = column < k ? from[0] : 0.0f, b = column + 1 < k ? from[1] : 0.0f;
    u32 high = pair_bf16(a, b);
    y[i] = high;
    y[pairs + i] = pair_bf16(a - as_float(high << 16), b - as_float(high & 0xffff0000u));
}

// Where chunk `chunk` (8 columns) of a row of 128 columns lies in a slice: the eight rows of a matrix in different banks.
INLINE i32 split_place(i32 row, i32 chunk) { return row * 256 + (chunk ^ (row & 7)) * 16; }

// Starts copying 32 rows of 128 columns of one half.
INLINE void copy_slice(u8 *to, const u16 *x, i32 from, i32 m, i32 column, i32 padded) {
    for (i32 i = thread_x(); i < SPLIT_SLICE * 16; i += 256) {
        i32 r = i / 16, chunk = i % 16;
        bool inside = from + r < m;
        copy_16(to + split_place(r, chunk), x + (i64)(inside ? from + r : 0) * padded + column + chunk * 8, inside ? 16 : 0);
    }
}

extern "C" __global__ void gram_split(double *moment /* (K, K), added to */, const u16 *x /* (2, M, padded) */, i32 m, i32 k,
                                      i32 padded /* a multiple of 128 */) {
    const i32 part = SPLIT_SLICE * 256, stage = 4 * part; // left high, left low, right high, right low
    const u16 *low = x + (i64)m * padded;
    i32 row, column;
    tile_of(block_x(), padded / SPLIT_TILE, &row, &column);
    row *= SPLIT_TILE, column *= SPLIT_TILE;
    i32 warp = thread_x() / 32, lane = thread_x() % 32, wi = warp / 4 * 64, wj = warp % 4 * 32;
    i32 slices = (m + SPLIT_SLICE - 1) / SPLIT_SLICE;
    float sums[4][4][4];
    UNROLL for (i32 i = 0; i < 4; i++)
        UNROLL for (i32 j = 0; j < 4; j++)
            UNROLL for (i32 c = 0; c < 4; c++) sums[i][j][c] = 0.0f;
    for (i32 t = 0; t < SPLIT_STAGES - 1 + slices; t++) {
        if (t >= SPLIT_STAGES - 1) { // slice t - 2 is there, for all, and the one before is done with
            wait_copies<SPLIT_STAGES - 2>();
            barrier();
        }
        if (t < slices) {
            u8 *to = shared_bytes + t % SPLIT_STAGES * stage;
            i32 from = t * SPLIT_SLICE;
            copy_slice(to, x, from, m, row, padded);
            copy_slice(to + part, low, from, m, row, padded);
            copy_slice(to + 2 * part, x, from, m, column, padded);
            copy_slice(to + 3 * part, low, from, m, column, padded);
        }
        close_copies();
        i32 now = t - (SPLIT_STAGES - 1);
        if (now < 0) continue;
        const u8 *at = shared_bytes + now % SPLIT_STAGES * stage;
        KEEP_LOOP for (i32 step = 0; step < 2; step++) {
            u32 b[2][4][2];
            UNROLL for (i32 half = 0; half < 2; half++)
                UNROLL for (i32 j = 0; j < 4; j += 2) {
                    u32 both[4];
                    i32 r = 16 * step + lane / 8 % 2 * 8 + lane % 8, chunk = wj / 8 + j + lane / 16;
                    load_transposed(both, at + (2 + half) * part + split_place(r, chunk));
                    b[half][j][0] = both[0], b[half][j][1] = both[1], b[half][j + 1][0] = both[2], b[half][j + 1][1] = both[3];
                }
            UNROLL for (i32 i = 0; i < 4; i++) {
                u32 high[4], rest[4];
                i32 r = 16 * step + lane / 16 * 8 + lane % 8, chunk = wi / 8 + 2 * i + lane / 8 % 2;
                load_transposed(high, at + split_place(r, chunk));
                load_transposed(rest, at + part + split_place(r, chunk));
                UNROLL for (i32 j = 0; j < 4; j++) {
                    multiply_add(sums[i][j], high, b[1][j]);
                    multiply_add(sums[i][j], rest, b[0][j]);
                    multiply_add(sums[i][j], high, b[0][j]);
                }
            }
        }
        if ((now + 1) % (GRAM_ROWS / SPLIT_SLICE) != 0 && now + 1 < slices) continue;
        UNROLL for (i32 i = 0; i < 4; i++)
            UNROLL for (i32 j = 0; j < 4; j++)
                UNROLL for (i32 c = 0; c < 4; c++) {
                    i32 a = row + wi + 16 * i + lane / 4 + c / 2 * 8, d = column + wj + 8 * j + lane % 4 * 2 + c % 2;
                    if (a <= d && d < k) moment[(i64)a * k + d] += (double)sums[i][j][c];
                    sums[i][j][c] = 0.0f;
                }
    }
}
