// y (M, N) = x (M, K) times the transpose of w (N, K) for 1 to 16 rows, each packed byte of w read once, 16 bytes at a
// time.
//
//   y[m][n] = sum over groups g of scale(n, g) * sum over k in 8 columns of x[m][k] * (code(n, k) - zero(n, g))
//
// A warp computes two output columns (rows of w), a block of 256 threads sixteen. Columns come in tiles of 32 lanes times what
// 16 bytes hold; x is laid into shared memory so that lane l finds its four numbers beside those of lane l + 1, and the next
// tile of w is under way meanwhile. Bytes become numbers as the low bits of 2^23 + byte. Sums are f32, fused, by lanes and then
// a fixed tree.
#include "tensor.cuh"
#include "weight.cuh"

enum { GEMV_ROWS = 2, GEMV_WARPS = 8 };

struct alignas(16) Pack { u32 words[4]; };
struct alignas(8) HalfPack { u32 words[2]; };

// Bytes that a lane takes at a time (half of the usual where x would not fit into shared memory), and columns that they hold.
INLINE constexpr i32 bytes_of(i32 form, i32 batch) { return form == WINT2 && batch == 16 ? 8 : 16; }
INLINE constexpr i32 columns_of(i32 form, i32 bits, i32 batch) {
    return bytes_of(form, batch) * 8 / (form == AFFINE ? bits : form == WINT2 ? 2 : form == NF4 ? 4 : 16);
}
template <i32 BYTES> INLINE void take(Pack *pack, const u8 *from) {
    if constexpr (BYTES == 16) {
        *pack = *(const Pack *)from;
    } else {
        HalfPack half = *(const HalfPack *)from;
        pack->words[0] = half.words[0], pack->words[1] = half.words[1];
    }
}
// Where in a tile's row of x the numbers 4 piece ... of lane `lane` lie: the four of neighbours side by side, and turned so that
// a warp that writes whole runs meets no bank twice.
INLINE i32 spot(i32 lane, i32 piece) { return (piece * 32 + (lane + piece) % 32) * 4; }

// The numbers of the first eight columns of a pack, less their zero, unscaled.
template <i32 FORM, i32 BITS> INLINE void eight(float *v, const Pack &pack, float zero, const u32 *table) {
    if constexpr (FORM == BF16) {
        UNROLL for (i32 i = 0; i < 4; i++) {
            v[2 * i] = as_float(pack.words[i] << 16);
            v[2 * i + 1] = as_float(pack.words[i] & 0xffff0000u);
        }
    } else if constexpr (FORM == WINT2) {
        UNROLL for (i32 b = 0; b < 2; b++) {
            u32 windows = table[(pack.words[0] >> (8 * b)) & 255u];
            UNROLL for (i32 i = 0; i < 4; i++) v[4 * b + i] = above_8388608(windows, i) - 8388640.0f;
        }
    } else if constexpr (FORM == NF4) {
        UNROLL for (i32 i = 0; i < 8; i++) v[i] = as_float(table[(pack.words[0] >> (4 * i)) & 15u]);
    } else if constexpr (BITS == 8) {
        UNROLL for (i32 i = 0; i < 8; i++) v[i] = above_8388608(pack.words[i / 4], i % 4) - (8388608.0f + zero);
    } else {
        u32 even = pack.words[0] & 0x0f0f0f0fu, odd = (pack.words[0] >> 4) & 0x0f0f0f0fu;
        UNROLL for (i32 i = 0; i < 4; i++) {
            v[2 * i] = above_8388608(even, i) - (8388608.0f + zero);
            v[2 * i + 1] = above_8388608(odd, i) - (8388608.0f + zero);
        }
    }
}

// Brings the next eight columns to the front; `s` eights were there before.
template <i32 FORM, i32 BITS> INLINE void advance(Pack *pack, i32 s) {
    if (FORM == WINT2 && s % 2 == 0) {
        pack->words[0] >>= 16;
    } else {
        const i32 by = FORM == AFFINE && BITS == 8 ? 2 : 1;
        UNROLL for (i32 i = 0; i + by < 4; i++) pack->words[i] = pack->words[i + by];
    }
}

// What multiplies columns from `k` on in row n, and their zero.
template <i32 FORM, i32 BITS> INLINE float scale_of(const Weight &w, i32 n, i32 k, float *zero) {
    *zero = 0.0f;
    if constexpr (FORM == BF16) return 1.0f;
    if constexpr (FORM == NF4) return ((const float *)w.parts[1])[(i64)n * (w.k / 64) + k / 64];
    if constexpr (FORM == WINT2) {
        u8 both = w.parts[1][(i64)n * ((w.k / 64 + 1) / 2) + k / 128];
        i32 local = (k / 64) % 2 == 0 ? both >> 4 : both & 15;
        return (float)local * from_bf16(((const u16 *)w.parts[2])[n]);
    }
    if constexpr (FORM == AFFINE) {
        i32 groups = w.k / w.group, g = k / w.group;
        *zero = (float)(w.zero >= 0 ? w.zero : code_at(w.parts[2] + (i64)n * ((groups * BITS + 7) / 8), g, BITS));
        return float_at(w.parts[1], w.scale, (i64)n * groups + g);
    }
    return 1.0f;
}

