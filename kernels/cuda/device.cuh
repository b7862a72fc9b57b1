// What the kernels need from the compiler, and nothing of NVIDIA's: `clang -x cuda -nocudainc -nocudalib` makes PTX of
// it, and `host/shim.h` stands in for it when a kernel is compiled for the processor (HOST_SHIM).
//
// Letters: M rows of activations, K input columns, N output columns, D width of a head. Activations are f32, row-major.
// Products and sums are written out: nothing is contracted to a fused multiply-add unless `fma_` says so, so the host
// build and the device compute the same numbers wherever the order of sums is the same.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#ifdef HOST_SHIM
#include "host/shim.h"
#else
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
// Keeps the compiler from working out what follows from a number before it is needed.
#define FORGET(number) asm volatile("" : "+r"(number))
// A kernel for blocks of so many threads, so many of them on a multiprocessor at a time: that bounds its registers.
#define BOUNDS(threads, blocks) __attribute__((launch_bounds(threads, blocks)))
#define INLINE __attribute__((device)) inline __attribute__((always_inline))
// Before a loop whose arrays must stay in registers.
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
// Before one that would only make the code long.
#define KEEP_LOOP _Pragma("nounroll")

INLINE i32 thread_x() { return __nvvm_read_ptx_sreg_tid_x(); }
INLINE i32 block_x() { return __nvvm_read_ptx_sreg_ctaid_x(); }
INLINE i32 block_y() { return __nvvm_read_ptx_sreg_ctaid_y(); }
INLINE i32 threads_x() { return __nvvm_read_ptx_sreg_ntid_x(); }
INLINE i32 blocks_x() { return __nvvm_read_ptx_sreg_nctaid_x(); }
INLINE i32 blocks_y() { return __nvvm_read_ptx_sreg_nctaid_y(); }
INLINE void barrier() { asm volatile("bar.sync 0;" ::: "memory"); }
// What the threads of a warp wrote to shared memory before, all of them see after.
INLINE void warp_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
INLINE float shuffle_xor(float v, i32 lane) {
    float r;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(r) : "f"(v), "r"(lane));
    return r;
}
INLINE u32 shuffle_xor(u32 v, i32 lane) {
    u32 r;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(r) : "r"(v), "r"(lane));
    return r;
}
INLINE float shuffle_from(float v, i32 lane) {
    float r;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(r) : "f"(v), "r"(lane));
    return r;
}
INLINE float sqrt_(float x) {
    float r;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
INLINE float fma_(float a, float b, float c) {
    float r;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
    return r;
}
INLINE float floor_(float x) {
    float r;
    asm("cvt.rmi.f32.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
INLINE float from_f16(u16 bits) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
    return r;
}
INLINE u16 to_f16(float x) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
INLINE double sqrt64(double x) {
    double r;
    asm("sqrt.rn.f64 %0, %1;" : "=d"(r) : "d"(x));
    return r;
}
// To the nearest integer, ties to even.
INLINE float round_even(float x) {
    float r;
    asm("cvt.rni.f32.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// 2^23 + byte `i` of `word`: the byte in the lowest bits of its mantissa.
INLINE float above_8388608(u32 word, i32 i) {
    float r;
    asm("prmt.b32 %0, %1, 0x4b000000, %2;" : "=f"(r) : "r"(word), "r"(0x7440 | i));
    return r;
}
// Four bytes of a (0 to 3) and b (4 to 7), the lowest named by the lowest four bits of BYTES.
template <u32 BYTES> INLINE u32 pick(u32 a, u32 b) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "n"(BYTES));
    return r;
}
// The same number, which the compiler does not know to be the same.
INLINE i32 anew(i32 x) {
    asm volatile("mov.b32 %0, %0;" : "+r"(x));
    return x;
}
// Adds and gives what was there before.
INLINE u32 add_atomically(u32 *at, u32 value) {
    u32 r;
    asm volatile("atom.global.add.u32 %0, [%1], %2;" : "=r"(r) : "l"(at), "r"(value) : "memory");
    return r;
}
// What this thread has written is seen by whoever sees what it writes later; what it reads later is no older.
INLINE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// c + a.low16 * b.byte0 + a.high16 * b.byte1, all signed; `high`: bytes 2 and 3.
INLINE i32 dot_low(u32 a, u32 b, i32 c) {
    i32 r;
    asm("dp2a.lo.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
INLINE i32 dot_high(u32 a, u32 b, i32 c) {
    i32 r;
    asm("dp2a.hi.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
#endif

// Loaded and stored as one; of an address that is a multiple of their size.
typedef float Four __attribute__((vector_size(16)));
typedef float Two __attribute__((vector_size(8)));

// As `fma_`, and no block of text to the compiler: for loops that are written out, whose PTX is a third as long.
INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

INLINE float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
INLINE float from_bf16(u16 bits) { return as_float((u32)bits << 16); }
INLINE u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }
// Finite numbers; ties to even.
INLINE u16 to_bf16(float x) {
    u32 bits = bits_of(x);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
INLINE float max_(float a, float b) { return a > b ? a : b; }
INLINE float min_(float a, float b) { return a < b ? a : b; }

// e^x: 2^n times the series of the rest to degree 7, |rest| <= ln 2 / 2, whose next term is about 5e-9.
INLINE float exp_(float x) {
    if (x != x) return x;
    if (x > 88.72283f) return as_float(0x7f800000u);
    if (x < -103.97208f) return 0.0f;
    float n = floor_(x * 1.44269504f + 0.5f);
    float r = fma_(n, -0.693145752f, x);
    r = fma_(n, -1.42860677e-6f, r);
    float p = 1.984127e-4f;
    p = fma_(p, r, 1.3888889e-3f);
    p = fma_(p, r, 8.3333333e-3f);
    p = fma_(p, r, 4.1666668e-2f);
    p = fma_(p, r, 1.6666667e-1f);
    p = fma_(p, r, 0.5f);
    p = fma_(p, r, 1.0f);
    p = fma_(p, r, 1.0f);
    i32 e = (i32)n;
    i32 half = e / 2; // in two steps, so that subnormal results round once
    return p * as_float((u32)(half + 127) << 23) * as_float((u32)(e - half + 127) << 23);
}

// tanh x: 1 - 2 / (e^2x + 1), and its series near 0.
INLINE float tanh_(float x) {
    float a = x < 0 ? -x : x;
    if (a < 0.2f) {
        float s = x * x;
        float p = fma_(s, 0.02186949f, -0.05396825f);
        p = fma_(p, s, 0.13333334f);
        p = fma_(p, s, -0.33333334f);
        return fma_(p * s, x, x);
    }
    float t = a > 10.0f ? 1.0f : 1.0f - 2.0f / (exp_(2.0f * a) + 1.0f);
    return x < 0 ? -t : t;
}

// erf x: its power series below 2, and above it 1 - e^(-x^2) / sqrt(pi) over the continued fraction of erfc
// (Abramowitz and Stegun, 7.1.5 and 7.1.14).
INLINE float erf_(float x) {
    float a = x < 0 ? -x : x;
    if (x != x) return x;
    float y;
    if (a < 2.0f) {
        float s = a * a, term = a, sum = a;
        for (i32 i = 1; i < 26; i++) {
            term = -term * s / (float)i;
            sum += term / (float)(2 * i + 1);
        }
        y = sum * 1.12837917f;
    } else if (a < 4.0f) {
        float f = a;
        for (i32 i = 24; i > 0; i--) f = a + 0.5f * (float)i / f;
        y = 1.0f - exp_(-a * a) * 0.564189584f / f;
    } else {
        y = 1.0f;
    }
    return x < 0 ? -y : y;
}

// Sum over the 32 threads of a warp, the same in each: a fixed tree.
INLINE float warp_sum(float v) {
    for (i32 lane = 16; lane > 0; lane >>= 1) v += shuffle_xor(v, lane);
    return v;
}
INLINE float warp_max(float v) {
    for (i32 lane = 16; lane > 0; lane >>= 1) v = max_(v, shuffle_xor(v, lane));
    return v;
}

// Over a block of a multiple of 32 threads, at most 1024; `scratch` (32) is shared and free again afterwards.
INLINE float block_sum(float v, float *scratch) {
    v = warp_sum(v);
    if (thread_x() % 32 == 0) scratch[thread_x() / 32] = v;
    barrier();
    float total = 0.0f;
    for (i32 i = 0; i < threads_x() / 32; i++) total += scratch[i];
    barrier();
    return total;
}
INLINE float block_max(float v, float *scratch) {
    v = warp_max(v);
    if (thread_x() % 32 == 0) scratch[thread_x() / 32] = v;
    barrier();
    float top = scratch[0];
    for (i32 i = 1; i < threads_x() / 32; i++) top = max_(top, scratch[i]);
    barrier();
    return top;
}
