// y = x times the transpose of w (N, K) in f32, w in any form: each output is the fused sum over rising k, from zero, whatever the
// tile and whatever rows are beside it.
//
// A block of 256 threads computes 128 x 128 outputs, a warp 32 x 64, a thread 8 x 8, over slices of 16 input columns. While a
// slice is multiplied, the next is on its way to registers; it is decoded when it goes to the other of two places in shared
// memory. A thread brings 8 neighbouring columns of one row of x and of one row of w, which share a scale, so that nothing is
// divided for each number. Forms and sizes without such runs are decoded number by number.
#pragma once
#include "exact_tile.cuh"
#include "weight.cuh"

// The 16 columns of a slice lie as two halves of 8, rows of 128 (and 4) numbers each: half 1 in the other banks.
enum { EXACT_HALF = 8 * EXACT_PITCH + 16, EXACT_SIDE = 2 * EXACT_HALF };

// Eight numbers of a row as they lie; of packed ones the scale in the last word, and the zero point in the one before.
struct Piece {
    u32 words[8];
};

typedef u32 FourWords __attribute__((vector_size(16)));
typedef u32 TwoWords __attribute__((vector_size(8)));

// Columns k ... k + 7 of a row of x; `whole`: K is a multiple of 8.
INLINE void fetch_left(Piece &piece, const float *row, i32 k, i32 columns, bool whole) {
    if (whole) {
        FourWords a = {0, 0, 0, 0}, b = a;
        if (k < columns) a = *(const FourWords *)(row + k), b = *(const FourWords *)(row + k + 4);
        UNROLL for (i32 i = 0; i < 4; i++) piece.words[i] = a[i], piece.words[4 + i] = b[i];
    } else {
        UNROLL for (i32 i = 0; i < 8; i++) piece.words[i] = k + i < columns ? bits_of(row[k + i]) : 0;
    }
}

// The same of w, whose form is one of those below, K and groups being multiples of 8.
template <i32 FORM, i32 BITS> INLINE void fetch_right(Piece &piece, const Weight &w, i32 n, i32 k) {
    if (k >= w.k) return;
    i32 columns = w.k, group = w.group;
    FORGET(columns); // as in `exact_gemm`
    FORGET(group);
    i64 at = (i64)n * columns + k;
    if (FORM == F32) {
        FourWords a = *(const FourWords *)(w.parts[0] + 4 * at), b = *(const FourWords *)(w.parts[0] + 4 * at + 16);
        UNROLL for (i32 i = 0; i < 4; i++) piece.words[i] = a[i], piece.words[4 + i] = b[i];
    } else if (FORM == BF16) {
        FourWords a = *(const FourWords *)(w.parts[0] + 2 * at);
        UNROLL for (i32 i = 0; i < 4; i++) piece.words[i] = a[i];
    } else if (FORM == AFFINE) {
        i32 groups = columns / group, g = k / group;
        piece.words[7] = bits_of(float_at(w.parts[1], w.scale, (i64)n * groups + g));
        i32 zero = w.zero;
        if (BITS == 8) {
            TwoWords a = *(const TwoWords *)(w.parts[0] + at);
            piece.words[0] = a[0], piece.words[1] = a[1];
            if (zero < 0) zero = w.parts[2][(i64)n * groups + g];
        } else {
            piece.words[0] = *(const u32 *)(w.parts[0] + at / 2);
            if (zero < 0) zero = code_at(w.parts[2] + (i64)n * ((groups + 1) / 2), g, 4);
        }
        piece.words[6] = (u32)zero;
    } else if (FORM == WINT2) {
        u8 both = w.parts[1][(i64)n * ((columns / 64 + 1) / 2) + k / 128];
        i32 local = (k / 64) % 2 == 0 ? both >> 4 : both & 15;
        piece.words[0] = *(const u16 *)(w.parts[0] + at / 4);
        piece.words[7] = bits_of((float)local * from_bf16(((const u16 *)w.parts[2])[n]));
    } else {
        piece.words[0] = *(const u32 *)(w.parts[0] + at / 2);
        piece.words[7] = ((const u32 *)w.parts[1])[(i64)n * (columns / 64) + k / 64];
    }
}

// Its values to a row's place in a half slice, column after column.
INLINE void store_plain(float *to, const Piece &piece) {
    UNROLL for (i32 i = 0; i < 8; i++) to[i * EXACT_PITCH] = as_float(piece.words[i]);
}

