// A driver library for machines without a GPU: the entry points that qtool asks `libcuda.so.1` for, over host memory and
// over the kernels compiled for the processor by shim.h. Device memory is heap memory of its own, so that AddressSanitizer
// sees a kernel that leaves its buffers. QTOOL_FAKE_CUDA_FAIL=N makes the Nth call that may fail do so, QTOOL_FAKE_CUDA_CODE says with
// which CUresult (2, out of memory, if it is not set); QTOOL_FAKE_CUDA_COUNT=FILE has the number of such calls written
// there at the end. PTX is looked at only so far as to see that it is PTX.
#define HOST_SHIM
#include "../attention.cu"
#include "../elementwise.cu"
#include "../encode_affine.cu"
#include "../encode_wint2.cu"
#include "../gemv.cu"
#include "../gram.cu"
#include "../matmul.cu"
#include "../moe.cu"
#include "../norm.cu"
#include "../rows.cu"
#include "../scores.cu"
#include "../tensor_gemm.cu"

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

namespace {
struct Kernel {
    void (*run)(const unsigned *, const unsigned *, void **);
};

template <class... Arguments, std::size_t... I>
void call(void (*kernel)(Arguments...), const unsigned *grid, const unsigned *size, void **arguments,
          std::index_sequence<I...>) {
    auto taken = std::tuple<Arguments...>(*static_cast<Arguments *>(arguments[I])...);
    shim::launch(grid, size, [&] { std::apply(kernel, taken); });
}
template <auto kernel> struct Entry;
template <class... Arguments, void (*kernel)(Arguments...)> struct Entry<kernel> {
    static void run(const unsigned *grid, const unsigned *size, void **arguments) {
        call(kernel, grid, size, arguments, std::index_sequence_for<Arguments...>{});
    }
};

#define KERNEL(name) {#name, {Entry<name>::run}}
const std::map<std::string, Kernel> kernels = {
    KERNEL(gemv),       KERNEL(gemm),     KERNEL(decode), KERNEL(attention), KERNEL(rms_norm),
    KERNEL(layer_norm), KERNEL(add),      KERNEL(gate),   KERNEL(activate),  KERNEL(rope),
    KERNEL(gather),     KERNEL(scatter_add), KERNEL(place), KERNEL(gram),
    KERNEL(encode_affine), KERNEL(encode_wint2), KERNEL(split), KERNEL(gram_split), KERNEL(route), KERNEL(group_entries), KERNEL(gemm_grouped), KERNEL(combine), KERNEL(log_p), KERNEL(divergence), KERNEL(narrow), KERNEL(gemm_any), KERNEL(gemm_bf16),
    KERNEL(gemm_int8),  KERNEL(gemm_int4), KERNEL(gemm_wint2), KERNEL(gemm_nf4),
    KERNEL(gemv_bf16_1), KERNEL(gemv_bf16_4), KERNEL(gemv_bf16_16),
    KERNEL(gemv_int8_1), KERNEL(gemv_int8_4), KERNEL(gemv_int8_16),
    KERNEL(gemv_int4_1), KERNEL(gemv_int4_4), KERNEL(gemv_int4_16),
    KERNEL(gemv_wint2_1), KERNEL(gemv_wint2_4), KERNEL(gemv_wint2_16),
    KERNEL(gemv_nf4_1), KERNEL(gemv_nf4_4), KERNEL(gemv_nf4_16),
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

int may_fail() { return ++calls == setting("QTOOL_FAKE_CUDA_FAIL", -1) ? (int)setting("QTOOL_FAKE_CUDA_CODE", 2) : 0; }
int here;
} // namespace

typedef unsigned long long Pointer;
#define CALL extern "C" int
#define MAY_FAIL                                                                                                              \
    if (int code = may_fail()) return code

CALL cuInit(unsigned) { MAY_FAIL; return 0; }
CALL cuDriverGetVersion(int *version) { *version = (int)setting("QTOOL_FAKE_CUDA_VERSION", 12080); return 0; }
CALL cuDeviceGetCount(int *count) { *count = (int)setting("QTOOL_FAKE_CUDA_DEVICES", 1); return 0; }
CALL cuDeviceGet(int *device, int ordinal) { MAY_FAIL; *device = ordinal; return 0; }
CALL cuDeviceGetName(char *name, int size, int) { strncpy(name, "host shim", (size_t)size); return 0; }
CALL cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = 1ull << 33; return 0; }
CALL cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == 75 ? (int)setting("QTOOL_FAKE_CUDA_MAJOR", 8) : 0; // compute capability 8.0
    return 0;
}
CALL cuDevicePrimaryCtxRetain(void **context, int) { MAY_FAIL; *context = &here; return 0; }
CALL cuDevicePrimaryCtxRelease_v2(int) { return 0; }
CALL cuCtxGetCurrent(void **context) { *context = &here; return 0; }
CALL cuCtxSetCurrent(void *) { return 0; }
CALL cuCtxSynchronize() { MAY_FAIL; return 0; }
CALL cuMemGetInfo_v2(size_t *free, size_t *total) { *free = 1ull << 33; *total = 1ull << 33; return 0; }
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
    return attribute == 8 && value <= (int)SHARED_BYTES ? 0 : 1; // most dynamic shared memory
}
CALL cuMemAlloc_v2(Pointer *pointer, size_t bytes) { MAY_FAIL; *pointer = (Pointer)malloc(bytes); return *pointer ? 0 : 2; }
CALL cuMemAllocAsync(Pointer *pointer, size_t bytes, void *) { return cuMemAlloc_v2(pointer, bytes); }
CALL cuMemFree_v2(Pointer pointer) { free((void *)pointer); return 0; }
CALL cuMemFreeAsync(Pointer pointer, void *) { free((void *)pointer); return 0; }
CALL cuMemcpyHtoD_v2(Pointer to, const void *from, size_t bytes) { MAY_FAIL; memcpy((void *)to, from, bytes); return 0; }
CALL cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t bytes, void *) { MAY_FAIL; memcpy((void *)to, from, bytes); return 0; }
CALL cuMemcpyDtoH_v2(void *to, Pointer from, size_t bytes) { MAY_FAIL; memcpy(to, (void *)from, bytes); return 0; }
CALL cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t bytes, void *) { MAY_FAIL; memcpy(to, (void *)from, bytes); return 0; }
CALL cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void *) { MAY_FAIL; memcpy((void *)to, (void *)from, bytes); return 0; }
CALL cuMemsetD8_v2(Pointer to, unsigned char value, size_t bytes) { MAY_FAIL; memset((void *)to, value, bytes); return 0; }
CALL cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, void *) { MAY_FAIL; memset((void *)to, value, bytes); return 0; }
CALL cuStreamCreate(void **stream, unsigned) { *stream = &here; return 0; }
CALL cuStreamSynchronize(void *) { MAY_FAIL; return 0; }
CALL cuStreamDestroy_v2(void *) { return 0; }
CALL cuStreamWaitEvent(void *, void *, unsigned) { return 0; }
CALL cuEventCreate(void **event, unsigned) { *event = &here; return 0; }
CALL cuEventRecord(void *, void *) { return 0; }
CALL cuEventDestroy_v2(void *) { return 0; }
CALL cuEventSynchronize(void *) { return 0; }
CALL cuGetErrorName(int code, const char **name) { *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_SHIM"; return 0; }
CALL cuGetErrorString(int code, const char **text) { *text = code == 2 ? "out of memory" : "a failure that was asked for"; return 0; }
CALL cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                    void *, void **arguments, void **) {
    MAY_FAIL;
    static std::mutex one_at_a_time; // blocks run on fibers that are shared
    std::lock_guard<std::mutex> lock(one_at_a_time);
    if (shared > SHARED_BYTES) return 1;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(shared_bytes, SHARED_BYTES);
#endif
    memset(shared_bytes, 0xff, shared); // not what the launch before left there
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(shared_bytes + shared, SHARED_BYTES - shared);
#endif
    unsigned grid[3] = {gx, gy, gz}, size[3] = {bx, by, bz};
    static_cast<Kernel *>(function)->run(grid, size, arguments);
    return 0;
}
