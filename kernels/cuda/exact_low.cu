// The products of exact_gemm.cuh where they have few outputs, which its tiles would leave to a few multiprocessors: a block of 256
// threads computes 32 x 32 outputs, 2 x 2 a thread, over slices of 64 input columns. The sums are the same.
#include "exact_gemm.cuh"

// A slice lies as eight runs of 8 columns, of 32 (and 4) numbers each, every run 4 banks further than the one before.
enum { LOW_TILE = 32, LOW_SLICE = 64, LOW_PITCH = 36, LOW_RUN = 8 * LOW_PITCH + 4 };

template <i32 FORM, i32 BITS> INLINE void exact_low(float *y, const float *x, const Weight &w, i32 m) {
    __shared__ __attribute__((aligned(16))) float low_sides[2][2][8 * LOW_RUN];
    __shared__ float levels[16];
    const bool WHOLE = FORM != WINT25;
    if (FORM == NF4 && thread_x() < 16) levels[thread_x()] = nf4_level(thread_x());
    barrier();
    i32 t = thread_x(), run = t % 8, row = block_y() * LOW_TILE, column = block_x() * LOW_TILE, place = run * LOW_RUN + t / 8;
    // Rows and columns beyond the end are others again, whose outputs nobody takes.
    i32 r = row + t / 8 < m ? row + t / 8 : m - 1, n = column + t / 8 < w.n ? column + t / 8 : w.n - 1;
    i32 my_row = t / 16 * 2, my_column = t % 16 * 2, now = 1;
    float sums[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
    KEEP_LOOP for (i32 k = -LOW_SLICE; k < w.k; k += LOW_SLICE) { // at first there is nothing to multiply yet
        now ^= 1;
        i32 next = k + LOW_SLICE + 8 * run;
        Piece left, right;
        fetch_left(left, x + (i64)r * w.k, next, w.k, WHOLE);
        if constexpr (WHOLE) fetch_right<FORM, BITS>(right, w, n, next);
        KEEP_LOOP for (i32 j = 0; j < 8 && k >= 0; j++) {
            const float *a_side = low_sides[now][0] + j * LOW_RUN + my_row, *b_side = low_sides[now][1] + j * LOW_RUN + my_column;
            UNROLL for (i32 c = 0; c < 8; c++) {
                Two a = *(const Two *)(a_side + c * LOW_PITCH), b = *(const Two *)(b_side + c * LOW_PITCH);
                UNROLL for (i32 i = 0; i < 2; i++)
                    UNROLL for (i32 e = 0; e < 2; e++) sums[i][e] = fused(a[i], b[e], sums[i][e]);
            }
        }
        float *to = low_sides[now ^ 1][0] + place, *to_right = low_sides[now ^ 1][1] + place; // read by nobody since the barrier before
        store_plain<LOW_PITCH>(to, left);
        if constexpr (WHOLE) store_right<FORM, BITS, LOW_PITCH>(to_right, right, w, n, next, levels);
        else decode_right<LOW_PITCH>(to_right, w, n, next);
        barrier();
    }
    UNROLL for (i32 i = 0; i < 2; i++)
        UNROLL for (i32 e = 0; e < 2; e++) {
            i32 to_row = row + my_row + i, to_column = column + my_column + e;
            if (to_row < m && to_column < w.n) y[(i64)to_row * w.n + to_column] = sums[i][e];
        }
}

#define LOW(name, FORM, BITS)                                                                                                         \
    extern "C" __global__ void name(float *y /* (M, N) */, const float *x /* (M, K) */, Weight w, i32 m) {                            \
        exact_low<FORM, BITS>(y, x, w, m);                                                                                            \
    }
LOW(exact_low_any, WINT25, 0)
LOW(exact_low_f32, F32, 0)
LOW(exact_low_bf16, BF16, 0)
LOW(exact_low_int8, AFFINE, 8)
LOW(exact_low_int4, AFFINE, 4)
LOW(exact_low_wint2, WINT2, 0)
LOW(exact_low_nf4, NF4, 0)
