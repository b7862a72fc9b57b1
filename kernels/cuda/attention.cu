// softmax(scale q k^T) v in f32, a block for a tile of rows and a key head, keys in chunks.
//
//   m' = max(m, scores of the chunk);  l' = l e^(m - m') + sum e^(s - m');  a' = a e^(m - m') + sum e^(s - m') v
//   y  = a / l            (online softmax, Milakov and Gimelshein 2018; tiles as in FlashAttention, Dao et al. 2022)
//
// A row is a query with one of the query heads that read this key head: row r of a segment is query r / group, head r % group.
// So a tile of few queries is full where heads are grouped, and keys are read once for all of them. It sees first the rows of
// a shared prefix, then those of its own sequence, and no chunk that none of its rows sees is read.
//
// 128 threads, 8 x 16: a thread (ty, tx) has rows ty + 8 i, keys tx + 16 j of a chunk, and every 16th run of columns of the
// result. K is copied (`cp.async`) while the chunk before is multiplied by its V, V while scores are computed. A score is the
// fused sum over rising columns, a result the one over rising keys: neither depends on the other rows of a tile, nor on its height.
#include "tensor.cuh"

// Mirrors `Tile` in attention.rs, field by field. Rows of q, of keys and of values.
struct AttentionTile {
    i32 query, queries;      // of the segment: first, count
    i32 prefix, prefix_rows; // what all of them see
    i32 own, own_rows;       // of which causal query i sees the first own_rows - queries + 1 + i
    i32 first;               // row of the segment that is the tile's first
    i32 padding;
};

