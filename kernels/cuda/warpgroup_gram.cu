// Second moments as in gram.cu, on the tensor cores of sm_90a by warpgroups: moment (K, K) of f64 = x^T x for x (M, K), on and above the
// diagonal.
//
//   moment[i][j] = sum over rows r of x[r][i] * x[r][j],   at most 512 rows in f32, those sums in f64, rows rising
//
// As in `gram_split` each number is the sum of two of bf16, and high high + high low + low high is added up; what is left out is below
// 3 * 2^-18 of the sum of the products' magnitudes. x is turned over first, so that rows of x^T are the rows of both factors. A block of two
// warpgroups computes 128 x 128 moments, a warpgroup 64 of their rows; sums of 512 rows are added up in registers.
//
// build_ptx: sm_90a
#include "warpgroup.cuh"

enum { FOLD = 512, GRAM_SIDE = 128, GRAM_SLICE = 64, GRAM_STAGES = 3, GRAM_PART = GRAM_SIDE * GRAM_SLICE * 2 };

// x (M, K) to the high and low halves of x^T: y (2, rows, padded / 2), zeros behind the M-th column and the K-th row. A block of 256
// threads turns 64 rows and 32 columns of x over.
extern "C" __global__ void split_turned(u32 *y /* (2, rows, padded / 2) */, const float *x /* (M, K) */, i32 m, i32 k,
                                        i32 rows /* a multiple of 128 */, i32 padded /* a multiple of 64 */) {
    __shared__ float tile[64][33];
    i32 from = block_y() * 64, column = block_x() * 32, lane = thread_x() % 32, warp = thread_x() / 32;
    for (i32 r = warp; r < 64; r += 8) tile[r][lane] = from + r < m && column + lane < k ? x[(i64)(from + r) * k + column + lane] : 0.0f;
    barrier();
    for (i32 c = warp; c < 32; c += 8) {
        float a = tile[2 * lane][c], b = tile[2 * lane + 1][c];
        u32 high = pair_bf16(a, b);
        u32 *to = y + ((i64)(column + c) * padded + from) / 2 + lane;
        to[0] = high;
        to[(i64)rows * padded / 2] = pair_bf16(a - as_float(high << 16), b - as_float(high & 0xffff0000u));
    }
}

extern "C" __global__ void gram_wide(double *moment /* (K, K), added to */, const u16 *x /* (2, rows, padded), turned over */, i32 k, i32 rows,
                                     i32 padded) {
    u8 *stages = shared_bytes + (1024 - shared_address(shared_bytes) % 1024) % 1024; // each: left high, left low, right high, right low
    i32 row, column, lane = thread_x() % 32, group = thread_x() / 128, slices = padded / GRAM_SLICE;
    tile_of(block_x(), rows / GRAM_SIDE, &row, &column);
    row *= GRAM_SIDE, column *= GRAM_SIDE;
    // This thread copies 16 bytes of each 32nd row.
    i32 r = thread_x() / 8, chunk = thread_x() % 8;
    u32 to = (u32)(r * 128 + (chunk ^ (r % 8)) * 16);
    const u16 *left = x + (i64)(row + r) * padded + chunk * 8, *right = x + (i64)(column + r) * padded + chunk * 8;
    i64 low = (i64)rows * padded, step = (i64)32 * padded;
    float sums[64];
    double totals[64];
    UNROLL for (i32 i = 0; i < 64; i++) totals[i] = 0.0;
    auto copy = [&](i32 t) {
        if (t < slices) {
            u8 *stage = stages + t % GRAM_STAGES * (4 * GRAM_PART) + to;
            i64 at = (i64)t * GRAM_SLICE;
            UNROLL for (i32 i = 0; i < 4; i++) {
                copy_16(stage + i * 4096, left + at, 16);
                copy_16(stage + GRAM_PART + i * 4096, left + low + at, 16);
                copy_16(stage + 2 * GRAM_PART + i * 4096, right + at, 16);
                copy_16(stage + 3 * GRAM_PART + i * 4096, right + low + at, 16);
                at += step;
            }
        }
        close_copies();
    };
    copy(0);
    KEEP_LOOP for (i32 block = 0; block < slices; block += FOLD / GRAM_SLICE) {
        i32 end = slices < block + FOLD / GRAM_SLICE ? slices : block + FOLD / GRAM_SLICE;
        UNROLL for (i32 i = 0; i < 64; i++) sums[i] = 0.0f;
        KEEP_LOOP for (i32 t = block; t < end; t++) {
            wait_copies<0>();
            show_copies();
            barrier();   // slice t is there, for all; and all are done with products of slice t - 2
            copy(t + 1); // in its place
            const u8 *stage = stages + t % GRAM_STAGES * (4 * GRAM_PART);
            u64 high_left = rows_at(stage + group * 8192), low_left = rows_at(stage + GRAM_PART + group * 8192);
            u64 high_right = rows_at(stage + 2 * GRAM_PART), low_right = rows_at(stage + 3 * GRAM_PART);
            begin_products();
            UNROLL for (i32 s = 0; s < 4; s++) {
                warpgroup_multiply_rows(sums, high_left + 2 * s, low_right + 2 * s);
                warpgroup_multiply_rows(sums, low_left + 2 * s, high_right + 2 * s);
                warpgroup_multiply_rows(sums, high_left + 2 * s, high_right + 2 * s);
            }
            close_products();
            wait_products<1>();
        }
        wait_products<0>();
        settle<64>(sums);
        UNROLL for (i32 i = 0; i < 64; i++) totals[i] += (double)sums[i];
    }
    UNROLL for (i32 j = 0; j < 16; j++)
        UNROLL for (i32 c = 0; c < 4; c++) {
            i32 a = row + thread_x() / 32 * 16 + lane / 4 + c / 2 * 8, d = column + 8 * j + lane % 4 * 2 + c % 2;
            if (a <= d && d < k) moment[(i64)a * k + d] += totals[4 * j + c];
        }
}