// The same of w, by the formulas of `weight_at`.
template <i32 FORM, i32 BITS> INLINE void store_right(float *to, const Piece &piece, const Weight &w, i32 n, i32 k, const float *levels) {
    float scale = as_float(piece.words[7]);
    i32 zero = (i32)piece.words[6];
    if (k >= w.k) {
        UNROLL for (i32 i = 0; i < 8; i++) to[i * EXACT_PITCH] = 0.0f;
    } else if (FORM == F32) {
        store_plain(to, piece);
    } else if (FORM == BF16) {
        UNROLL for (i32 i = 0; i < 8; i++)
            to[i * EXACT_PITCH] = as_float(i % 2 == 0 ? piece.words[i / 2] << 16 : piece.words[i / 2] & 0xffff0000u);
    } else if (FORM == AFFINE && BITS == 8) {
        UNROLL for (i32 i = 0; i < 8; i++)
            to[i * EXACT_PITCH] = (float)((i32)((piece.words[i / 4] >> (i % 4 * 8)) & 255u) - zero) * scale;
    } else if (FORM == AFFINE) {
        UNROLL for (i32 i = 0; i < 8; i++)
            to[i * EXACT_PITCH] = (float)((i32)((piece.words[0] >> (4 * i)) & 15u) - zero) * scale;
    } else if (FORM == WINT2) {
        float slope = ((const float *)w.parts[3])[n], offset = ((const float *)w.parts[4])[n];
        UNROLL for (i32 v = 0; v < 2; v++) {
            float line = (float)((piece.words[0] >> (8 * v)) & 255u) * slope + offset;
            i32 code = (i32)floor_(line + 0.5f);
            UNROLL for (i32 i = 0; i < 4; i++)
                to[(4 * v + i) * EXACT_PITCH] = (float)(((code >> (9 - 3 * i)) & 63) - 32) * scale;
        }
    } else {
        UNROLL for (i32 i = 0; i < 8; i++) to[i * EXACT_PITCH] = levels[(piece.words[0] >> (4 * i)) & 15u] * scale;
    }
}

// Of any other w, from where it lies.
INLINE void decode_right(float *to, const Weight &w, i32 n, i32 k) {
    KEEP_LOOP for (i32 i = 0; i < 8; i++) to[i * EXACT_PITCH] = k + i < w.k ? weight_at(w, n, k + i) : 0.0f;
}

// Outputs of rows `row`... below `end` and columns `column`... Row i of the left side is row i of x; or, for entries grouped by
// expert (moe.cu), that of the token of entry grouped[i] where `top` is not 0. `FORM`: WINT25 stands for any
// that is decoded from where it lies.
template <i32 FORM, i32 BITS, bool GROUPED>
INLINE void exact_gemm(float *y, const float *x, const Weight &w, i32 row, i32 end, i32 column, const i32 *grouped, i32 top) {
    __shared__ __attribute__((aligned(16))) float sides[2][2][EXACT_SIDE];
    __shared__ float levels[16];
    const bool WHOLE = FORM != WINT25;
    if (FORM == NF4 && thread_x() < 16) levels[thread_x()] = nf4_level(thread_x());
    __shared__ i32 limits[2]; // for the end: registers are scarce
    if (GROUPED && thread_x() == 0) limits[0] = row, limits[1] = end;
    barrier();
    i32 at = row + thread_x() / 2;
    // Rows and columns beyond the end are others again, whose outputs nobody takes.
    i64 from = at < end ? at : end - 1;
    if (GROUPED && top > 0) from = grouped[from] / top;
    const float *mine = x + from * w.k;
    float sums[8][8];
    UNROLL for (i32 i = 0; i < 8; i++)
        UNROLL for (i32 j = 0; j < 8; j++) sums[i][j] = 0.0f;
    i32 now = 1;
    KEEP_LOOP for (i32 k = -EXACT_SLICE; k < w.k; k += EXACT_SLICE) { // at first there is nothing to multiply yet
        now ^= 1;
        // Nobody reads the other place since the barrier before. One side at a time is under way: registers are scarce.
        KEEP_LOOP for (i32 h = 0; h < 2; h++) {
            i32 t = thread_x();
            FORGET(t); // or the address of every form's parts would be kept in registers from the beginning
            i32 half = t % 2, n = column + t / 2 < w.n ? column + t / 2 : w.n - 1, next = k + EXACT_SLICE + 8 * half;
            Piece piece;
            if (h == 0) fetch_left(piece, mine, next, w.k, WHOLE);
            else if constexpr (WHOLE) fetch_right<FORM, BITS>(piece, w, n, next);
            if (k >= 0) multiply_half(sums, &sides[now][0][h * EXACT_HALF + first_row(t)], &sides[now][1][h * EXACT_HALF + first_column(t)]);
            float *to = &sides[now ^ 1][h][half * EXACT_HALF + t / 2];
            if (h == 0) store_plain(to, piece);
            else if constexpr (WHOLE) store_right<FORM, BITS>(to, piece, w, n, next, levels);
            else decode_right(to, w, n, next);
        }
        barrier();
    }
    if (GROUPED) row = limits[0], end = limits[1];
    UNROLL for (i32 i = 0; i < 8; i++) {
        i32 to_row = row + first_row(thread_x()) + i / 4 * 16 + i % 4;
        if (to_row >= end) continue;
        UNROLL for (i32 j = 0; j < 8; j += 4) {
            i32 to_column = column + first_column(thread_x()) + j / 4 * 32;
            float *to = y + (i64)to_row * w.n + to_column;
            if (w.n % 4 == 0) {
                if (to_column < w.n) *(Four *)to = Four{sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]};
            } else {
                UNROLL for (i32 c = 0; c < 4; c++)
                    if (to_column + c < w.n) to[c] = sums[i][j + c];
            }
        }
    }
}
