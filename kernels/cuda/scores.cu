// Log-probabilities of wanted tokens, and two models' logits beside each other; a block of 256 threads for a row of logits (V).
// Exponentials and sums are f64, as in `src/tasks/logits.rs`.
//
//   ln p(t) = l_t - ln sum_v e^(l_v)
//   KL      = sum_v p_v (ln p_v - ln q_v),   p the base's, q the candidate's
#include "device.cuh"

INLINE double as_double(u64 bits) { return __builtin_bit_cast(double, bits); }
INLINE double shuffle_xor(double v, i32 lane) {
    u64 bits = __builtin_bit_cast(u64, v);
    u32 low = shuffle_xor((u32)bits, lane), high = shuffle_xor((u32)(bits >> 32), lane);
    return as_double((u64)high << 32 | low);
}
// Over the block, the same in all threads; `scratch` (8) is free again afterwards.
INLINE double block_sum64(double v, double *scratch) {
    for (i32 lane = 16; lane > 0; lane >>= 1) v += shuffle_xor(v, lane);
    if (thread_x() % 32 == 0) scratch[thread_x() / 32] = v;
    barrier();
    double total = 0.0;
    for (i32 i = 0; i < threads_x() / 32; i++) total += scratch[i];
    barrier();
    return total;
}

// e^x for x <= 0: 2^n times the series of the rest to degree 13, whose next term is below 1e-17.
INLINE double exp64(double x) {
    if (x < -708.0) return 0.0;
    double n = (double)(i64)(x * 1.4426950408889634 - 0.5);
    double r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10, sum = 1.0;
    for (i32 i = 13; i > 0; i--) sum = 1.0 + sum * r / (double)i;
    return sum * as_double((u64)((i64)n + 1023) << 52);
}
// ln x for x >= 1: n ln 2 + 2 artanh((m - 1) / (m + 1)), m = x / 2^n between 1/sqrt 2 and sqrt 2.
INLINE double log64(double x) {
    u64 bits = __builtin_bit_cast(u64, x);
    i64 n = (i64)(bits >> 52) - 1023;
    double m = as_double((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
    if (m > 1.4142135623730951) m = m * 0.5, n++;
    double t = (m - 1.0) / (m + 1.0), s = t * t, sum = 0.0;
    for (i32 i = 21; i > 0; i -= 2) sum = sum * s + 1.0 / (double)i;
    return (double)n * 0.6931471805599453 + 2.0 * t * sum;
}

struct Top { float value; i32 at; };

// The largest of a row and the first place it stands, NaN when one is not finite. The same in all threads.
INLINE Top largest(const float *row, i32 v, float *values, i32 *places, i32 *broken) {
    Top top = {-3.4028235e38f, 0x7fffffff};
    u32 worst = 0;
    for (i32 i = thread_x(); i < v; i += threads_x()) {
        u32 magnitude = bits_of(row[i]) & 0x7fffffffu;
        worst = worst > magnitude ? worst : magnitude;
        if (row[i] > top.value || top.at == 0x7fffffff) top.value = row[i], top.at = i;
    }
    for (i32 lane = 16; lane > 0; lane >>= 1) {
        u32 other = shuffle_xor(worst, lane);
        worst = worst > other ? worst : other;
        float value = shuffle_xor(top.value, lane);
        i32 at = (i32)shuffle_xor((u32)top.at, lane);
        if (value > top.value || (value == top.value && at < top.at)) top.value = value, top.at = at;
    }
    if (thread_x() % 32 == 0) {
        values[thread_x() / 32] = top.value;
        places[thread_x() / 32] = top.at;
        broken[thread_x() / 32] = worst >= 0x7f800000u;
    }
    barrier();
    bool any = false;
    for (i32 i = 0; i < threads_x() / 32; i++) {
        any = any || broken[i];
        if (values[i] > top.value || (values[i] == top.value && places[i] < top.at)) top.value = values[i], top.at = places[i];
    }
    barrier();
    if (any) top.value = as_float(0x7fc00000u);
    return top;
}

INLINE double log_sum(const float *row, i32 v, float top, double *scratch) {
    double sum = 0.0;
    for (i32 i = thread_x(); i < v; i += threads_x()) sum += exp64((double)row[i] - (double)top);
    return (double)top + log64(block_sum64(sum, scratch));
}

// ln p of the tokens wanted of each row; NaN where a logit of the row is not finite.
extern "C" __global__ void log_p(double *y /* (starts[M]) */, const float *logits /* (M, V) */, const i32 *starts /* (M + 1) */,
                                 const u32 *tokens /* (starts[M]), each below V */, i32 v) {
    __shared__ double scratch[8];
    __shared__ float values[8];
    __shared__ i32 places[8], broken[8];
    const float *row = logits + (i64)block_x() * v;
    i32 from = starts[block_x()], to = starts[block_x() + 1];
    if (from == to) return; // the whole block
    Top top = largest(row, v, values, places, broken);
    double norm = top.value == top.value ? log_sum(row, v, top.value, scratch) : as_double(0x7ff8000000000000ull);
    for (i32 i = from + thread_x(); i < to; i += threads_x()) y[i] = (double)row[tokens[i]] - norm;
}

// Of each row: KL of the candidate from the base in nats, the change of the target's probability, and whether both have the same
// most likely token (1 or 0); three NaN where a logit is not finite. Stored log-probabilities may stand for the base's logits.
extern "C" __global__ void divergence(double *y /* (M, 3) */, const float *base /* (M, V) */, const float *candidate /* (M, V) */,
                                      const u32 *targets /* (M) */, i32 v /* a target beyond it: NaN */) {
    __shared__ double scratch[8];
    __shared__ float values[8];
    __shared__ i32 places[8], broken[8];
    const float *b = base + (i64)block_x() * v, *c = candidate + (i64)block_x() * v;
    Top base_top = largest(b, v, values, places, broken), top = largest(c, v, values, places, broken);
    double kl = as_double(0x7ff8000000000000ull), delta = kl, agreed = kl;
    u32 target = targets[block_x()];
    if (base_top.value == base_top.value && top.value == top.value && target < (u32)v) {
        double base_norm = log_sum(b, v, base_top.value, scratch), norm = log_sum(c, v, top.value, scratch), sum = 0.0;
        for (i32 i = thread_x(); i < v; i += threads_x()) {
            double ln_p = (double)b[i] - base_norm;
            sum += exp64(ln_p) * (ln_p - ((double)c[i] - norm));
        }
        kl = block_sum64(sum, scratch);
        if (kl < 0.0) kl = 0.0; // rounding may leave equal distributions a hair below
        delta = exp64((double)c[target] - norm) - exp64((double)b[target] - base_norm);
        agreed = base_top.at == top.at ? 1.0 : 0.0;
    }
    if (thread_x() == 0) {
        y[3 * (i64)block_x()] = kl;
        y[3 * (i64)block_x() + 1] = delta;
        y[3 * (i64)block_x() + 2] = agreed;
    }
}
