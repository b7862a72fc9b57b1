// A row of the WINT2 encoder at work, and the search of its codes: for each vector of four weights the byte with the largest
// score (see encode_wint2.cu), for each group the gain of its sixteen vectors. 16 threads a group, a thread for a vector.
#include "weight.cuh"

struct alignas(8) Word { u32 windows; i32 bias; }; // four signed bytes; -32 c.c

// A row at work, in global memory that its block owns.
struct Row {
    float *x;      // (G, 4, 16): scaled weights of the visited groups, component by component
    float *w;      // as x: how much each counts, where they do not count the same
    float *wx;     // as x: their product
    float *energy; // (G)
    float *scale;  // (G): the best real-valued one, zero for a group of zeros
    float *gain;   // (G)
    float *cross;  // (G): sums of least squares
    float *square; // (G)
    float *cells;  // gains of pairs and groups
    u8 *bytes;     // four encodings, each its codes (G, 16) and its local scales (G)
    i32 groups;
};
enum { NOW = 0, AGREEING = 1, FREE = 2, BEST = 3 };
INLINE u8 *codes_of(const Row &row, i32 which) { return row.bytes + which * 17 * row.groups; }
INLINE u8 *locals_of(const Row &row, i32 which) { return row.bytes + (which * 17 + 16) * row.groups; }

INLINE i32 lane16() { return thread_x() % 16; }
// Whether any thread of the warp says so.
INLINE bool any(bool mine) {
    u32 said = mine;
    for (i32 lane = 16; lane > 0; lane >>= 1) said |= shuffle_xor(said, lane);
    return said != 0;
}
// Sum of 16 lanes in a tree, the same in each.
INLINE float tree_sum(float v) {
    for (i32 lane = 8; lane > 0; lane >>= 1) v += shuffle_xor(v, lane);
    return v;
}
// Sum of 16 lanes one after the other.
INLINE float lane_sum(float v) {
    float sum = 0.0f;
    for (i32 i = 0; i < 16; i++) sum += shuffle_from(v, thread_x() / 16 * 16 % 32 + i);
    return sum;
}

// A vector in integers, and the best score so far; all weights counting the same, or each as much as it does.
struct Even {
    u32 first, second;
    i32 best;
};
struct Counted {
    i32 y[4], w[4], best;
    float a;
};
template <bool WEIGHTED> struct Searched { typedef Even Vector; };
template <> struct Searched<true> { typedef Counted Vector; };

INLINE void read(Even &v, const Row &row, i32 group, float inverse) {
    inverse *= 64.0f;
    i32 part[4];
    UNROLL for (i32 i = 0; i < 4; i++)
        part[i] = (i32)round_even(min_(max_(row.x[64 * group + 16 * i + lane16()] * inverse, -31000.0f), 31000.0f));
    v.first = ((u32)part[0] & 0xffffu) | (u32)part[1] << 16;
    v.second = ((u32)part[2] & 0xffffu) | (u32)part[3] << 16;
}
INLINE void read(Counted &v, const Row &row, i32 group, float inverse) {
    float counts[4], products[4], most_w = 1e-30f, most_y = 1e-30f;
    UNROLL for (i32 i = 0; i < 4; i++) {
        counts[i] = row.w[64 * group + 16 * i + lane16()];
        products[i] = row.wx[64 * group + 16 * i + lane16()] * inverse;
        most_w = max_(most_w, counts[i]);
        most_y = max_(most_y, products[i] < 0.0f ? -products[i] : products[i]);
    }
    v.a = min_(511.0f / most_w, 24575.0f / most_y);
    UNROLL for (i32 i = 0; i < 4; i++) {
        v.y[i] = 2 * (i32)round_even(products[i] * v.a);
        v.w[i] = (i32)round_even(counts[i] * v.a);
    }
}
// A 256th of the score without the byte.
INLINE i32 score_of(const Even &v, Word word) { return dot_high(v.second, word.windows, dot_low(v.first, word.windows, word.bias)) * 2; }
INLINE i32 score_of(const Counted &v, Word word) {
    i32 sum = 0;
    UNROLL for (i32 i = 0; i < 4; i++) {
        i32 c = (i32)(signed char)(word.windows >> (8 * i));
        sum += c * (v.y[i] - c * v.w[i]);
    }
    return sum;
}
INLINE float gain_of(const Even &v) { return (float)(v.best >> 8) * 0.015625f; }
INLINE float gain_of(const Counted &v) { return (float)(v.best >> 8) / v.a; }

// Searches COUNT groups, or one at COUNT scales, for the 16 threads of each: this thread's vector's code, and the gain of the
// whole group. All threads of the warp must be here.
template <bool WEIGHTED, i32 COUNT>
INLINE void search(const Row &row, const Word *book, const i32 *group, const float *scale, i32 *codes, float *gains) {
    typename Searched<WEIGHTED>::Vector vectors[COUNT];
    UNROLL for (i32 j = 0; j < COUNT; j++) {
        read(vectors[j], row, group[j], scale[j] > 0.0f ? 1.0f / scale[j] : 0.0f);
        vectors[j].best = -2147483647 - 1;
    }
    for (i32 byte = 0; byte < 256; byte++) {
        u64 both; // in one load
        __builtin_memcpy(&both, book + byte, 8);
        Word word = {(u32)both, (i32)(both >> 32)};
        UNROLL for (i32 j = 0; j < COUNT; j++) {
            i32 score = score_of(vectors[j], word) * 256 + (255 - byte);
            vectors[j].best = vectors[j].best > score ? vectors[j].best : score;
        }
    }
    UNROLL for (i32 j = 0; j < COUNT; j++) {
        codes[j] = 255 - (vectors[j].best & 255);
        gains[j] = tree_sum(gain_of(vectors[j])) * (scale[j] * scale[j]);
    }
}
