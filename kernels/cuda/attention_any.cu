// softmax(scale q k^T) v for heads of any width up to 1024, a block for each query row and head, keys in chunks of a block's
// threads: slow, for the few widths that attention.cu does not take.
//
//   m' = max(m, scores of the chunk);  l' = l e^(m - m') + sum e^(s - m');  a' = a e^(m - m') + sum e^(s - m') v
//   y  = a / l                                                  (online softmax, Milakov and Gimelshein 2018)
//
// A row sees first the rows of a shared prefix, then those of its own sequence; `spans` says which.
#include "device.cuh"

struct Span { i32 prefix, prefix_rows, own, own_rows; }; // (M): first row and count, in keys and values

extern "C" __global__ void attention_any(float *y /* (M, heads * D) */, const float *q /* (M, heads * D) */,
                                         const float *keys /* (rows, kv * D) */, const float *values /* (rows, kv * D) */,
                                         const Span *spans /* (M) */, i32 heads, i32 kv, i32 d, float scale) {
    __shared__ float query[1024], shares[128], scratch[32];
    i32 row = block_x(), head = block_y(), thread = thread_x(); // 128 threads
    const float *mine = q + ((i64)row * heads + head) * d;
    i32 at = head / (heads / kv) * d, width = kv * d;
    for (i32 i = thread; i < d; i += 128) query[i] = mine[i];
    barrier();
    Span span = spans[row];
    i32 seen = span.prefix_rows + span.own_rows;
    float top = -3.4e38f, total = 0.0f;
    float sums[8]; // columns thread, thread + 128, ... of the result; D <= 1024
    for (i32 i = 0; i < 8; i++) sums[i] = 0.0f;
    for (i32 from = 0; from < seen; from += 128) {
        i32 j = from + thread, count = seen - from < 128 ? seen - from : 128;
        float score = -3.4e38f;
        if (thread < count) {
            i32 r = j < span.prefix_rows ? span.prefix + j : span.own + (j - span.prefix_rows);
            const float *key = keys + (i64)r * width + at;
            float dot = 0.0f;
            for (i32 i = 0; i < d; i++) dot = fma_(query[i], key[i], dot);
            score = dot * scale;
        }
        float higher = max_(top, block_max(score, scratch));
        float share = thread < count ? exp_(score - higher) : 0.0f, keep = exp_(top - higher);
        shares[thread] = share;
        total = total * keep + block_sum(share, scratch); // a barrier stands between writing and reading shares
        for (i32 c = 0; c < 8; c++) {
            i32 column = thread + 128 * c;
            if (column >= d) continue;
            float sum = sums[c] * keep;
            for (i32 i = 0; i < count; i++) {
                i32 p = from + i;
                i32 r = p < span.prefix_rows ? span.prefix + p : span.own + (p - span.prefix_rows);
                sum = fma_(shares[i], values[(i64)r * width + at + column], sum);
            }
            sums[c] = sum;
        }
        top = higher; // the next chunk's maximum has barriers before shares are written again
    }
    for (i32 c = 0; c < 8; c++) {
        i32 column = thread + 128 * c;
        if (column < d) y[((i64)row * heads + head) * d + column] = seen > 0 ? sums[c] / total : 0.0f;
    }
}