// e^x for x <= 0, by the series of `exp_`; 0 below e^-87.
INLINE float exp_below(float x) {
    float t = fused(x, 1.44269504f, 12582912.0f); // 1.5 * 2^23: the nearest integer in the lowest bits
    float n = t - 12582912.0f;
    float r = fused(n, -0.693145752f, x);
    r = fused(n, -1.42860677e-6f, r);
    float p = 1.984127e-4f;
    p = fused(p, r, 1.3888889e-3f);
    p = fused(p, r, 8.3333333e-3f);
    p = fused(p, r, 4.1666668e-2f);
    p = fused(p, r, 1.6666667e-1f);
    p = fused(p, r, 0.5f);
    p = fused(p, r, 1.0f);
    p = fused(p, r, 1.0f);
    p *= as_float((bits_of(t) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : p;
}

// Starts copying rows `from`..., `count` of them, of what a tile sees into rows of `pitch`; columns from d on become zeros.
template <i32 WIDTH, i32 KEYS>
INLINE void copy_rows(float *to, i32 pitch, const float *x, const AttentionTile &tile, i32 from, i32 count, i32 width, i32 d) {
    UNROLL_4 for (i32 t = 0; t < KEYS * (WIDTH / 4) / 128; t++) { // whole, for every width there is
        i32 i = t * 128 + thread_x(), r = i / (WIDTH / 4), column = i % (WIDTH / 4) * 4, p = from + r;
        if (r >= count) continue;
        i64 row = p < tile.prefix_rows ? tile.prefix + p : tile.own + (p - tile.prefix_rows);
        copy_16(to + r * pitch + column, x + row * width + (column < d ? column : 0), column < d ? 16 : 0);
    }
}

// s = q k^T over `d` columns, a multiple of 8: rows `q` + 8 i, keys `k` + 16 j for j below COUNT.
template <i32 PITCH, i32 ROWS, i32 ALL, i32 COUNT>
INLINE void multiply_keys(float (&s)[ROWS][ALL], const float *q, const float *k, i32 d) {
    KEEP_LOOP for (i32 c = 0; c < d; c += 8) {
        UNROLL for (i32 h = 0; h < 8; h += 4) {
            Four key[COUNT];
            UNROLL for (i32 j = 0; j < COUNT; j++) key[j] = *(const Four *)(k + 16 * j * PITCH + c + h);
            UNROLL for (i32 i = 0; i < ROWS; i++) {
                Four query = *(const Four *)(q + 8 * i * PITCH + c + h);
                UNROLL for (i32 e = 0; e < 4; e++)
                    UNROLL for (i32 j = 0; j < COUNT; j++) s[i][j] = fused(query[e], key[j][e], s[i][j]);
            }
        }
    }
}

// sums += the share of each row times this thread's columns of one row of V.
template <i32 WIDTH, i32 ROWS> INLINE void add_value(float (&sums)[ROWS][WIDTH / 16], const float *shares, const float *value, i32 tx) {
    const i32 WHOLE = WIDTH / 64, C = WIDTH / 16;
    float v[C], p[ROWS];
    UNROLL for (i32 c = 0; c < WHOLE; c++) {
        Four four = *(const Four *)(value + 64 * c + 4 * tx);
        UNROLL for (i32 e = 0; e < 4; e++) v[4 * c + e] = four[e];
    }
    if constexpr (WIDTH % 64 != 0) {
        Two two = *(const Two *)(value + 64 * WHOLE + 2 * tx);
        v[4 * WHOLE] = two[0], v[4 * WHOLE + 1] = two[1];
    }
    if constexpr (ROWS % 4 == 0) {
        UNROLL for (i32 i = 0; i < ROWS; i += 4) {
            Four four = *(const Four *)(shares + i);
            UNROLL for (i32 e = 0; e < 4; e++) p[i + e] = four[e];
        }
    } else {
        UNROLL for (i32 i = 0; i < ROWS; i++) p[i] = shares[i];
    }
    UNROLL for (i32 i = 0; i < ROWS; i++)
        UNROLL for (i32 c = 0; c < C; c++) sums[i][c] = fused(p[i], v[c], sums[i][c]);
}

// `WIDTH`: columns of a head there is room for, a multiple of 32; `ROWS` of a thread, an eighth of a tile's; `KEYS` of a chunk.
template <i32 WIDTH, i32 ROWS, i32 KEYS>
INLINE void attend(float *y, const float *q, const float *keys, const float *values, const AttentionTile *tiles, i32 heads, i32 kv,
                   i32 d, float scale, i32 causal) {
    const i32 TALL = 8 * ROWS, PITCH = WIDTH + 4, TURNED = TALL + 4, J = KEYS / 16, WHOLE = WIDTH / 64, C = WIDTH / 16;
    float *query = (float *)shared_bytes, *key = query + TALL * PITCH, *value = key + KEYS * PITCH;
    float *shares = value + KEYS * WIDTH;                // (32 keys, rows)
    i32 *places = (i32 *)(shares + 32 * TURNED), *seen = places + TALL; // of each row: where it lies in q and y, keys it sees
    AttentionTile tile = tiles[block_x() / kv];
    i32 head = block_x() % kv, group = heads / kv, width = kv * d, ty = thread_x() / 16, tx = thread_x() % 16;
    // How many keys the query of row r sees.
    auto visible = [&](i32 r) {
        i32 own = causal ? tile.own_rows - tile.queries + 1 + r / group : tile.own_rows;
        return tile.prefix_rows + (own > 0 ? own : 0);
    };
    i32 rows = tile.queries * group, last = (rows < tile.first + TALL ? rows : tile.first + TALL) - 1;
    i32 most = visible(last), columns = (d + 7) / 8 * 8;
    for (i32 i = thread_x(); i < TALL; i += 128) {
        i32 r = tile.first + i;
        places[i] = r < rows ? (tile.query + r / group) * heads + head * group + r % group : -1;
        seen[i] = r < rows ? visible(r) : 0;
    }
    barrier();
    UNROLL_4 for (i32 t = 0; t < (TALL * (WIDTH / 4) + 127) / 128; t++) {
        i32 i = t * 128 + thread_x(), r = i / (WIDTH / 4), column = i % (WIDTH / 4) * 4;
        if (r >= TALL) continue;
        bool inside = places[r] >= 0 && column < d;
        copy_16(query + r * PITCH + column, q + (inside ? (i64)places[r] * d + column : 0), inside ? 16 : 0);
    }
    keys += (i64)head * d, values += (i64)head * d;
    copy_rows<WIDTH, KEYS>(key, PITCH, keys, tile, 0, most < KEYS ? most : KEYS, width, d);
    close_copies();
    float sums[ROWS][C], top[ROWS], total[ROWS];
    UNROLL for (i32 i = 0; i < ROWS; i++) {
        top[i] = -3.4e38f, total[i] = 0.0f;
        UNROLL for (i32 c = 0; c < C; c++) sums[i][c] = 0.0f;
    }
    for (i32 from = 0; from < most; from += KEYS) {
        i32 count = most - from < KEYS ? most - from : KEYS;
        wait_copies<0>();
        barrier(); // K is there for all, and V of the chunk before is done with
        copy_rows<WIDTH, KEYS>(value, WIDTH, values, tile, from, count, width, d);
        close_copies();
        float s[ROWS][J];
        UNROLL for (i32 i = 0; i < ROWS; i++)
            UNROLL for (i32 j = 0; j < J; j++) s[i][j] = 0.0f;
        if (count > KEYS / 2) multiply_keys<PITCH, ROWS, J, J>(s, query + ty * PITCH, key + tx * PITCH, columns);
        else multiply_keys<PITCH, ROWS, J, J / 2>(s, query + ty * PITCH, key + tx * PITCH, columns);
        UNROLL for (i32 i = 0; i < ROWS; i++) {
            i32 here = seen[ty + 8 * i] - from; // keys from here on are not for this row, whatever was computed of them
            float higher = -3.4e38f;
            UNROLL for (i32 j = 0; j < J; j++) {
                s[i][j] *= scale;
                if (tx + 16 * j < here) higher = max_(higher, s[i][j]);
            }
            UNROLL for (i32 lane = 8; lane > 0; lane >>= 1) higher = max_(higher, shuffle_xor(higher, lane));
            higher = max_(top[i], higher);
            float keep = exp_below(top[i] - higher), sum = 0.0f;
            UNROLL for (i32 j = 0; j < J; j++) {
                s[i][j] = tx + 16 * j < here ? exp_below(s[i][j] - higher) : 0.0f;
                sum += s[i][j];
            }
            top[i] = higher;
            total[i] = total[i] * keep + sum; // of this thread's keys
            UNROLL for (i32 c = 0; c < C; c++) sums[i][c] *= keep;
        }
        wait_copies<0>();
        barrier(); // V is there for all, and K is done with
        if (from + KEYS < most) {
            i32 next = most - from - KEYS;
            copy_rows<WIDTH, KEYS>(key, PITCH, keys, tile, from + KEYS, next < KEYS ? next : KEYS, width, d);
        }
        close_copies();
        UNROLL for (i32 part = 0; part < KEYS / 32; part++) {
            i32 many = count - part * 32 < 32 ? count - part * 32 : 32, k = 0;
            warp_barrier(); // shares of a row are written and read by one warp; it is done with those before
            UNROLL for (i32 j = 0; j < 2; j++) {
                float *to = shares + (tx + 16 * j) * TURNED + ty * ROWS;
                i32 at = part * 2 + j;
                if constexpr (ROWS % 4 == 0) {
                    UNROLL for (i32 i = 0; i < ROWS; i += 4) *(Four *)(to + i) = Four{s[i][at], s[i + 1][at], s[i + 2][at], s[i + 3][at]};
                } else {
                    UNROLL for (i32 i = 0; i < ROWS; i++) to[i] = s[i][at];
                }
            }
            warp_barrier();
            const float *p = shares + ty * ROWS, *v = value + part * 32 * WIDTH;
            KEEP_LOOP for (; k + 4 <= many; k += 4)
                UNROLL for (i32 e = 0; e < 4; e++) add_value<WIDTH, ROWS>(sums, p + (k + e) * TURNED, v + (k + e) * WIDTH, tx);
            KEEP_LOOP for (; k < many; k++) add_value<WIDTH, ROWS>(sums, p + k * TURNED, v + k * WIDTH, tx);
        }
    }
    UNROLL for (i32 i = 0; i < ROWS; i++) {
        i32 place = places[ty + 8 * i];
        float all = total[i];
        UNROLL for (i32 lane = 8; lane > 0; lane >>= 1) all += shuffle_xor(all, lane);
        float share = seen[ty + 8 * i] > 0 ? 1.0f / all : 0.0f;
        if (place < 0) continue;
        float *to = y + (i64)place * d;
        UNROLL for (i32 c = 0; c < WHOLE; c++) {
            i32 column = 64 * c + 4 * tx;
            Four four = {sums[i][4 * c] * share, sums[i][4 * c + 1] * share, sums[i][4 * c + 2] * share, sums[i][4 * c + 3] * share};
            if (column < d) *(Four *)(to + column) = four;
        }
        if constexpr (WIDTH % 64 != 0) {
            i32 column = 64 * WHOLE + 2 * tx;
            if (column < d) *(Two *)(to + column) = Two{sums[i][4 * WHOLE] * share, sums[i][4 * WHOLE + 1] * share};
        }
    }
}

#define ATTENTION(name, WIDTH, ROWS, KEYS)                                                                                            \
    extern "C" __global__ void name(float *y /* (M, heads * D) */, const float *q /* (M, heads * D) */,                               \
                                    const float *keys /* (rows, kv * D) */, const float *values /* (rows, kv * D) */,                 \
                                    const AttentionTile *tiles /* a block each and key head */, i32 heads, i32 kv,                    \
                                    i32 d /* a multiple of 4 */, float scale, i32 causal) {                                           \
        attend<WIDTH, ROWS, KEYS>(y, q, keys, values, tiles, heads, kv, d, scale, causal);                                            \
    }
ATTENTION(attention_64, 64, 8, 64)
ATTENTION(attention_96, 96, 8, 64)
ATTENTION(attention_128, 128, 8, 64)
ATTENTION(attention_256, 256, 4, 32)
// For segments of few rows.
// Where a block has 99 KiB of shared memory and no more.
ATTENTION(attention_less_128, 128, 4, 64)
ATTENTION(attention_less_256, 256, 2, 32)
ATTENTION(attention_few_64, 64, 1, 64)
ATTENTION(attention_few_96, 96, 1, 64)
ATTENTION(attention_few_128, 128, 1, 64)
ATTENTION(attention_few_256, 256, 1, 32)
