// A driver library for machines without a GPU: the entry points that qtool asks `libcuda.so.1` for, over host memory and
// over the kernels compiled for the processor by shim.h. Device memory is heap memory of its own, so that AddressSanitizer
// sees a kernel that leaves its buffers. QTOOL_FAKE_CUDA_FAIL=N makes the Nth call that may fail do so, QTOOL_FAKE_CUDA_CODE says with
// which CUresult (2, out of memory, if it is not set); QTOOL_FAKE_CUDA_COUNT=FILE has the number of such calls written
// there at the end. QTOOL_FAKE_CUDA_IDLE=1 runs no kernel, and memory is zeros: for looking at many failures in turn.
// QTOOL_FAKE_CUDA_MEMORY=BYTES is how much device memory there is. Streams are those of streams.h. PTX is looked at only so far as to see that it is PTX.
#define HOST_SHIM
#include "../attention.cu"
#include "../attention_any.cu"
#include "../elementwise.cu"
#include "../encode_affine.cu"
#include "../encode_wint2.cu"
#include "../exact_grouped.cu"
#include "../exact_low.cu"
#include "../gemv.cu"
#include "../gram.cu"
#include "../matmul.cu"
#include "../moe.cu"
#include "../norm.cu"
#include "../rows.cu"
#include "../scores.cu"
#include "../sums.cu"
#include "../tensor_gemm.cu"
#include "../tensor_grouped.cu"
#include "../warpgroup_gemm.cu"
#include "../warpgroup_gram.cu"
#include "streams.h"

#include <array>
#include <map>
#include <string>
#include <tuple>
#include <utility>

typedef unsigned long long Pointer;

