// Kernels on the processor: every CUDA thread of a block is a fiber; barriers and what a warp does together hand the processor to the next.
// One block runs at a time. Which fiber goes first is drawn anew at every turn from a seed (QTOOL_SHIM_SEED), and in two of three blocks a
// warp, or four, go only when no other can, so a missing barrier shows up as a wrong result under some seed. A barrier or shuffle that not all threads reach ends the program.
//
// It checks indexing, barriers and arithmetic as written. It is no race detector, and says nothing of real hardware.
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define BOUNDS(threads, blocks)
#define FORGET(number)
#define INLINE static inline
#define UNROLL
#define UNROLL_4
#define KEEP_LOOP

namespace shim {
enum class At { Running, Barrier, Warp, Group, Done };
struct Fiber;
typedef void (*Together)(Fiber *warp); // what the 32 threads of a warp, or the 128 of a warpgroup, do as one
struct Copy {
    void *to;
    const void *from;
    int size, bytes;
};
// A thread's part of a warpgroup's product.
struct Product {
    float *c;
    const uint32_t *a; // or else
    uint64_t left, right;
    int columns;
};
struct Fiber {
    ucontext_t context; // where it begins, and with AddressSanitizer where it is
    jmp_buf place;      // where it is otherwise
    bool begun = false;
    void *frames = nullptr; // AddressSanitizer's own
    std::vector<char> stack;
    At at = At::Done;
    Together work = nullptr;
    uint32_t in[10] = {}; // offered to it
    uint32_t out[4] = {}; // taken from it
    int lane = 0;         // whose value a shuffle takes
    const void *pointer = nullptr;
    std::vector<Copy> open; // copies of the group that is being filled
    std::deque<std::vector<Copy>> closed;
    std::vector<Copy> written; // copies that have arrived and were not shown to products of warpgroups
    bool products_begun = false;
    std::vector<Product> products;
    std::deque<std::vector<Product>> products_closed;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current, threads, block[2], blocks[2];
inline std::function<void()> body;
inline uint64_t random_state = [] {
    const char *seed = getenv("QTOOL_SHIM_SEED");
    return seed ? strtoull(seed, nullptr, 10) * 2 + 1 : 1ull;
}();

inline uint32_t draw(uint32_t below) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)((random_state >> 33) % below);
}

