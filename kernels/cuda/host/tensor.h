// What tensor.cuh has, on the processor: `ldmatrix` and `mma.sync` by the layouts of the PTX manual, and copies that arrive, by a
// draw, at once or when they are waited for and no sooner, so a missing wait shows up as old bytes, and a place that is copied
// over too early as new ones.
//
// A product's sums are taken in f64 and rounded once: hardware rounds otherwise, in an order that is not told.
#pragma once
#include "shim.h"

inline constexpr size_t SHARED_BYTES = 228 << 10;
alignas(1024) inline unsigned char shared_bytes[SHARED_BYTES];
alignas(1024) inline unsigned char shared_seen[SHARED_BYTES]; // by products of warpgroups, see warpgroup.h

static inline float bf16_of(uint32_t pair, int which) { return std::bit_cast<float>((which ? pair >> 16 : pair & 0xffffu) << 16); }

// Row `row` of matrix `matrix` of those that a warp loads.
static inline const unsigned char *row_of(shim::Fiber *warp, int matrix, int row) {
    const unsigned char *from = (const unsigned char *)warp[8 * matrix + row].pointer;
    if ((uintptr_t)from % 16) shim::fail("rows of a matrix that are not aligned to 16 bytes");
    return from;
}
static inline void load_matrices(uint32_t *r, const void *row) {
    shim::fibers[shim::current].pointer = row;
    shim::together([](shim::Fiber *warp) {
        for (int t = 0; t < 32; t++)
            for (int matrix = 0; matrix < 4; matrix++) memcpy(&warp[t].out[matrix], row_of(warp, matrix, t / 4) + 4 * (t % 4), 4);
    });
    memcpy(r, shim::fibers[shim::current].out, 16);
}
static inline void load_transposed(uint32_t *r, const void *row) {
    shim::fibers[shim::current].pointer = row;
    shim::together([](shim::Fiber *warp) {
        for (int t = 0; t < 32; t++)
            for (int matrix = 0; matrix < 4; matrix++) {
                uint16_t two[2];
                for (int half = 0; half < 2; half++) memcpy(&two[half], row_of(warp, matrix, 2 * (t % 4) + half) + 2 * (t / 4), 2);
                memcpy(&warp[t].out[matrix], two, 4);
            }
    });
    memcpy(r, shim::fibers[shim::current].out, 16);
}

static inline float f16_of(uint32_t pair, int which) { return from_f16((uint16_t)(which ? pair >> 16 : pair & 0xffffu)); }

template <float number(uint32_t, int)> static inline void multiply_add_by(float *c, const uint32_t *a, const uint32_t *b) {
    shim::Fiber &fiber = shim::fibers[shim::current];
    memcpy(fiber.in, a, 16);
    memcpy(fiber.in + 4, b, 8);
    memcpy(fiber.in + 6, c, 16);
    shim::together([](shim::Fiber *warp) {
        float left[16][16], right[16][8]; // (row, k), (k, column)
        for (int t = 0; t < 32; t++)
            for (int half = 0; half < 2; half++) {
                int k = 2 * (t % 4) + half;
                left[t / 4][k] = number(warp[t].in[0], half);
                left[t / 4 + 8][k] = number(warp[t].in[1], half);
                left[t / 4][k + 8] = number(warp[t].in[2], half);
                left[t / 4 + 8][k + 8] = number(warp[t].in[3], half);
                right[k][t / 4] = number(warp[t].in[4], half);
                right[k + 8][t / 4] = number(warp[t].in[5], half);
            }
        for (int t = 0; t < 32; t++)
            for (int i = 0; i < 4; i++) {
                int row = t / 4 + i / 2 * 8, column = 2 * (t % 4) + i % 2;
                double sum = std::bit_cast<float>(warp[t].in[6 + i]);
                for (int k = 0; k < 16; k++) sum += (double)left[row][k] * right[k][column];
                warp[t].out[i] = std::bit_cast<uint32_t>((float)sum);
            }
    });
    memcpy(c, shim::fibers[shim::current].out, 16);
}
static inline void multiply_add(float *c, const uint32_t *a, const uint32_t *b) { multiply_add_by<bf16_of>(c, a, b); }
static inline void multiply_add_f16(float *c, const uint32_t *a, const uint32_t *b) { multiply_add_by<f16_of>(c, a, b); }

static inline void copy_later(void *to, const void *from, int size, int bytes) {
    if ((uintptr_t)to % size || (uintptr_t)from % size) shim::fail("a copy that is not aligned to its size");
    if (bytes < 0 || bytes > size) shim::fail("a copy of more than its size");
    if (shim::draw(4)) return shim::fibers[shim::current].open.push_back({to, from, size, bytes});
    memset(to, 0, size);
    memcpy(to, from, bytes);
    memcpy(shared_seen + ((unsigned char *)to - shared_bytes), to, size);
}
static inline void copy_16(void *to, const void *from, int bytes) { copy_later(to, from, 16, bytes); }
static inline void copy_8(void *to, const void *from, int bytes) { copy_later(to, from, 8, bytes); }
static inline void close_copies() {
    shim::Fiber &fiber = shim::fibers[shim::current];
    fiber.closed.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int N> static inline void wait_copies() {
    shim::Fiber &fiber = shim::fibers[shim::current];
    while (fiber.closed.size() > N) {
        for (const shim::Copy &copy : fiber.closed.front()) {
            memset(copy.to, 0, copy.size);
            memcpy(copy.to, copy.from, copy.bytes);
            fiber.written.push_back(copy);
        }
        fiber.closed.pop_front();
    }
}
static inline uint32_t pair_bf16(float low, float high) {
    auto round = [](float x) -> uint32_t {
        uint32_t bits = std::bit_cast<uint32_t>(x);
        return x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}
static inline uint32_t pair_f16(float low, float high) { return to_f16(low) | (uint32_t)to_f16(high) << 16; }
// In f64, which holds a sum or product of two halves as it is, and rounded once.
static inline uint32_t half_of(double x) {
    _Float16 half = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static inline uint32_t add_halves(uint32_t a, uint32_t b) {
    return half_of((double)f16_of(a, 0) + f16_of(b, 0)) | half_of((double)f16_of(a, 1) + f16_of(b, 1)) << 16;
}
static inline uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    return half_of((double)f16_of(a, 0) * f16_of(b, 0) + f16_of(c, 0)) | half_of((double)f16_of(a, 1) * f16_of(b, 1) + f16_of(c, 1)) << 16;
}
template <uint32_t MASK> static inline uint32_t above_1024(uint32_t x) { return (x & (MASK * 0x00010001u)) | 0x64006400u; }
