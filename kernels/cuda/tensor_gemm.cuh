// y = x times the transpose of w (N, K) on tensor cores: both rounded to bf16, sums in f32.
//
//   y[m][n] = sum over k of bf16(x[m][k]) * bf16(w[n][k])
//
// Off from the exact sum by at most (2^-8 + 2^-16) sum |x w| by the roundings of the factors, and by those of f32 sums.
//
// A block of 256 threads computes 128 x 128 outputs, a warp 64 x 32, over slices of 32 input columns. Slices of x, and of w as
// it lies packed, are copied to shared memory three ahead (`cp.async`); the next slice of w is decoded to bf16 while the tensor
// cores are at this one. Forms whose rows cannot be copied in whole pieces are decoded from where they lie.
#pragma once
#include "tensor.cuh"
#include "weight.cuh"

enum { TILE = 128, SLICE = 32, STAGES = 4 };

// Where the 16 bytes of columns 8 chunk ... 8 chunk + 7 of a row lie in a slice: spread so that the eight rows of a matrix lie
// in different banks.
INLINE i32 place_of(i32 row, i32 chunk) { return row * 64 + (chunk ^ ((row >> 1) & 3)) * 16; }

// Bytes of a row of a packed slice.
INLINE constexpr i32 packed_bytes(i32 form, i32 bits) { return form == AFFINE ? SLICE * bits / 8 : form == WINT2 ? 8 : form == NF4 ? 16 : 0; }

// Rows of x: row i itself; or the token of the entry at place i, entry `grouped[i]` being token * top + j; see moe.cu.
struct Left {
    const u16 *x;
    const i32 *grouped;
    i32 top; // 0: row i itself
};

// Starts copying the slice from column `k` of rows `row`... of x, of which there are 128 below `end`, or fewer.
template <bool GROUPED> INLINE void copy_left(u8 *to, Left left, i32 row, i32 end, i32 k, i32 padded) {
    for (i32 i = thread_x(); i < TILE * 4; i += 256) {
        i32 r = i / 4, chunk = i % 4;
        bool inside = row + r < end;
        i32 from = inside ? row + r : row;
        if (GROUPED && left.top > 0) from = left.grouped[from] / left.top;
        copy_16(to + place_of(r, chunk), left.x + (i64)from * padded + k + chunk * 8, inside ? 16 : 0);
    }
}

// The same for w: packed rows one after the other, or bf16 as x.
template <i32 FORM, i32 BITS> INLINE void copy_right(u8 *to, const Weight &w, i32 row, i32 k) {
    if constexpr (FORM == BF16) {
        for (i32 i = thread_x(); i < TILE * 4; i += 256) {
            i32 r = i / 4, chunk = i % 4, left = (w.k - k - chunk * 8) * 2;
            bool inside = row + r < w.n && left > 0;
            const u8 *from = w.parts[0] + ((i64)(inside ? row + r : 0) * w.k + (inside ? k + chunk * 8 : 0)) * 2;
            copy_16(to + place_of(r, chunk), from, inside ? (left < 16 ? left : 16) : 0);
        }
        return;
    }
    const i32 bytes = packed_bytes(FORM, BITS), piece = bytes < 16 ? 8 : 16, pieces = bytes / piece, pitch = w.k / SLICE * bytes;
    for (i32 i = thread_x(); i < TILE * pieces; i += 256) {
        i32 r = i / pieces, at = i % pieces * piece;
        bool inside = row + r < w.n;
        const u8 *from = w.parts[0] + (i64)(inside ? row + r : 0) * pitch + k / SLICE * bytes + at;
        if constexpr (piece == 16) copy_16(to + r * bytes + at, from, inside ? 16 : 0);
        else copy_8(to + r * bytes + at, from, inside ? 8 : 0);
    }
}