// From the scheduler to a fiber and back. `_longjmp` saves the two calls of the system that `swapcontext` makes;
// AddressSanitizer wants to be told of every change of stacks, and does not follow jumps.
#ifdef __SANITIZE_ADDRESS__
inline const void *scheduler_stack;
inline size_t scheduler_size;
inline void resume(Fiber &fiber) {
    void *frames = nullptr;
    __sanitizer_start_switch_fiber(&frames, fiber.stack.data(), fiber.stack.size());
    swapcontext(&scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
}
inline void wait(At at) {
    Fiber &fiber = fibers[current];
    fiber.at = at;
    __sanitizer_start_switch_fiber(at == At::Done ? nullptr : &fiber.frames, scheduler_stack, scheduler_size);
    swapcontext(&fiber.context, &scheduler);
    __sanitizer_finish_switch_fiber(fiber.frames, nullptr, nullptr);
}
inline void begin() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size); }
#else
inline jmp_buf scheduler_place;
inline void resume(Fiber &fiber) {
    if (_setjmp(scheduler_place)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}
inline void wait(At at) {
    Fiber &fiber = fibers[current];
    fiber.at = at;
    if (!_setjmp(fiber.place)) _longjmp(scheduler_place, 1);
}
inline void begin() {}
#endif
inline void enter() {
    begin();
    body();
    wait(At::Done);
}
[[noreturn]] inline void fail(const char *what) {
    fprintf(stderr, "shim: %s in block (%d, %d)\n", what, block[0], block[1]);
    abort();
}

// Does the work of the warps, or warpgroups, whose threads have all come for it, or leaves one waiting now and then, so that they drift
// apart as on a device; true when there was one.
inline bool exchange(At what, int size) {
    bool any = false;
    for (int first = 0; first + size <= threads; first += size) {
        int here = 0;
        for (int i = first; i < first + size; i++) here += fibers[i].at == what;
        if (here != size) continue;
        any = true;
        if (threads > size && draw(4) == 0) continue;
        for (int i = first; i < first + size; i++)
            if (fibers[i].work != fibers[first].work) fail("threads that do different things together");
        fibers[first].work(&fibers[first]);
        for (int i = first; i < first + size; i++) fibers[i].at = At::Running;
    }
    return any;
}
inline void together(Together work) {
    fibers[current].work = work;
    wait(At::Warp);
}
inline void all_of_group(Together work) {
    fibers[current].work = work;
    wait(At::Group);
}

inline void run_block() {
    for (int i = 0; i < threads; i++) {
        Fiber &fiber = fibers[i];
        fiber.at = At::Running;
        fiber.begun = false;
        fiber.open.clear();
        fiber.closed.clear();
        fiber.written.clear();
        fiber.products_begun = false;
        fiber.products.clear();
        fiber.products_closed.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    int slow = (int)draw((uint32_t)threads) / 32 * 32, slow_end = slow + (int[]){0, 32, 128}[draw(3)];
    for (bool hurried = false;;) {
        int running = 0, done = 0, barrier = 0;
        for (int i = 0, first = (int)draw((uint32_t)threads); i < threads; i++) {
            current = (first + i) % threads;
            bool waits = current >= slow && current < slow_end && !hurried;
            if (fibers[current].at == At::Running && !waits) {
                resume(fibers[current]);
                running++;
            }
        }
        bool went = exchange(At::Warp, 32), products = exchange(At::Group, 128);
        for (int i = 0; i < threads; i++) {
            done += fibers[i].at == At::Done;
            barrier += fibers[i].at == At::Barrier;
        }
        if (done == threads) return;
        if (barrier == threads) {
            for (int i = 0; i < threads; i++) fibers[i].at = At::Running;
            continue;
        }
        if (!running && !went && !products && !hurried) {
            hurried = true; // nobody else can go on
            continue;
        }
        hurried = false;
        if (barrier && done) fail("a barrier that threads have passed by ending");
        if (!running && !went && !products) fail("threads wait for each other at a barrier and at a shuffle or product");
    }
}

inline void launch(const unsigned grid[3], const unsigned size[3], std::function<void()> kernel) {
    if (size[1] != 1 || size[2] != 1 || grid[2] != 1 || size[0] % 32) fail("a launch of a shape no kernel here has");
    threads = (int)size[0];
    blocks[0] = (int)grid[0], blocks[1] = (int)grid[1];
    body = std::move(kernel);
    if ((int)fibers.size() < threads) {
        fibers.resize(threads);
        for (Fiber &fiber : fibers) fiber.stack.resize(128 << 10);
    }
    for (block[1] = 0; block[1] < blocks[1]; block[1]++)
        for (block[0] = 0; block[0] < blocks[0]; block[0]++) run_block();
}
} // namespace shim

static inline int thread_x() { return shim::current; }
static inline int block_x() { return shim::block[0]; }
static inline int block_y() { return shim::block[1]; }
static inline int threads_x() { return shim::threads; }
static inline int blocks_x() { return shim::blocks[0]; }
static inline int blocks_y() { return shim::blocks[1]; }
static inline void barrier() { shim::wait(shim::At::Barrier); }
static inline void warp_barrier() { shim::together([](shim::Fiber *) {}); }
static inline uint32_t shuffle_bits(uint32_t value, int lane) {
    shim::Fiber &fiber = shim::fibers[shim::current];
    fiber.in[0] = value;
    fiber.lane = lane;
    shim::together([](shim::Fiber *warp) {
        for (int i = 0; i < 32; i++) warp[i].out[0] = warp[warp[i].lane % 32].in[0];
    });
    return shim::fibers[shim::current].out[0];
}
static inline uint32_t shuffle_xor(uint32_t value, int lane) { return shuffle_bits(value, (shim::current % 32) ^ lane); }
static inline float shuffle_xor(float value, int lane) {
    return std::bit_cast<float>(shuffle_xor(std::bit_cast<uint32_t>(value), lane));
}
static inline float shuffle_from(float value, int lane) {
    return std::bit_cast<float>(shuffle_bits(std::bit_cast<uint32_t>(value), lane));
}
static inline float sqrt_(float x) { return sqrtf(x); }
static inline float fma_(float a, float b, float c) { return fmaf(a, b, c); }
static inline float floor_(float x) { return floorf(x); }
static inline float from_f16(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}
static inline unsigned short to_f16(float x) {
    _Float16 half = (_Float16)x;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static inline double sqrt64(double x) { return sqrt(x); }
static inline float round_even(float x) { return rintf(x); }
static inline int dot_pairs(uint32_t a, int first, int second, int c) {
    return c + (int16_t)(a & 0xffff) * first + (int16_t)(a >> 16) * second;
}
static inline int dot_low(uint32_t a, uint32_t b, int c) { return dot_pairs(a, (int8_t)b, (int8_t)(b >> 8), c); }
static inline int dot_high(uint32_t a, uint32_t b, int c) { return dot_pairs(a, (int8_t)(b >> 16), (int8_t)(b >> 24), c); }
static inline float above_8388608(uint32_t word, int i) { return std::bit_cast<float>(0x4b000000u | ((word >> (8 * i)) & 255u)); }
template <unsigned BYTES> static inline uint32_t pick(uint32_t a, uint32_t b) {
    uint32_t r = 0;
    uint64_t both = (uint64_t)b << 32 | a;
    for (int i = 0; i < 4; i++) r |= (uint32_t)((both >> (8 * ((BYTES >> (4 * i)) & 7))) & 255u) << (8 * i);
    return r;
}
static inline uint32_t add_atomically(uint32_t *at, uint32_t value) {
    uint32_t before = *at;
    *at += value;
    return before;
}
static inline void fence() {}
static inline int anew(int x) { return x; }