template <i32 FORM, i32 BITS, i32 BATCH> INLINE void gemv_packed(float *y, const float *x, const Weight &w, i32 m) {
    const i32 bytes = bytes_of(FORM, BATCH), own = columns_of(FORM, BITS, BATCH), tile = 32 * own;
    float *staged = (float *)shared_bytes;               // (BATCH, tile)
    u32 *tables = (u32 *)(staged + BATCH * tile);         // WINT2: (warps, rows, 256); NF4: (16)
    i32 warp = thread_x() / 32, lane = thread_x() % 32, first = (block_x() * GEMV_WARPS + warp) * GEMV_ROWS;
    const i64 pitch = (i64)(w.k / own) * bytes;
    const u32 *table[GEMV_ROWS];
    UNROLL for (i32 r = 0; r < GEMV_ROWS; r++) {
        table[r] = tables;
        if constexpr (FORM == WINT2) {
            u32 *mine = tables + (warp * GEMV_ROWS + r) * 256;
            i32 n = first + r < w.n ? first + r : w.n - 1;
            float slope = ((const float *)w.parts[3])[n], offset = ((const float *)w.parts[4])[n];
            for (i32 byte = lane; byte < 256; byte += 32) {
                i32 code = (i32)floor_((float)byte * slope + offset + 0.5f);
                mine[byte] = (u32)((code >> 9) & 63) | (u32)((code >> 6) & 63) << 8 | (u32)((code >> 3) & 63) << 16 | (u32)(code & 63) << 24;
            }
            table[r] = mine;
        }
    }
    if (FORM == NF4 && thread_x() < 16) tables[thread_x()] = bits_of(nf4_level(thread_x()));
    float sums[GEMV_ROWS][BATCH];
    UNROLL for (i32 r = 0; r < GEMV_ROWS; r++)
        UNROLL for (i32 b = 0; b < BATCH; b++) sums[r][b] = 0.0f;
    Pack pack[GEMV_ROWS], next[GEMV_ROWS];
    UNROLL for (i32 r = 0; r < GEMV_ROWS; r++)
        UNROLL for (i32 i = 0; i < 4; i++) pack[r].words[i] = next[r].words[i] = 0;
    UNROLL for (i32 r = 0; r < GEMV_ROWS; r++)
        if (first + r < w.n && lane * own < w.k) take<bytes>(&next[r], w.parts[0] + (first + r) * pitch + lane * bytes);
    for (i32 from = 0; from < w.k; from += tile) {
        barrier(); // the tile before is done with
        for (i32 i = thread_x(); i < BATCH * tile; i += 256) {
            i32 b = i / tile, c = i % tile;
            bool inside = b < m && from + c < w.k;
            staged[b * tile + spot(c / own, c % own / 4) + c % 4] = inside ? x[(i64)b * w.k + from + c] : 0.0f;
        }
        UNROLL for (i32 r = 0; r < GEMV_ROWS; r++) {
            pack[r] = next[r];
            i32 k = from + tile + lane * own;
            if (first + r < w.n && k < w.k) take<bytes>(&next[r], w.parts[0] + (first + r) * pitch + (i64)(k / own) * bytes);
        }
        barrier();
        i32 k = from + lane * own;
        if (k >= w.k) continue; // lanes past the end; they meet the others at the barrier
        float scale[GEMV_ROWS], zero[GEMV_ROWS];
        KEEP_LOOP for (i32 s = 0; s < own / 8; s++) {
            float v[GEMV_ROWS][8];
            UNROLL for (i32 r = 0; r < GEMV_ROWS; r++) {
                i32 n = first + r < w.n ? first + r : w.n - 1;
                if (s == 0 || (FORM == AFFINE && s * 8 % w.group == 0)) scale[r] = scale_of<FORM, BITS>(w, n, k + 8 * s, &zero[r]);
                eight<FORM, BITS>(v[r], pack[r], zero[r], table[r]);
                advance<FORM, BITS>(&pack[r], s);
            }
            UNROLL for (i32 b = 0; b < BATCH; b++) {
                float a[8];
                UNROLL for (i32 i = 0; i < 8; i++) a[i] = staged[b * tile + spot(lane, 2 * s + i / 4) + i % 4];
                UNROLL for (i32 r = 0; r < GEMV_ROWS; r++) {
                    float part = a[0] * v[r][0];
                    UNROLL for (i32 i = 1; i < 8; i++) part = fma_(a[i], v[r][i], part);
                    sums[r][b] = fma_(part, scale[r], sums[r][b]);
                }
            }
        }
    }
    UNROLL for (i32 r = 0; r < GEMV_ROWS; r++)
        UNROLL for (i32 b = 0; b < BATCH; b++) {
            float sum = warp_sum(sums[r][b]);
            if (lane == 0 && b < m && first + r < w.n) y[(i64)b * w.n + first + r] = sum;
        }
}

#define GEMV(NAME, FORM, BITS)                                                                                                 \
    extern "C" __global__ void NAME##_1(float *y /* (M, N) */, const float *x /* (M, K) */, Weight w, i32 m) {                    \
        gemv_packed<FORM, BITS, 1>(y, x, w, m);                                                                                \
    }                                                                                                                          \
    extern "C" __global__ void NAME##_4(float *y, const float *x, Weight w, i32 m) { gemv_packed<FORM, BITS, 4>(y, x, w, m); }    \
    extern "C" __global__ void NAME##_16(float *y, const float *x, Weight w, i32 m) { gemv_packed<FORM, BITS, 16>(y, x, w, m); }
GEMV(gemv_bf16, BF16, 0)   // K a multiple of 8
GEMV(gemv_int8, AFFINE, 8) // of 16
GEMV(gemv_int4, AFFINE, 4) // of 32
GEMV(gemv_wint2, WINT2, 0)
GEMV(gemv_nf4, NF4, 0)