// Decodes a slice: thread t the columns 16 (t%2) ... of row t/2, by the formulas of `weight_at`.
template <i32 FORM, i32 BITS> INLINE void decode_right(u8 *to, const u8 *packed, const Weight &w, u32 share, i32 row, i32 k) {
    i32 r = thread_x() / 2, half = thread_x() % 2, n = row + r, from = k + 16 * half;
    u32 pairs[8];
    bool inside = n < w.n;
    if (FORM == F32) { // any form, from where it lies
        UNROLL for (i32 i = 0; i < 8; i++) {
            i32 a = from + 2 * i;
            pairs[i] = pair_bf16(inside && a < w.k ? weight_at(w, n, a) : 0.0f, inside && a + 1 < w.k ? weight_at(w, n, a + 1) : 0.0f);
        }
    } else if (!inside) {
        UNROLL for (i32 i = 0; i < 8; i++) pairs[i] = 0;
    } else if (FORM == AFFINE) {
        i32 groups = w.k / w.group, g = group_at(from, share);
        float scale = float_at(w.parts[1], w.scale, (i64)n * groups + g);
        i32 zero = w.zero;
        if (zero < 0) zero = code_at(w.parts[2] + (i64)n * ((groups * BITS + 7) / 8), g, BITS);
        const u32 *words = (const u32 *)(packed + r * (SLICE * BITS / 8) + half * (2 * BITS));
        float from_zero = 8388608.0f + (float)zero;
        UNROLL for (i32 i = 0; i < 8; i++) {
            float a, b;
            if constexpr (BITS == 8) {
                a = above_8388608(words[i / 2], i % 2 * 2), b = above_8388608(words[i / 2], i % 2 * 2 + 1);
            } else {
                a = above_8388608(words[i / 4] & 0x0f0f0f0fu, i % 4), b = above_8388608((words[i / 4] >> 4) & 0x0f0f0f0fu, i % 4);
            }
            pairs[i] = pair_bf16((a - from_zero) * scale, (b - from_zero) * scale);
        }
    } else if (FORM == WINT2) {
        u8 both = w.parts[1][(i64)n * ((w.k / 64 + 1) / 2) + from / 128];
        i32 local = (from / 64) % 2 == 0 ? both >> 4 : both & 15;
        float scale = (float)local * from_bf16(((const u16 *)w.parts[2])[n]);
        float slope = ((const float *)w.parts[3])[n], offset = ((const float *)w.parts[4])[n];
        u32 word = *(const u32 *)(packed + r * 8 + half * 4);
        UNROLL for (i32 v = 0; v < 4; v++) {
            i32 code = (i32)floor_((float)((word >> (8 * v)) & 255u) * slope + offset + 0.5f);
            float a[4];
            UNROLL for (i32 i = 0; i < 4; i++) a[i] = (float)(((code >> (9 - 3 * i)) & 63) - 32) * scale;
            pairs[2 * v] = pair_bf16(a[0], a[1]);
            pairs[2 * v + 1] = pair_bf16(a[2], a[3]);
        }
    } else {
        float scale = ((const float *)w.parts[1])[(i64)n * (w.k / 64) + from / 64];
        const u32 *words = (const u32 *)(packed + r * 16 + half * 8);
        UNROLL for (i32 i = 0; i < 8; i++) {
            u32 word = words[i / 4] >> (i % 4 * 8);
            pairs[i] = pair_bf16(nf4_level((i32)(word & 15u)) * scale, nf4_level((i32)((word >> 4) & 15u)) * scale);
        }
    }
    UNROLL for (i32 i = 0; i < 8; i++) ((u32 *)(to + place_of(r, 2 * half + i / 4)))[i % 4] = pairs[i];
}

// Outputs of rows `row`... below `end` and columns `column`...
template <i32 FORM, i32 BITS, bool GROUPED>
INLINE void tensor_gemm(float *y, Left x, const Weight &w, i32 row, i32 end, i32 column, i32 padded) {
    const bool packed = FORM != BF16 && FORM != F32;
    const i32 left_bytes = TILE * 64, raw_bytes = FORM == BF16 ? left_bytes : TILE * packed_bytes(FORM, BITS);
    u8 *left = shared_bytes, *raw = left + STAGES * left_bytes, *right = raw + STAGES * raw_bytes; // right: two slices
    i32 slices = padded / SLICE;
    u32 share = FORM == AFFINE ? share_of(w) : 0;
    i32 warp = thread_x() / 32, lane = thread_x() % 32, wm = warp / 4 * 64, wn = warp % 4 * 32;
    float sums[4][4][4];
    UNROLL for (i32 i = 0; i < 4; i++)
        UNROLL for (i32 j = 0; j < 4; j++)
            UNROLL for (i32 c = 0; c < 4; c++) sums[i][j][c] = 0.0f;
    for (i32 t = 0; t < STAGES - 1; t++) {
        if (t < slices) {
            copy_left<GROUPED>(left + t * left_bytes, x, row, end, t * SLICE, padded);
            if constexpr (FORM != F32) copy_right<FORM, BITS>(raw + t * raw_bytes, w, column, t * SLICE);
        }
        close_copies();
    }
    if (FORM != BF16) {
        if (packed) {
            wait_copies<STAGES - 2>();
            barrier();
        }
        decode_right<FORM, BITS>(right, raw, w, share, column, 0);
    }
    for (i32 t = 0; t < slices; t++) {
        wait_copies<STAGES - 3>(); // this slice and the next are there
        barrier();                 // for all, and the slice before is done with
        i32 next = t + STAGES - 1;
        if (next < slices) {
            copy_left<GROUPED>(left + next % STAGES * left_bytes, x, row, end, next * SLICE, padded);
            if constexpr (FORM != F32) copy_right<FORM, BITS>(raw + next % STAGES * raw_bytes, w, column, next * SLICE);
        }
        close_copies();
        if (FORM != BF16 && t + 1 < slices)
            decode_right<FORM, BITS>(right + (t + 1) % 2 * left_bytes, raw + (t + 1) % STAGES * raw_bytes, w, share, column, (t + 1) * SLICE);
        const u8 *a_slice = left + t % STAGES * left_bytes;
        const u8 *b_slice = FORM == BF16 ? raw + t % STAGES * raw_bytes : right + t % 2 * left_bytes;
        UNROLL for (i32 step = 0; step < 2; step++) {
            u32 a[4][4], b[4][2];
            UNROLL for (i32 i = 0; i < 4; i++) load_matrices(a[i], a_slice + place_of(wm + 16 * i + lane % 16, 2 * step + lane / 16));
            UNROLL for (i32 j = 0; j < 4; j += 2) {
                u32 both[4];
                load_matrices(both, b_slice + place_of(wn + 8 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
                b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
            }
            UNROLL for (i32 i = 0; i < 4; i++)
                UNROLL for (i32 j = 0; j < 4; j++) multiply_add(sums[i][j], a[i], b[j]);
        }
    }
    UNROLL for (i32 i = 0; i < 4; i++)
        UNROLL for (i32 j = 0; j < 4; j++)
            UNROLL for (i32 c = 0; c < 4; c++) {
                i32 r = row + wm + 16 * i + lane / 4 + c / 2 * 8, n = column + wn + 8 * j + lane % 4 * 2 + c % 2;
                if (r < end && n < w.n) y[(i64)r * w.n + n] = sums[i][j][c];
            }
}
