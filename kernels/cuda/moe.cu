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

// Sum over a block of 256 threads; `scratch` (8) is shared and free again afterwards.
INLINE i32 block_count(i32 v, i32 *scratch) {
    for (i32 lane = 16; lane > 0; lane >>= 1) v += (i32)shuffle_xor((u32)v, lane);
    if (thread_x() % 32 == 0) scratch[thread_x() / 32] = v;
    barrier();
    i32 total = 0;
    for (i32 i = 0; i < 8; i++) total += scratch[i];
    barrier();
    return total;
}

// How many entries each expert has, a block of 256 threads for each.
extern "C" __global__ void count_entries(i32 *counts /* (E) */, const i32 *chosen /* (entries) */, i32 entries) {
    __shared__ i32 scratch[8];
    i32 here = 0, expert = block_x();
    for (i32 i = thread_x(); i < entries; i += 256) here += chosen[i] == expert;
    here = block_count(here, scratch);
    if (thread_x() == 0) counts[expert] = here;
}

// Entries grouped by expert, a block of 256 threads for each, of which each looks at a run of entries. `tiles` are runs of at most
// `size` entries of one expert.
extern "C" __global__ void group_entries(i32 *grouped /* (entries): the entry at each place */, i32 *place /* (entries): its inverse */,
                                         i32 *starts /* (E + 1) */, ExpertTile *tiles /* (count) */, const i32 *chosen /* (entries) */,
                                         const i32 *counts /* (E) */, i32 entries, i32 experts, i32 count, i32 size) {
    __shared__ i32 scratch[8], before[256];
    i32 thread = thread_x(), expert = block_x(), start = 0, tile = 0, here = 0;
    for (i32 e = thread; e < expert; e += 256) start += counts[e], tile += (counts[e] + size - 1) / size;
    start = block_count(start, scratch), tile = block_count(tile, scratch);
    i32 run = (entries + 255) / 256, from = thread * run, end = from + run < entries ? from + run : entries;
    for (i32 i = from; i < end; i++) here += chosen[i] == expert;
    before[thread] = here;
    barrier();
    i32 at = start;
    for (i32 i = 0; i < thread; i++) at += before[i];
    for (i32 i = from; i < end; i++)
        if (chosen[i] == expert) grouped[at] = i, place[i] = at++;
    i32 all = counts[expert], mine = (all + size - 1) / size;
    for (i32 i = thread; i < mine; i += 256) tiles[tile + i].expert = expert, tiles[tile + i].first = start + i * size;
    if (thread == 0) starts[expert] = start;
    if (expert + 1 < experts) return;
    if (thread == 0) starts[experts] = start + all;
    for (i32 i = tile + mine + thread; i < count; i += 256) tiles[i].expert = -1;
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
