// y (M, N) = x (M, K) times the transpose of w (N, K) on the tensor cores of sm_90a, by warpgroups: both rounded to bf16, sums in f32,
// so off as tensor_gemm.cuh says.
//
//   y[m][n] = sum over k of bf16(x[m][k]) * bf16(w[n][k])
//
// A block of two warpgroups computes 128 columns of y for T rows, over slices of 64 input columns. Weights are the left factor: each
// lane loads 16 neighbouring ones of its two rows, decodes them in registers, and they never lie in shared memory. Slices of x, the
// right factor, are copied there two ahead (`cp.async`); a product works while the next slice of w is decoded and that of w after it loads.
//
// x comes with its columns in another order, so that those of a lane are neighbours in w: `narrow_turned`.
//
// build_ptx: sm_90a
#include "warpgroup.cuh"
#include "weight.cuh"

enum { WIDE_COLUMNS = 128, WIDE_SLICE = 64, WIDE_STAGES = 4 };

// The column of x at place p of a slice: lane q = t % 4 of a warp takes columns 16 q ... 16 q + 15, four a product.
INLINE i32 turned(i32 p) { return p / 64 * 64 + p % 8 / 2 * 16 + p % 64 / 16 * 4 + p % 16 / 8 * 2 + p % 2; }

// x (M, K) of f32 to bf16, columns in that order, zeros behind the K-th.
extern "C" __global__ void narrow_turned(u32 *y /* (M, padded / 2) */, const float *x /* (M, K) */, i64 pairs /* M * padded / 2 */, i32 k,
                                         i32 padded /* a multiple of 128 */) {
    i64 i = (i64)block_x() * threads_x() + thread_x();
    if (i >= pairs) return;
    i64 row = i / (padded / 2);
    i32 column = turned((i32)(i % (padded / 2)) * 2);
    const float *from = x + row * k + column;
    y[i] = pair_bf16(column < k ? from[0] : 0.0f, column + 1 < k ? from[1] : 0.0f);
}

struct alignas(16) Sixteen { u32 words[4]; };
struct alignas(8) Eight { u32 words[2]; };

// Words that hold 16 neighbouring weights.
INLINE constexpr i32 words_of(i32 form, i32 bits) { return form == BF16 ? 8 : form == AFFINE ? bits / 2 : form == WINT2 ? 1 : 2; }

// 16 weights of a row as they lie, and what they are scaled by.
template <i32 FORM, i32 BITS> struct Raw {
    u32 words[words_of(FORM, BITS)];
    float scale, zero;
    // BF16: a zero that the assembler does not know of. Words that are combined with it are written where products read them after the
    // wait for those, and not already by the load, which would make the assembler wait for each product.
    u32 nothing;
};

// A row of w as a lane walks along it: where its first weights and scales lie, and what all of them share (WINT2).
struct Line {
    const u8 *weights, *zeros, *locals;
    i64 scales;
    float super, slope, offset;
    bool there; // below N
};
template <i32 FORM, i32 BITS> INLINE Line line_of(const Weight &w, i32 row) {
    i32 n = row < w.n ? row : w.n - 1, groups = FORM == AFFINE ? w.k / w.group : w.k / 64;
    Line line = {w.parts[0] + (i64)n * w.k / 16 * (4 * words_of(FORM, BITS)), nullptr, nullptr, (i64)n * groups, 0, 0, 0, row < w.n};
    if constexpr (FORM == AFFINE) line.zeros = w.parts[2] + (i64)n * ((groups * BITS + 7) / 8);
    if constexpr (FORM == WINT2) {
        line.locals = w.parts[1] + (i64)n * ((groups + 1) / 2);
        line.super = from_bf16(((const u16 *)w.parts[2])[n]);
        line.slope = ((const float *)w.parts[3])[n], line.offset = ((const float *)w.parts[4])[n];
    }
    return line;
}

