// The innermost part of products in f32: a block of 256 threads has 128 x 128 outputs, a warp 32 x 64, a thread 8 x 8. Both sides lie in
// shared memory, a row for each of the columns that are multiplied, so that a thread reads four neighbours at a time and the eight
// threads that read others do so from other banks.
#pragma once
#include "device.cuh"

enum { EXACT_TILE = 128, EXACT_SLICE = 16, EXACT_PITCH = 132 };

// A thread's rows of a tile: four from here, and four from 16 further; its columns, and those 32 further.
INLINE i32 first_row(i32 t) { return t / 32 % 4 * 32 + t % 32 / 8 * 4; }
INLINE i32 first_column(i32 t) { return t / 128 * 64 + t % 8 * 4; }

// Adds the products of eight columns.
INLINE void multiply_half(float (&sums)[8][8], const float *left, const float *right) {
    UNROLL for (i32 c = 0; c < 8; c++) {
        Four a[2], b[2];
        UNROLL for (i32 i = 0; i < 2; i++) {
            a[i] = *(const Four *)(left + c * EXACT_PITCH + 16 * i);
            b[i] = *(const Four *)(right + c * EXACT_PITCH + 32 * i);
        }
        UNROLL for (i32 i = 0; i < 8; i++)
            UNROLL for (i32 j = 0; j < 8; j++) sums[i][j] = fused(a[i / 4][i % 4], b[j / 4][j % 4], sums[i][j]);
    }
}
