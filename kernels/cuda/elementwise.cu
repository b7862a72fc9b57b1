// Element by element: sums, functions of one number, gates, and the rotary embedding.
//
//   silu   x / (1 + e^-x)                                   gelu   x (1 + erf(x / sqrt 2)) / 2        (Hendrycks and Gimpel 2016)
//   tanh form of gelu   x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2                             (the same)
//   gate   f(x) * up, SwiGLU where f is silu                                                          (Shazeer 2020)
//   rope   (a, b) -> (a cos - b sin, b cos + a sin)                                                   (Su et al. 2021)
#include "device.cuh"

enum Function { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, TANH = 4 };

INLINE float apply(i32 f, float x) {
    if (f == SILU) return x / (1.0f + exp_(-x));
    if (f == GELU) return 0.5f * x * (1.0f + erf_(x * 0.70710678f));
    if (f == GELU_TANH) return 0.5f * x * (1.0f + tanh_(0.79788456f * (x + 0.044715f * x * x * x)));
    if (f == RELU) return max_(x, 0.0f);
    return tanh_(x);
}

// x (count) += y, which is repeated every `period` values: a bias, or a tensor of the same size.
extern "C" __global__ void add(float *x /* (count) */, const float *y /* (period) */, i64 count, i64 period) {
    i64 i = (i64)block_x() * threads_x() + thread_x();
    if (i < count) x[i] += y[period == count ? i : i % period];
}

extern "C" __global__ void activate(float *x /* (count) */, i64 count, i32 f) {
    i64 i = (i64)block_x() * threads_x() + thread_x();
    if (i < count) x[i] = apply(f, x[i]);
}

extern "C" __global__ void gate(float *x /* (count) */, const float *up /* (count) */, i64 count, i32 f) {
    i64 i = (i64)block_x() * threads_x() + thread_x();
    if (i < count) x[i] = apply(f, x[i]) * up[i];
}

// Turns pairs of columns of each head: (a, b) -> (a cos - b sin, b cos + a sin). Columns (i, i + half) of a head when
// `pairs` is 0, (2i, 2i + 1) when it is 1. cos and sin are (positions, half).
extern "C" __global__ void rope(float *x /* (M, heads * 2 half) */, const u32 *positions /* (M) */,
                                const float *cos /* (positions, half) */, const float *sin /* (positions, half) */, i32 columns,
                                i32 half, i32 pairs) {
    i32 i = block_y() * threads_x() + thread_x(); // a block for a row, and so many of its pairs
    if (i >= columns / 2) return;
    i32 head = i / half, j = i % half;
    float *at = x + (i64)block_x() * columns + (i64)head * 2 * half;
    i32 a = pairs ? 2 * j : j, b = pairs ? 2 * j + 1 : j + half;
    i64 angle = (i64)positions[block_x()] * half + j;
    float c = cos[angle], s = sin[angle], u = at[a], v = at[b];
    at[a] = u * c - v * s;
    at[b] = v * c + u * s;
}