// Its weights k ... k + 15; zeros past the end. `share` is that of its groups.
template <i32 FORM, i32 BITS> INLINE void load(Raw<FORM, BITS> &raw, const Weight &w, const Line &line, i32 k, u32 share) {
    const i32 count = words_of(FORM, BITS);
    UNROLL for (i32 i = 0; i < count; i++) raw.words[i] = 0;
    raw.scale = raw.zero = 0.0f;
    raw.nothing = (u32)w.padding;
    if (k >= w.k) return;
    const u8 *from = line.weights + k / 16 * (4 * count);
    if constexpr (count >= 4) {
        UNROLL for (i32 i = 0; i < count; i += 4) {
            Sixteen piece = *(const Sixteen *)(from + 4 * i);
            UNROLL for (i32 j = 0; j < 4; j++) raw.words[i + j] = piece.words[j];
        }
    } else if constexpr (count == 2) {
        Eight piece = *(const Eight *)from;
        raw.words[0] = piece.words[0], raw.words[1] = piece.words[1];
    } else {
        raw.words[0] = *(const u32 *)from;
    }
    if constexpr (FORM == AFFINE) {
        i32 g = group_at(k, share);
        raw.scale = float_at(w.parts[1], w.scale, line.scales + g);
        raw.zero = (float)(w.zero >= 0 ? w.zero : code_at(line.zeros, g, BITS));
    } else if constexpr (FORM == WINT2) {
        u8 both = line.locals[k / 128];
        raw.scale = (float)((k & 64) == 0 ? both >> 4 : both & 15) * line.super;
    } else if constexpr (FORM == NF4) {
        raw.scale = ((const float *)w.parts[1])[line.scales + k / 64];
    }
}

// Four of them, number 4 s and on, as two pairs of bf16: by the formulas of `weight_at`.
template <i32 FORM, i32 BITS> INLINE void four(u32 *low, u32 *high, const Raw<FORM, BITS> &raw, const Line &line, i32 s) {
    if constexpr (FORM == BF16) {
        *low = raw.words[2 * s] ^ raw.nothing, *high = raw.words[2 * s + 1] ^ raw.nothing;
        return;
    }
    float v[4];
    if constexpr (FORM == AFFINE && BITS == 8) {
        UNROLL for (i32 i = 0; i < 4; i++) v[i] = above_8388608(raw.words[s], i) - (8388608.0f + raw.zero);
    } else if constexpr (FORM == AFFINE) {
        u32 even = raw.words[s / 2] & 0x0f0f0f0fu, odd = (raw.words[s / 2] >> 4) & 0x0f0f0f0fu;
        UNROLL for (i32 i = 0; i < 4; i++) v[i] = above_8388608(i % 2 ? odd : even, s % 2 * 2 + i / 2) - (8388608.0f + raw.zero);
    } else if constexpr (FORM == WINT2) {
        float byte = above_8388608(raw.words[0], s) - 8388608.0f;
        u32 code = (u32)(i32)floor_(byte * line.slope + line.offset + 0.5f);
        UNROLL for (i32 i = 0; i < 4; i++) v[i] = as_float(((code >> (9 - 3 * i)) & 63u) | 0x4b000000u) - 8388640.0f;
    } else {
        UNROLL for (i32 i = 0; i < 4; i++) v[i] = nf4_level((i32)((raw.words[s / 2] >> (s % 2 * 16 + 4 * i)) & 15u));
    }
    *low = pair_bf16(v[0] * raw.scale, v[1] * raw.scale);
    *high = pair_bf16(v[2] * raw.scale, v[3] * raw.scale);
}

// Where this thread stands: of w its two rows and its first column of a slice, of x what it copies of a slice (each 32nd row, 16 bytes).
struct Stand {
    Line lines[2];
    i32 k;
    u32 share;
    const u16 *from;
    i64 step;
    u32 to;
    i32 rows;
};

// Starts copying a slice of x, `k` columns on.
template <i32 T> INLINE void copy_rows(u8 *to, const Stand &stand, i32 k) {
    const u16 *from = stand.from + k;
    UNROLL for (i32 i = 0; i < T / 32; i++) {
        bool inside = i < stand.rows;
        copy_16(to + stand.to + i * 4096, inside ? from : stand.from, inside ? 16 : 0);
        from += stand.step;
    }
}

// Slice t of the product: `now` holds its weights; those of the next are decoded into `next` from `there`, and those of the one after it
// begin to load into `coming`.
template <i32 FORM, i32 BITS, i32 T>
INLINE void slice(float *sums, u32 (*now)[4], u32 (*next)[4], Raw<FORM, BITS> *there, Raw<FORM, BITS> *coming, u8 *stages,
                  const Weight &w, const Stand &stand, i32 t, i32 padded) {
    wait_copies<1>(); // this slice of x is there
    show_copies();
    barrier(); // for all; and products of slices before the last are done with in both warpgroups
    u64 right = rows_at(stages + t % WIDE_STAGES * (T * 128));
    begin_products();
    UNROLL for (i32 s = 0; s < 4; s++) warpgroup_multiply<T>(sums, now[s], right + 2 * s);
    close_products();
    i32 ahead = (t + 2) * WIDE_SLICE;
    if (ahead < padded) copy_rows<T>(stages + (t + 2) % WIDE_STAGES * (T * 128), stand, ahead);
    close_copies();
    UNROLL for (i32 h = 0; h < 2; h++) load<FORM, BITS>(coming[h], w, stand.lines[h], ahead + stand.k, stand.share);
    wait_products<1>(); // the product before is done with `next`
    UNROLL for (i32 s = 0; s < 4; s++)
        UNROLL for (i32 h = 0; h < 2; h++) four<FORM, BITS>(&next[s][h], &next[s][2 + h], there[h], stand.lines[h], s);
}