namespace {
// A launch with its arguments, taken when it is given.
struct Kernel {
    std::function<void()> (*bind)(const unsigned *, const unsigned *, void **);
};

template <class... Arguments, std::size_t... I>
std::function<void()> with(void (*kernel)(Arguments...), const unsigned *grid, const unsigned *size, void **arguments,
                           std::index_sequence<I...>) {
    auto taken = std::tuple<Arguments...>(*static_cast<Arguments *>(arguments[I])...);
    std::array<unsigned, 3> blocks = {grid[0], grid[1], grid[2]}, threads = {size[0], size[1], size[2]};
    return [=] { shim::launch(blocks.data(), threads.data(), [&] { std::apply(kernel, taken); }); };
}
template <auto kernel> struct Entry;
template <class... Arguments, void (*kernel)(Arguments...)> struct Entry<kernel> {
    static std::function<void()> bound(const unsigned *grid, const unsigned *size, void **arguments) {
        return with(kernel, grid, size, arguments, std::index_sequence_for<Arguments...>{});
    }
};

#define KERNEL(name) {#name, {Entry<name>::bound}}
const std::map<std::string, Kernel> kernels = {
    KERNEL(gemv),       KERNEL(decode), KERNEL(attention_any), KERNEL(rms_norm),
    KERNEL(layer_norm), KERNEL(add),      KERNEL(gate),   KERNEL(activate),  KERNEL(rope),
    KERNEL(gather),     KERNEL(scatter_add), KERNEL(scatter_apart), KERNEL(place), KERNEL(gram),
    KERNEL(encode_affine), KERNEL(encode_wint2), KERNEL(encode_wint2_weighted), KERNEL(split), KERNEL(gram_split), KERNEL(route), KERNEL(count_entries), KERNEL(group_entries), KERNEL(combine), KERNEL(log_p), KERNEL(divergence), KERNEL(narrow), KERNEL(gemm_any), KERNEL(gemm_bf16),
    KERNEL(gemm_int8),  KERNEL(gemm_int4), KERNEL(gemm_wint2), KERNEL(gemm_nf4),
    KERNEL(grouped_any), KERNEL(grouped_bf16), KERNEL(grouped_int8), KERNEL(grouped_int4), KERNEL(grouped_wint2), KERNEL(grouped_nf4),
    KERNEL(watch_columns), KERNEL(mirror), KERNEL(narrow_turned), KERNEL(split_turned), KERNEL(gram_wide),
    KERNEL(wide_bf16_128), KERNEL(wide_int8_128), KERNEL(wide_int4_128), KERNEL(wide_wint2_128), KERNEL(wide_nf4_128),
    KERNEL(wide_bf16_256), KERNEL(wide_int8_256), KERNEL(wide_int4_256), KERNEL(wide_wint2_256), KERNEL(wide_nf4_256),
    KERNEL(exact_any), KERNEL(exact_f32), KERNEL(exact_bf16), KERNEL(exact_int8), KERNEL(exact_int4), KERNEL(exact_wint2), KERNEL(exact_nf4),
    KERNEL(exact_grouped_any), KERNEL(exact_grouped_f32), KERNEL(exact_grouped_bf16), KERNEL(exact_grouped_int8), KERNEL(exact_grouped_int4), KERNEL(exact_grouped_wint2), KERNEL(exact_grouped_nf4),
    KERNEL(exact_low_any), KERNEL(exact_low_f32), KERNEL(exact_low_bf16), KERNEL(exact_low_int8), KERNEL(exact_low_int4), KERNEL(exact_low_wint2), KERNEL(exact_low_nf4),
    KERNEL(attention_64), KERNEL(attention_96), KERNEL(attention_128), KERNEL(attention_256),
    KERNEL(attention_less_128), KERNEL(attention_less_256), KERNEL(attention_few_64), KERNEL(attention_few_96), KERNEL(attention_few_128), KERNEL(attention_few_256),
    KERNEL(gemv_bf16_4), KERNEL(gemv_bf16_8), KERNEL(gemv_bf16_16),
    KERNEL(gemv_int8_4), KERNEL(gemv_int8_8), KERNEL(gemv_int8_16),
    KERNEL(gemv_int4_4), KERNEL(gemv_int4_8), KERNEL(gemv_int4_16),
    KERNEL(gemv_int4_128_4), KERNEL(gemv_int4_128_8), KERNEL(gemv_int4_128_16),
    KERNEL(gemv_int4_64_4), KERNEL(gemv_int4_64_8), KERNEL(gemv_int4_64_16),
    KERNEL(gemv_int4_32_4), KERNEL(gemv_int4_32_8), KERNEL(gemv_int4_32_16),
    KERNEL(gemv_wint2_4), KERNEL(gemv_wint2_8), KERNEL(gemv_wint2_16),
    KERNEL(gemv_nf4_4), KERNEL(gemv_nf4_8), KERNEL(gemv_nf4_16),
};

long setting(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value ? atol(value) : otherwise;
}
long calls = 0;
struct Count {
    ~Count() {
        const char *path = getenv("QTOOL_FAKE_CUDA_COUNT");
        if (!path) return;
        if (FILE *file = fopen(path, "w")) {
            fprintf(file, "%ld\n", calls);
            fclose(file);
        }
    }
} count_at_the_end;

// A device that failed by anything but memory fails from then on, as a real one does. A call that needs no memory does not
// run out of it: the next one does.
int may_fail(bool needs_memory = true) {
    static long fail = setting("QTOOL_FAKE_CUDA_FAIL", -1);
    static const long code = setting("QTOOL_FAKE_CUDA_CODE", 2);
    calls++;
    if (calls == fail && code == 2 && !needs_memory) fail++;
    bool fails = calls == fail || (fail > 0 && calls > fail && code != 2);
    if (fails && code != 2) streams::lost = true;
    return fails ? (int)code : 0;
}
int here;
// Of a block, at most: what an H100 has, unless told otherwise.
long shared_memory() { return setting("QTOOL_FAKE_CUDA_SHARED", 227 << 10); }
size_t memory() { return (size_t)setting("QTOOL_FAKE_CUDA_MEMORY", 1l << 33); }

int to_device(Pointer to, const void *from, size_t bytes, void *stream) {
    if (streams::is_pinned(from)) {
        streams::give(streams::named(stream), [=] { memcpy((void *)to, from, bytes); });
    } else {
        std::vector<char> now((const char *)from, (const char *)from + bytes);
        streams::give(streams::named(stream), [=, now = std::move(now)] { memcpy((void *)to, now.data(), bytes); });
    }
    return 0;
}
int from_device(void *to, Pointer from, size_t bytes, void *stream) {
    streams::give(streams::named(stream), [=] { memcpy(to, (void *)from, bytes); });
    if (!streams::is_pinned(to)) streams::finish(streams::named(stream));
    return 0;
}
} // namespace

