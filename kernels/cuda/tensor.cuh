// Tensor cores and asynchronous copies, as PTX has them since sm_80. `host/tensor.h` stands in for them on the processor.
//
// A warp multiplies A (16 x 16, bf16) by B (16 x 8, bf16) into C (16 x 8, f32): `mma.sync.m16n8k16`. Thread t holds, two to a
// register, low half first:
//
//   A  rows t/4 and t/4 + 8, columns 2 (t%4) and 2 (t%4) + 8, in the order (row, column), (row + 8, column), (row, column + 8), ...
//   B  column t/4, rows 2 (t%4) and 2 (t%4) + 8
//   C  rows t/4 and t/4 + 8, columns 2 (t%4) and the next
//
// `load_matrices` brings four 8 x 8 matrices of 16-bit values from shared memory into that form (`ldmatrix.x4`): thread t
// names the 16 bytes of row t%8 of matrix t/8. `load_transposed` does so with each matrix transposed.
#pragma once
#include "device.cuh"

#ifndef HOST_SHIM
INLINE u32 shared_address(const void *p) { return (u32)(u64)(__attribute__((address_space(3))) const void *)p; }
INLINE void load_matrices(u32 *r /* (4) */, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
INLINE void load_transposed(u32 *r /* (4) */, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
INLINE void multiply_add(float *c /* (4) */, const u32 *a /* (4) */, const u32 *b /* (2) */) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with f16.
INLINE void multiply_add_f16(float *c /* (4) */, const u32 *a /* (4) */, const u32 *b /* (2) */) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Starts a copy of 16 or 8 bytes to shared memory, of which the first `bytes` are read and the others become zero. Both ends
// are aligned to its size.
INLINE void copy_16(void *to, const void *from, i32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
INLINE void copy_8(void *to, const void *from, i32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
// Closes a group of copies; `wait_copies<N>` waits until all but the last N of this thread's groups are there. Others see
// them after a barrier.
INLINE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <i32 N> INLINE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// Two numbers rounded to bf16, ties to even, the first in the low half.
INLINE u32 pair_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// The same of f16, and sums of such pairs, half by half.
INLINE u32 pair_f16(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// 1024 plus those bits of each half that MASK has, of the lowest ten: they are the lowest of its mantissa.
template <u32 MASK> INLINE u32 above_1024(u32 x) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "n"(MASK * 0x00010001u), "r"(0x64006400u));
    return r;
}
INLINE u32 add_halves(u32 a, u32 b) {
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
INLINE u32 fma_halves(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
extern __shared__ __attribute__((aligned(128))) u8 shared_bytes[]; // as many as the launch asks for
#else
#include "host/tensor.h"
#endif

// Row and column of tile number `number` on and above the diagonal of `tiles` x `tiles`, row after row.
INLINE void tile_of(i32 number, i32 tiles, i32 *row, i32 *column) {
    i32 r = 0;
    while (number >= tiles - r) number -= tiles - r, r++;
    *row = r;
    *column = r + number;
}
