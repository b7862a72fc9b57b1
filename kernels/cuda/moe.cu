// Routed experts: tokens choose some of E gated MLPs, are grouped by expert, multiplied group by group, and added up.
//
//   p      = softmax(logits)                                          chosen: the `top` experts of largest p + bias, lower number first
//   weight = p_e / max(sum of the chosen p, least)                    y += sum over chosen e, e rising, of weight_e * mlp_e(x)
//
// An entry is a token with one of its experts: number row * top + j, its experts rising. Grouped, entries stand expert after
// expert, tokens rising. All of it is the same in every run.
#include "experts.cuh"
#include "weight.cuh"

// The choice of each token: a warp for a row of logits, of at most 1024 experts.
extern "C" __global__ void route(i32 *chosen /* (M, top) */, float *weights /* (M, top) */, const float *logits /* (M, E) */,
                                 const float *bias /* (E) */, i32 experts, i32 top, float least) {
    __shared__ float p[1024], scores[1024];
    const float *row = logits + (i64)block_x() * experts;
    i32 lane = thread_x(); // 32 threads
    float most = -3.4028235e38f, total = 0.0f, sum = 0.0f;
    for (i32 e = lane; e < experts; e += 32) most = max_(row[e], most);
    most = warp_max(most);
    for (i32 e = lane; e < experts; e += 32) {
        p[e] = exp_(row[e] - most);
        total += p[e];
    }
    total = warp_sum(total);
    for (i32 e = lane; e < experts; e += 32) {
        p[e] = p[e] / total;
        scores[e] = p[e] + bias[e];
    }
    barrier();
    i32 *mine = chosen + (i64)block_x() * top;
    for (i32 j = 0; j < top; j++) {
        float best = -3.4028235e38f;
        i32 at = 0x7fffffff;
        for (i32 e = lane; e < experts; e += 32)
            if (scores[e] > best || (scores[e] == best && e < at)) best = scores[e], at = e;
        for (i32 other = 16; other > 0; other >>= 1) {
            float score = shuffle_xor(best, other);
            i32 e = (i32)shuffle_xor((u32)at, other);
            if (score > best || (score == best && e < at)) best = score, at = e;
        }
        if (at >= experts) at = j; // nothing to choose from: every score is NaN
        sum += p[at];
        barrier();
        if (lane == 0) {
            scores[at] = -as_float(0x7f800000u);
            i32 place = j; // experts rising
            while (place > 0 && mine[place - 1] > at) mine[place] = mine[place - 1], place--;
            mine[place] = at;
        }
        barrier();
    }
    for (i32 j = lane; j < top; j += 32) weights[(i64)block_x() * top + j] = p[mine[j]] / max_(sum, least);
}

// Entries grouped by expert, in one block; a thread an expert. `tiles` are runs of at most `size` entries of one expert.
extern "C" __global__ void group_entries(i32 *grouped /* (entries): the entry at each place */, i32 *place /* (entries): its inverse */,
                                         i32 *starts /* (E + 1) */, ExpertTile *tiles /* (count) */, const i32 *chosen /* (entries) */,
                                         i32 entries, i32 experts, i32 count, i32 size) {
    for (i32 e = thread_x(); e < experts; e += threads_x()) {
        i32 here = 0;
        for (i32 i = 0; i < entries; i++) here += chosen[i] == e;
        starts[e + 1] = here;
    }
    barrier();
    if (thread_x() == 0) {
        i32 tile = 0;
        starts[0] = 0;
        for (i32 e = 0; e < experts; e++) {
            i32 here = starts[e + 1];
            for (i32 first = 0; first < here; first += size) {
                tiles[tile].expert = e;
                tiles[tile++].first = starts[e] + first;
            }
            starts[e + 1] = starts[e] + here;
        }
        for (; tile < count; tile++) tiles[tile].expert = -1;
    }
    barrier();
    for (i32 e = thread_x(); e < experts; e += threads_x()) {
        i32 at = starts[e];
        for (i32 i = 0; i < entries; i++)
            if (chosen[i] == e) grouped[at] = i, place[i] = at++;
    }
}

// y (entries, N) = rows of x times the transpose of their expert's weight (N, K). Row of x of the entry at place i: the token of
// entry grouped[i], or i itself when `top` is 0. Tiles of 64 x 64 in f32, as `gemm`; of experts `first`... before `last`, the only
// ones whose weights are there.
extern "C" __global__ void gemm_grouped(float *y /* (entries, N) */, const float *x /* (M or entries, K) */,
                                        const Weight *experts /* first ... last - 1 */,
                                        const ExpertTile *tiles /* (count) */, const i32 *starts /* (E + 1) */, const i32 *grouped /* (entries) */,
                                        i32 top, i32 first, i32 last) {
    __shared__ float left[16][64 + 4], right[16][64 + 4]; // (k, row)
    ExpertTile tile = tiles[block_y()];
    if (tile.expert < first || tile.expert >= last) return; // the whole block
    const Weight w = experts[tile.expert - first];
    i32 end = starts[tile.expert + 1], column = block_x() * 64;
    i32 ty = thread_x() / 16, tx = thread_x() % 16; // 256 threads
    float sums[4][4];
    UNROLL for (i32 i = 0; i < 4; i++)
        UNROLL for (i32 j = 0; j < 4; j++) sums[i][j] = 0.0f;
    for (i32 k0 = 0; k0 < w.k; k0 += 16) {
        for (i32 i = thread_x(); i < 16 * 64; i += 256) {
            i32 k = i % 16, r = i / 16, at = tile.first + r;
            bool inside = k0 + k < w.k;
            i64 from = at < end ? (top > 0 ? grouped[at] / top : at) : 0;
            left[k][r] = inside && at < end ? x[from * w.k + k0 + k] : 0.0f;
            right[k][r] = inside && column + r < w.n ? weight_at(w, column + r, k0 + k) : 0.0f;
        }
        barrier();
        for (i32 k = 0; k < 16; k++)
            UNROLL for (i32 i = 0; i < 4; i++)
                UNROLL for (i32 j = 0; j < 4; j++) sums[i][j] = fma_(left[k][ty * 4 + i], right[k][tx * 4 + j], sums[i][j]);
        barrier();
    }
    UNROLL for (i32 i = 0; i < 4; i++)
        UNROLL for (i32 j = 0; j < 4; j++) {
            i32 at = tile.first + ty * 4 + i, n = column + tx * 4 + j;
            if (at < end && n < w.n) y[(i64)at * w.n + n] = sums[i][j];
        }
}

// into (M, K) += each token's entries times their weights, experts rising.
extern "C" __global__ void combine(float *into /* (M, K) */, const float *y /* (entries, K) */, const i32 *place /* (M, top) */,
                                   const float *weights /* (M, top) */, i32 top, i32 k) {
    for (i32 c = thread_x(); c < k; c += threads_x()) {
        float sum = into[(i64)block_x() * k + c];
        for (i32 j = 0; j < top; j++) {
            i64 entry = (i64)block_x() * top + j;
            sum += weights[entry] * y[(i64)place[entry] * k + c];
        }
        into[(i64)block_x() * k + c] = sum;
    }
}
