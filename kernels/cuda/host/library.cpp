// A library of matrix products for machines without a GPU: the entry points that qtool asks `libcublasLt.so.12` for, over the
// memory and the streams of driver.cpp. It multiplies as it is told, so a wrong layout gives wrong numbers, and refuses what
// does not fit together. QTOOL_FAKE_CUBLASLT_VERSION is the version it claims, QTOOL_FAKE_CUBLASLT_DECLINE=1 makes it know no way
// for any product, QTOOL_FAKE_CUBLASLT_FAIL=1 makes every product fail.
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>

namespace {
enum { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13 };
enum { R_32F = 0, R_16BF = 14, COMPUTE_32F = 68 };
enum { DESC_TRANSA = 3, DESC_TRANSB = 4 };
enum { PREF_MAX_WORKSPACE = 1, PREF_ALIGNMENT_A = 5, PREF_ALIGNMENT_D = 8 };
constexpr uint64_t MARK = 0x71746f6f6c; // of an algorithm that comes from here

struct Layout { int type; uint64_t rows, columns; int64_t leading; };
struct Description { int compute, scale; int32_t transpose_a = 0, transpose_b = 0; };
struct Preference { uint64_t workspace = 0; uint32_t alignment = 256; };
struct Algorithm { uint64_t data[8]; };
struct Heuristic { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };

long setting(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value ? atol(value) : otherwise;
}
float value(const Layout &of, const void *matrix, uint64_t row, uint64_t column) {
    uint64_t at = column * (uint64_t)of.leading + row;
    if (of.type == R_32F) return ((const float *)matrix)[at];
    return std::bit_cast<float>((uint32_t)((const uint16_t *)matrix)[at] << 16);
}
// Whether D (N, M) = op(A) op(B) is a product.
bool fits(const Description &what, const Layout &a, const Layout &b, const Layout &d) {
    auto rows = [](const Layout &m, bool transposed) { return transposed ? m.columns : m.rows; };
    auto columns = [](const Layout &m, bool transposed) { return transposed ? m.rows : m.columns; };
    bool leading = a.leading >= (int64_t)a.rows && b.leading >= (int64_t)b.rows && d.leading >= (int64_t)d.rows;
    return leading && what.compute == COMPUTE_32F && what.scale == R_32F && a.type == R_16BF && b.type == R_16BF && d.type == R_32F &&
           rows(a, what.transpose_a) == d.rows && columns(b, what.transpose_b) == d.columns &&
           columns(a, what.transpose_a) == rows(b, what.transpose_b);
}
typedef int (*LaunchHostFunction)(void *stream, void (*function)(void *), void *data);
} // namespace

#define CALL extern "C" int
CALL cublasLtCreate(void **handle) { *handle = new int(1); return SUCCESS; }
CALL cublasLtDestroy(void *handle) { delete (int *)handle; return SUCCESS; }
extern "C" size_t cublasLtGetVersion() { return (size_t)setting("QTOOL_FAKE_CUBLASLT_VERSION", 120804); }
CALL cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = new Layout{type, rows, columns, leading};
    return SUCCESS;
}
CALL cublasLtMatrixLayoutDestroy(void *layout) { delete (Layout *)layout; return SUCCESS; }
CALL cublasLtMatmulDescCreate(void **description, int compute, int scale) {
    *description = new Description{compute, scale};
    return SUCCESS;
}
CALL cublasLtMatmulDescDestroy(void *description) { delete (Description *)description; return SUCCESS; }
CALL cublasLtMatmulDescSetAttribute(void *description, int attribute, const void *from, size_t bytes) {
    auto *of = (Description *)description;
    int32_t *to = attribute == DESC_TRANSA ? &of->transpose_a : attribute == DESC_TRANSB ? &of->transpose_b : nullptr;
    if (!to || bytes != sizeof *to) return INVALID_VALUE;
    memcpy(to, from, bytes);
    return SUCCESS;
}
CALL cublasLtMatmulPreferenceCreate(void **preference) { *preference = new Preference; return SUCCESS; }
CALL cublasLtMatmulPreferenceDestroy(void *preference) { delete (Preference *)preference; return SUCCESS; }
CALL cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *from, size_t bytes) {
    auto *of = (Preference *)preference;
    if (attribute == PREF_MAX_WORKSPACE && bytes == 8) return memcpy(&of->workspace, from, 8), SUCCESS;
    if (attribute >= PREF_ALIGNMENT_A && attribute <= PREF_ALIGNMENT_D && bytes == 4) return memcpy(&of->alignment, from, 4), SUCCESS;
    return INVALID_VALUE;
}
CALL cublasLtMatmulAlgoGetHeuristic(void *handle, void *what, void *a, void *b, void *c, void *d, void *preference, int asked,
                                    Heuristic *found, int *count) {
    *count = 0;
    if (!handle || asked < 1 || c != d) return INVALID_VALUE;
    if (!fits(*(Description *)what, *(Layout *)a, *(Layout *)b, *(Layout *)d)) return INVALID_VALUE;
    if (((Preference *)preference)->alignment > 16 || setting("QTOOL_FAKE_CUBLASLT_DECLINE", 0)) return SUCCESS;
    *found = Heuristic{};
    found->algorithm.data[0] = MARK;
    *count = 1;
    return SUCCESS;
}
CALL cublasLtMatmul(void *handle, void *what, const float *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
                    const float *beta, const void *c, void *c_layout, void *d, void *d_layout, const Algorithm *algorithm, void *,
                    size_t, void *stream) {
    if (!handle || c != d || c_layout != d_layout || algorithm->data[0] != MARK || *beta != 0.0f) return INVALID_VALUE;
    if (setting("QTOOL_FAKE_CUBLASLT_FAIL", 0)) return EXECUTION_FAILED;
    Description how = *(Description *)what;
    Layout left = *(Layout *)a_layout, right = *(Layout *)b_layout, out = *(Layout *)d_layout;
    if (!fits(how, left, right, out)) return INVALID_VALUE;
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    auto launch = driver ? (LaunchHostFunction)dlsym(driver, "cuLaunchHostFunc") : nullptr;
    if (!launch) return NOT_INITIALIZED;
    auto *work = new std::function<void()>([=, scale = *alpha] {
        uint64_t inner = how.transpose_a ? left.rows : left.columns;
        for (uint64_t j = 0; j < out.columns; j++)
            for (uint64_t i = 0; i < out.rows; i++) {
                double sum = 0.0;
                for (uint64_t l = 0; l < inner; l++)
                    sum += (double)(how.transpose_a ? value(left, a, l, i) : value(left, a, i, l)) *
                           (double)(how.transpose_b ? value(right, b, j, l) : value(right, b, l, j));
                ((float *)d)[j * (uint64_t)out.leading + i] = scale * (float)sum;
            }
    });
    auto run = [](void *data) {
        auto *work = (std::function<void()> *)data;
        (*work)();
        delete work;
    };
    return launch(stream, run, work) ? EXECUTION_FAILED : SUCCESS;
}
