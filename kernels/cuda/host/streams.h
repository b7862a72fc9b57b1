// Streams of the fake driver: queues of work that runs when somebody waits for it, or at once; a coin with a seed
// (QTOOL_SHIM_SEED) decides at every call. So a copy that nobody waits for is seen late, and memory that is used again
// before a stream is done with it is seen overwritten, under some seed.
//
// Waits refer to work that was handed in before, so running one stream may need some of another, and never ends in a circle.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

namespace streams {
struct Stream;
struct Work {
    std::function<void()> run;
    bool frees = false; // memory: done on a lost device too
    Stream *on = nullptr; // or: wait until this stream
    uint64_t upto = 0;    // has done that much
};
// A lost device does nothing that waits: its copies and kernels no longer touch memory, whose owners may be gone by then.
inline std::atomic<bool> lost{false};
struct Stream {
    std::deque<Work> queue;
    uint64_t given = 0, done = 0;
};
struct Event {
    Stream *on = nullptr;
    uint64_t upto = 0;
    std::chrono::steady_clock::time_point at{};
};

inline std::recursive_mutex lock; // over everything here
inline Stream null;
inline std::vector<Stream *> all = {&null};
inline uint64_t coins = [] {
    const char *seed = getenv("QTOOL_SHIM_SEED");
    return seed ? strtoull(seed, nullptr, 10) * 2654435761u + 1 : 1ull;
}();

inline bool heads() {
    coins = coins * 6364136223846793005ull + 1442695040888963407ull;
    return coins >> 63;
}
inline void run(Stream &stream, uint64_t upto) {
    while (stream.done < upto) {
        Work work = std::move(stream.queue.front());
        stream.queue.pop_front();
        if (work.on) run(*work.on, work.upto);
        if (work.run && (work.frees || !lost)) work.run();
        stream.done++;
    }
}
inline void finish(Stream &stream) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    run(stream, stream.given);
}
inline void finish_all() {
    std::lock_guard<std::recursive_mutex> guard(lock);
    for (Stream *stream : all) run(*stream, stream->given);
}
inline void give(Stream &stream, Work work) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    stream.queue.push_back(std::move(work));
    stream.given++;
    if (heads()) run(stream, stream.given);
}
inline void give(Stream &stream, std::function<void()> work) { give(stream, Work{std::move(work), false, nullptr, 0}); }

// The legacy default stream, also where a program says the one of its thread.
inline Stream &named(void *handle) { return (uintptr_t)handle <= 2 ? null : *(Stream *)handle; }

inline void record(Event &event, Stream &stream) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    event.on = &stream;
    event.upto = stream.given + 1;
    give(stream, [&event] { event.at = std::chrono::steady_clock::now(); });
}
inline void wait(Stream &stream, const Event &event) {
    if (event.on) give(stream, Work{nullptr, false, event.on, event.upto});
}
inline void wait(const Event &event) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (event.on) run(*event.on, event.upto);
}

// Host memory that copies take as they find it when they run. Other memory is copied when it is given.
inline std::map<uintptr_t, size_t> pinned;
inline bool is_pinned(const void *at) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto after = pinned.upper_bound((uintptr_t)at);
    if (after == pinned.begin()) return false;
    --after;
    return (uintptr_t)at < after->first + after->second;
}

// Device memory, of which there is only so much.
inline std::map<uintptr_t, size_t> blocks;
inline size_t taken = 0;
inline void *take(size_t bytes, size_t most) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (taken + bytes > most) return nullptr;
    void *block = malloc(bytes ? bytes : 1);
    if (block) memset(block, 0xff, bytes), blocks[(uintptr_t)block] = bytes, taken += bytes; // NaN, until it is written
    return block;
}
inline void give_back(void *block) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto found = blocks.find((uintptr_t)block);
    if (found == blocks.end()) return;
    taken -= found->second;
    blocks.erase(found);
    free(block);
}
} // namespace streams
