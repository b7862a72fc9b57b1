// Kernels on the processor: every CUDA thread of a block is a fiber; barriers and shuffles hand the processor to the next.
// One block runs at a time. Which fiber goes first is drawn anew at every turn from a seed (QTOOL_SHIM_SEED), so a missing
// barrier shows up as a wrong result under some seed. A barrier or shuffle that not all threads reach ends the program.
//
// It checks indexing, barriers and arithmetic as written. It is no race detector, and says nothing of real hardware.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define INLINE static inline

namespace shim {
enum class At { Running, Barrier, Shuffle, Done };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    At at = At::Done;
    float value = 0; // offered to a shuffle
    float other = 0; // taken from it
    int lane = 0;    // whose value
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
inline void wait(At at) {
    fibers[current].at = at;
    swapcontext(&fibers[current].context, &scheduler);
}
inline void enter() {
    body();
    wait(At::Done);
}
[[noreturn]] inline void fail(const char *what) {
    fprintf(stderr, "shim: %s in block (%d, %d)\n", what, block[0], block[1]);
    abort();
}

// Lets go the warps whose 32 threads all offer a value; true when there was one.
inline bool exchange() {
    bool any = false;
    for (int warp = 0; warp < threads; warp += 32) {
        int here = 0, size = threads - warp < 32 ? threads - warp : 32;
        for (int i = warp; i < warp + size; i++) here += fibers[i].at == At::Shuffle;
        if (here != size) continue;
        for (int i = warp; i < warp + size; i++) fibers[i].other = fibers[warp + fibers[i].lane % size].value;
        for (int i = warp; i < warp + size; i++) fibers[i].at = At::Running;
        any = true;
    }
    return any;
}

inline void run_block() {
    for (int i = 0; i < threads; i++) {
        Fiber &fiber = fibers[i];
        fiber.at = At::Running;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (;;) {
        int running = 0, done = 0, barrier = 0;
        for (int i = 0, first = (int)draw((uint32_t)threads); i < threads; i++) {
            current = (first + i) % threads;
            if (fibers[current].at == At::Running) {
                swapcontext(&scheduler, &fibers[current].context);
                running++;
            }
        }
        bool went = exchange();
        for (int i = 0; i < threads; i++) {
            done += fibers[i].at == At::Done;
            barrier += fibers[i].at == At::Barrier;
        }
        if (done == threads) return;
        if (barrier == threads) {
            for (int i = 0; i < threads; i++) fibers[i].at = At::Running;
            continue;
        }
        if (barrier && done) fail("a barrier that threads have passed by ending");
        if (!running && !went) fail("threads wait for each other at a barrier and at a shuffle");
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
static inline void barrier() { shim::wait(shim::At::Barrier); }
static inline float shuffle_xor(float value, int lane) {
    shim::Fiber &fiber = shim::fibers[shim::current];
    fiber.value = value;
    fiber.lane = (shim::current % 32) ^ lane;
    shim::wait(shim::At::Shuffle);
    return shim::fibers[shim::current].other;
}
static inline float sqrt_(float x) { return sqrtf(x); }
static inline float fma_(float a, float b, float c) { return fmaf(a, b, c); }
static inline float floor_(float x) { return floorf(x); }
static inline float from_f16(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}
