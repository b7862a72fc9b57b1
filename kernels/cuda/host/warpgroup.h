// What warpgroup.cuh has, on the processor: products of 128 threads by the layouts of the PTX manual (wgmma).
//
// A product runs, by a draw, when its group is closed or when somebody waits for it, and takes its factors and sums from where they
// lie by then: registers that are written, or shared memory that is copied over, before the wait give wrong numbers. Products see
// shared memory as `show_copies` left it, not as it is: a copy that was not shown is not there, unless it was early (tensor.h).
#pragma once
#include "tensor.h"

static inline uint32_t shared_address(const void *p) { return (uint32_t)((const unsigned char *)p - shared_bytes); }
static inline uint64_t rows_at(const unsigned char *first) {
    return (uint64_t)(shared_address(first) & 0x3ffffu) >> 4 | 1ull << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}
static inline void begin_products() { shim::fibers[shim::current].products_begun = true; }
static inline void show_copies() {
    shim::Fiber &fiber = shim::fibers[shim::current];
    for (const shim::Copy &copy : fiber.written) {
        long at = (unsigned char *)copy.to - shared_bytes;
        memcpy(shared_seen + at, copy.to, copy.size);
    }
    fiber.written.clear();
}

namespace shim {
// Element k of row r of a factor in shared memory: rows of 128 bytes in eights, whose distance is told, and bits 4 to 6 of an address turned by
// bits 7 to 9.
inline float factor_at(uint64_t where, int r, int k) {
    if (where >> 62 != 1) fail("a factor that does not lie in 128-byte swizzle");
    uint32_t at = (uint32_t)(where & 0x3fffu) * 16 + r / 8 * ((uint32_t)(where >> 32) & 0x3fffu) * 16 + r % 8 * 128 + 2 * k;
    at ^= (at >> 7 & 7) << 4;
    if (at + 2 > SHARED_BYTES) fail("a factor outside shared memory");
    uint16_t bits;
    memcpy(&bits, shared_seen + at, 2);
    return std::bit_cast<float>((uint32_t)bits << 16);
}
inline void multiply(const std::vector<Product> &each) {
    std::vector<float> left(64 * 16), right((size_t)each[0].columns * 16);
    for (int i = 0; !each[0].a && i < 64 * 16; i++) left[i] = factor_at(each[0].left, i / 16, i % 16);
    for (int t = 0; each[0].a && t < 128; t++)
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                left[(t / 32 * 16 + t % 32 / 4 + i % 2 * 8) * 16 + i / 2 * 8 + 2 * (t % 4) + half] = bf16_of(each[t].a[i], half);
    for (int r = 0; r < each[0].columns; r++)
        for (int k = 0; k < 16; k++) right[(size_t)r * 16 + k] = factor_at(each[0].right, r, k);
    for (int t = 0; t < 128; t++)
        for (int i = 0; i < each[0].columns / 2; i++) {
            int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * (t % 4) + i % 2;
            double sum = each[t].c[i];
            for (int k = 0; k < 16; k++) sum += (double)left[row * 16 + k] * right[column * 16 + k];
            each[t].c[i] = (float)sum;
        }
}
// Lets all but the last `most` closed groups of a warpgroup run.
inline void run_products(Fiber *group, size_t most) {
    while (group->products_closed.size() > most) {
        size_t count = group->products_closed.front().size();
        for (size_t i = 0; i < count; i++) {
            std::vector<Product> each;
            for (int t = 0; t < 128; t++) {
                const auto &mine = group[t].products_closed.front();
                const auto &first = group->products_closed.front();
                if (mine.size() != count || mine[i].right != first[i].right || mine[i].left != first[i].left)
                    fail("threads of a warpgroup that multiply different things");
                each.push_back(mine[i]);
            }
            multiply(each);
        }
        for (int t = 0; t < 128; t++) group[t].products_closed.pop_front();
    }
}
} // namespace shim

template <int T> static inline void warpgroup_multiply(float *c, const uint32_t *a, uint64_t right) {
    shim::Fiber &fiber = shim::fibers[shim::current];
    if (!fiber.products_begun) shim::fail("a product that was not begun");
    fiber.products.push_back({c, a, 0, right, T});
}
static inline void warpgroup_multiply_rows(float *c, uint64_t left, uint64_t right) {
    shim::Fiber &fiber = shim::fibers[shim::current];
    if (!fiber.products_begun) shim::fail("a product that was not begun");
    fiber.products.push_back({c, nullptr, left, right, 128});
}
static inline void close_products() {
    shim::Fiber &fiber = shim::fibers[shim::current];
    fiber.products_closed.push_back(std::move(fiber.products));
    fiber.products.clear();
    fiber.products_begun = false;
    shim::all_of_group([](shim::Fiber *group) {
        if (shim::draw(2)) shim::run_products(group, 0);
    });
}
template <int N> static inline void wait_products() {
    shim::all_of_group([](shim::Fiber *group) { shim::run_products(group, N); });
}
template <int COUNT> static inline void settle(float *) {
    if (!shim::fibers[shim::current].products_closed.empty()) shim::fail("sums that are read before their product is done");
}