#define CALL extern "C" int
#define MAY_FAIL                                                                                                              \
    if (int code = may_fail()) return code
#define MAY_FAIL_WITHOUT_MEMORY                                                                                               \
    if (int code = may_fail(false)) return code

CALL cuInit(unsigned) { MAY_FAIL; return 0; }
CALL cuDriverGetVersion(int *version) { *version = (int)setting("QTOOL_FAKE_CUDA_VERSION", 12080); return 0; }
CALL cuDeviceGetCount(int *count) { *count = (int)setting("QTOOL_FAKE_CUDA_DEVICES", 1); return 0; }
CALL cuDeviceGet(int *device, int ordinal) { MAY_FAIL; *device = ordinal; return 0; }
CALL cuDeviceGetName(char *name, int size, int) { strncpy(name, "host shim", (size_t)size); return 0; }
CALL cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = memory(); return 0; }
CALL cuDeviceGetAttribute(int *value, int attribute, int) {
    // Compute capability 9.0 unless told otherwise, memory pools (allocation in the order of a stream), and few multiprocessors, so
    // that blocks have several tiles.
    *value = attribute == 75 ? (int)setting("QTOOL_FAKE_CUDA_MAJOR", 9) : attribute == 115 ? 1 : 0;
    if (attribute == 97) *value = (int)shared_memory();
    if (attribute == 16) *value = (int)setting("QTOOL_FAKE_CUDA_PROCESSORS", 5);
    return 0;
}
CALL cuDevicePrimaryCtxRetain(void **context, int) { MAY_FAIL; *context = &here; return 0; }
CALL cuDevicePrimaryCtxRelease_v2(int) { return 0; }
CALL cuCtxGetCurrent(void **context) { *context = &here; return 0; }
CALL cuCtxSetCurrent(void *) { return 0; }
CALL cuCtxSynchronize() { MAY_FAIL_WITHOUT_MEMORY; streams::finish_all(); return 0; }
CALL cuMemGetInfo_v2(size_t *free, size_t *total) { MAY_FAIL; *total = memory(); *free = memory() - streams::taken; return 0; }
CALL cuModuleLoadData(void **module, const void *image) {
    MAY_FAIL;
    *module = &here;
    return strstr(static_cast<const char *>(image), ".version") ? 0 : 218;
}
CALL cuModuleUnload(void *) { return 0; }
CALL cuModuleGetFunction(void **function, void *, const char *name) {
    MAY_FAIL;
    auto found = kernels.find(name);
    if (found == kernels.end()) return 500;
    *function = const_cast<Kernel *>(&found->second);
    return 0;
}
CALL cuFuncSetAttribute(void *, int attribute, int value) {
    MAY_FAIL;
    return attribute == 8 && value <= shared_memory() ? 0 : 1; // most dynamic shared memory
}
CALL cuMemAlloc_v2(Pointer *pointer, size_t bytes) {
    MAY_FAIL;
    *pointer = (Pointer)streams::take(bytes, memory());
    static const bool idle = setting("QTOOL_FAKE_CUDA_IDLE", 0) == 1;
    if (*pointer && idle) memset((void *)*pointer, 0, bytes);
    return *pointer ? 0 : 2;
}
CALL cuMemAllocAsync(Pointer *pointer, size_t bytes, void *) { return cuMemAlloc_v2(pointer, bytes); }
CALL cuMemFree_v2(Pointer pointer) { streams::finish_all(); streams::give_back((void *)pointer); return 0; }
CALL cuMemFreeAsync(Pointer pointer, void *stream) {
    streams::give(streams::named(stream), streams::Work{[=] { streams::give_back((void *)pointer); }, true});
    return 0;
}
CALL cuMemHostAlloc(void **host, size_t bytes, unsigned) {
    MAY_FAIL;
    *host = malloc(bytes);
    std::lock_guard<std::recursive_mutex> guard(streams::lock);
    streams::pinned[(uintptr_t)*host] = bytes;
    return *host ? 0 : 2;
}
CALL cuMemFreeHost(void *host) {
    std::lock_guard<std::recursive_mutex> guard(streams::lock);
    streams::finish_all();
    streams::pinned.erase((uintptr_t)host);
    free(host);
    return 0;
}
CALL cuMemcpyHtoD_v2(Pointer to, const void *from, size_t bytes) { MAY_FAIL_WITHOUT_MEMORY; streams::finish_all(); memcpy((void *)to, from, bytes); return 0; }
CALL cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t bytes, void *stream) { MAY_FAIL_WITHOUT_MEMORY; return to_device(to, from, bytes, stream); }
CALL cuMemcpyDtoH_v2(void *to, Pointer from, size_t bytes) { MAY_FAIL_WITHOUT_MEMORY; streams::finish_all(); memcpy(to, (void *)from, bytes); return 0; }
CALL cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t bytes, void *stream) { MAY_FAIL_WITHOUT_MEMORY; return from_device(to, from, bytes, stream); }
CALL cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void *stream) {
    MAY_FAIL_WITHOUT_MEMORY;
    streams::give(streams::named(stream), [=] { memmove((void *)to, (void *)from, bytes); });
    return 0;
}
CALL cuMemsetD8_v2(Pointer to, unsigned char value, size_t bytes) { MAY_FAIL_WITHOUT_MEMORY; streams::finish_all(); memset((void *)to, value, bytes); return 0; }
CALL cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, void *stream) {
    MAY_FAIL_WITHOUT_MEMORY;
    streams::give(streams::named(stream), [=] { memset((void *)to, value, bytes); });
    return 0;
}
CALL cuStreamCreate(void **stream, unsigned) {
    MAY_FAIL;
    std::lock_guard<std::recursive_mutex> guard(streams::lock);
    auto *made = new streams::Stream;
    streams::all.push_back(made);
    *stream = made;
    return 0;
}
CALL cuStreamSynchronize(void *stream) { MAY_FAIL_WITHOUT_MEMORY; streams::finish(streams::named(stream)); return 0; }
// Streams and events stay: work that waits may still name them.
CALL cuStreamDestroy_v2(void *stream) { streams::finish(streams::named(stream)); return 0; }
CALL cuStreamWaitEvent(void *stream, void *event, unsigned) { MAY_FAIL_WITHOUT_MEMORY; streams::wait(streams::named(stream), *(streams::Event *)event); return 0; }
CALL cuEventCreate(void **event, unsigned) { MAY_FAIL; *event = new streams::Event; return 0; }
CALL cuEventRecord(void *event, void *stream) { MAY_FAIL_WITHOUT_MEMORY; streams::record(*(streams::Event *)event, streams::named(stream)); return 0; }
CALL cuEventDestroy_v2(void *) { return 0; }
CALL cuEventSynchronize(void *event) { MAY_FAIL_WITHOUT_MEMORY; streams::wait(*(streams::Event *)event); return 0; }
CALL cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    MAY_FAIL;
    auto *a = (streams::Event *)start, *b = (streams::Event *)end;
    streams::wait(*a), streams::wait(*b);
    *milliseconds = std::chrono::duration<float, std::milli>(b->at - a->at).count();
    return 0;
}
CALL cuLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    MAY_FAIL;
    streams::give(streams::named(stream), [=] { function(data); });
    return 0;
}
CALL cuGetErrorName(int code, const char **name) { *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_SHIM"; return 0; }
CALL cuGetErrorString(int code, const char **text) { *text = code == 2 ? "out of memory" : "a failure that was asked for"; return 0; }
CALL cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                    void *stream, void **arguments, void **) {
    MAY_FAIL;
    if (shared > shared_memory()) return 1;
    static const bool idle = setting("QTOOL_FAKE_CUDA_IDLE", 0) == 1;
    if (idle) return 0;
    unsigned grid[3] = {gx, gy, gz}, size[3] = {bx, by, bz};
    auto work = static_cast<Kernel *>(function)->bind(grid, size, arguments);
    streams::give(streams::named(stream), [=] {
#ifdef __SANITIZE_ADDRESS__
        ASAN_UNPOISON_MEMORY_REGION(shared_bytes, SHARED_BYTES);
#endif
        memset(shared_bytes, 0xff, shared); // not what the launch before left there
        memset(shared_seen, 0xff, shared);
#ifdef __SANITIZE_ADDRESS__
        ASAN_POISON_MEMORY_REGION(shared_bytes + shared, SHARED_BYTES - shared);
#endif
        work();
    });
    return 0;
}