template <i32 FORM, i32 BITS, i32 T> INLINE void warpgroup_gemm(float *y, const u16 *x, const Weight &w, i32 m, i32 padded) {
    u8 *stages = shared_bytes + (1024 - shared_address(shared_bytes) % 1024) % 1024;
    i32 lane = thread_x() % 32, column = block_x() * WIDE_COLUMNS + thread_x() / 32 * 16 + lane / 4, row = block_y() * T;
    Stand stand;
    UNROLL for (i32 h = 0; h < 2; h++) stand.lines[h] = line_of<FORM, BITS>(w, column + 8 * h);
    stand.k = lane % 4 * 16;
    stand.share = FORM == AFFINE ? share_of(w) : 0;
    i32 r = thread_x() / 8, chunk = thread_x() % 8, below = m - row - r;
    stand.from = x + (i64)(below > 0 ? row + r : 0) * padded + chunk * 8;
    stand.step = (i64)32 * padded;
    stand.to = (u32)(r * 128 + (chunk ^ (r % 8)) * 16);
    stand.rows = (below + 31) / 32; // copies below M; none where it is negative
    float sums[T / 2];
    UNROLL for (i32 i = 0; i < T / 2; i++) sums[i] = 0.0f;
    u32 first[4][4], second[4][4];
    Raw<FORM, BITS> even[2], odd[2];
    for (i32 t = 0; t < 2; t++) { // padded is two slices at least
        copy_rows<T>(stages + t * (T * 128), stand, t * WIDE_SLICE);
        close_copies();
    }
    UNROLL for (i32 h = 0; h < 2; h++) {
        load<FORM, BITS>(even[h], w, stand.lines[h], stand.k, stand.share);
        load<FORM, BITS>(odd[h], w, stand.lines[h], WIDE_SLICE + stand.k, stand.share);
    }
    UNROLL for (i32 s = 0; s < 4; s++)
        UNROLL for (i32 h = 0; h < 2; h++) four<FORM, BITS>(&first[s][h], &first[s][2 + h], even[h], stand.lines[h], s);
    KEEP_LOOP for (i32 t = 0; t < padded / WIDE_SLICE; t += 2) {
        slice<FORM, BITS, T>(sums, first, second, odd, even, stages, w, stand, t, padded);
        slice<FORM, BITS, T>(sums, second, first, even, odd, stages, w, stand, t + 1, padded);
    }
    wait_products<0>();
    settle<T / 2>(sums);
    UNROLL for (i32 j = 0; j < T / 8; j++)
        UNROLL for (i32 c = 0; c < 4; c++) {
            i32 token = row + 8 * j + lane % 4 * 2 + c % 2;
            if (token < m && stand.lines[c / 2].there) y[(i64)token * w.n + column + c / 2 * 8] = sums[4 * j + c];
        }
}

#define WARPGROUP_GEMM(NAME, FORM, BITS)                                                                                       \
    extern "C" __global__ void NAME##_128(float *y /* (M, N) */, const u16 *x /* (M, padded), turned */, Weight w, i32 m, i32 padded) { \
        warpgroup_gemm<FORM, BITS, 128>(y, x, w, m, padded);                                                                     \
    }                                                                                                                          \
    extern "C" __global__ void NAME##_256(float *y, const u16 *x, Weight w, i32 m, i32 padded) {                                 \
        warpgroup_gemm<FORM, BITS, 256>(y, x, w, m, padded);                                                                     \
    }
WARPGROUP_GEMM(wide_bf16, BF16, 0) // K a multiple of 16, groups of 16 or more
WARPGROUP_GEMM(wide_int8, AFFINE, 8)
WARPGROUP_GEMM(wide_int4, AFFINE, 4)
WARPGROUP_GEMM(wide_wint2, WINT2, 0)
WARPGROUP_GEMM(wide_nf4, NF4, 0)
