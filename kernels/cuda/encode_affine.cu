// Codes, scales and zero points of affine schemes, the same bytes as `calib/rtn.rs` and `calib/clip.rs`: a block for each
// group of `len` columns.
//
//   spanning scale   symmetric: max|w| / steps          zero point: max / top - min / top, zero = rne(-min / scale)
//   search           minimise over (scale, zero)  sum_k d_k (w_k - (clamp(rne(w_k / scale) + zero, lo, hi) - zero) * scale)^2
//                    d_k how much column k counts, or 1
//   code             clamp(rne(w * (1 / scale)) + zero, lo, hi)
//
// Scales are rounded to their stored type before they are priced. An error is summed by 16 lanes, lane l taking columns l,
// l + 16, ... in order, and a tree (8, 4, 2, 1): the order of `kernels/cpu/clip.rs`. Ties go to the earlier candidate.
#include "weight.cuh"

// Mirrors `AffineArgs` in encode.rs, field by field.
struct AffineJob {
    i32 groups, len;  // of a row; columns of a group
    i32 low, high;    // codes
    i32 zero;         // the fixed zero point, or -1 when one a group is chosen
    i32 scale;        // of `Form`: the type scales are stored in
    i32 coarse, fine; // factors of the first sweep, none for plain rounding, and of the second
    i32 reach, near;  // zero points tried to both sides, in the first sweep and in the second
    float steps;      // between zero and the largest magnitude, on a symmetric grid
    i32 form;         // of `Form`: the type of the weights
    i32 weighted;     // whether columns count differently
};

struct Choice { float scale; i32 zero; };

INLINE float stored(float scale, i32 form) {
    float least = form == F16 ? 5.9604645e-8f : 1.17549435e-38f; // 2^-24, 2^-126: reciprocals are finite
    scale = max_(scale, least);
    if (form == F32) return scale;
    return form == F16 ? from_f16(to_f16(scale)) : from_bf16(to_bf16(scale));
}

// Candidate `slot` of a sweep: a factor of `span`, and a zero point. False when there is none.
INLINE bool candidate(const AffineJob &job, float span, float factor, i32 offset, float min, float max, Choice *out) {
    out->scale = stored(span * factor, job.scale);
    out->zero = job.zero;
    if (out->scale > 3.4028235e38f) return false;
    if (job.zero >= 0) return true;
    float low = (float)job.low, high = (float)job.high;
    float zero = round_even((low + high) / 2.0f - (min / out->scale + max / out->scale) / 2.0f) + (float)offset;
    if (!(zero >= low && zero <= high)) return false;
    out->zero = (i32)zero;
    return true;
}

// The squared error of a group, the same in the 16 threads that sum it; all 32 threads of the warp must be here.
INLINE float price(const AffineJob &job, const u8 *x, i64 at, const float *counts, Choice choice) {
    float inverse = 1.0f / choice.scale, low = (float)(job.low - choice.zero), high = (float)(job.high - choice.zero), sum = 0.0f;
    for (i32 k = thread_x() % 16; k < job.len; k += 16) {
        float w = float_at(x, job.form, at + k);
        float error = w - min_(max_(round_even(w * inverse), low), high) * choice.scale;
        float square = error * error;
        sum += job.weighted ? square * counts[k] : square;
    }
    for (i32 lane = 8; lane > 0; lane >>= 1) sum += shuffle_xor(sum, lane);
    return sum;
}

INLINE u64 cheaper(u64 a, u64 b) { return a < b ? a : b; }

// The cheapest candidate of a sweep: its error's bits and its slot, which order as the CPU's search does. Slot 0 is `first`
// when `keep` says so.
INLINE u64 sweep(const AffineJob &job, const u8 *x, i64 at, const float *counts, const float *factors, i32 count, i32 reach,
                 float span, float min, float max, Choice first, i32 keep, u64 *scratch) {
    i32 width = job.zero >= 0 ? 1 : 2 * reach + 1, slots = keep + count * width, teams = threads_x() / 16;
    u64 best = ~0ull;
    for (i32 from = 0; from < slots; from += teams) { // the same turns for all threads, as they sum together
        i32 slot = from + thread_x() / 16, i = (slot - keep) / width, offset = (slot - keep) % width - (job.zero >= 0 ? 0 : reach);
        Choice choice = first;
        bool there = slot < slots;
        if (there && slot >= keep) there = candidate(job, span, factors[i], offset, min, max, &choice);
        if (!there) choice.scale = 1.0f, choice.zero = 0;
        u64 error = bits_of(price(job, x, at, counts, choice));
        if (there) best = cheaper(best, error << 32 | (u32)slot);
    }
    if (thread_x() % 16 == 0) scratch[thread_x() / 16] = best;
    barrier();
    for (i32 i = 0; i < teams; i++) best = cheaper(best, scratch[i]);
    barrier();
    return best;
}

extern "C" __global__ void encode_affine(u8 *codes /* (N, K) */, float *scales /* (N, G) */, u8 *zeros /* (N, G) */,
                                         float *extents /* (N, G) */, float *errors /* (N, G): of the search's choice */,
                                         const u8 *x /* (N, K) */, const float *factors /* (coarse + fine) */,
                                         const float *importance /* (K) if columns count differently */, AffineJob job) {
    __shared__ u64 scratch[64];
    __shared__ float tops[32], bottoms[32];
    i64 at = (i64)block_x() * job.len;
    const float *counts = job.weighted ? importance + block_x() % job.groups * job.len : importance;
    // Magnitudes as bits, so that whatever is not finite is the largest; the least and the greatest, with zero among them.
    u32 extent = 0;
    float min = 0.0f, max = 0.0f;
    for (i32 k = thread_x(); k < job.len; k += threads_x()) {
        float w = float_at(x, job.form, at + k);
        u32 magnitude = bits_of(w) & 0x7fffffffu;
        extent = extent > magnitude ? extent : magnitude;
        min = min_(w, min);
        max = max_(w, max);
    }
    for (i32 lane = 16; lane > 0; lane >>= 1) {
        u32 other = shuffle_xor(extent, lane);
        extent = extent > other ? extent : other;
        min = min_(shuffle_xor(min, lane), min);
        max = max_(shuffle_xor(max, lane), max);
    }
    if (thread_x() % 32 == 0) {
        scratch[thread_x() / 32] = extent;
        bottoms[thread_x() / 32] = min;
        tops[thread_x() / 32] = max;
    }
    barrier();
    for (i32 i = 0; i < threads_x() / 32; i++) {
        extent = extent > (u32)scratch[i] ? extent : (u32)scratch[i];
        min = min_(bottoms[i], min);
        max = max_(tops[i], max);
    }
    barrier();
    Choice choice = {1.0f, job.zero >= 0 ? job.zero : 0};
    bool finite = extent < 0x7f800000u;
    float error = 0.0f;
    if (finite && extent > 0) {
        float top = (float)job.high;
        if (job.zero >= 0) max = as_float(extent), min = -max;
        float span = job.zero >= 0 ? max / job.steps : max / top - min / top;
        if (job.coarse == 0) {
            choice.scale = stored(span, job.scale);
            if (job.zero < 0) choice.zero = (i32)min_(max_(round_even(-min / choice.scale), 0.0f), top);
        } else {
            u64 best = sweep(job, x, at, counts, factors, job.coarse, job.reach, span, min, max, choice, 0, scratch);
            choice.scale = as_float(0x7f800000u);
            choice.zero = 0;
            if (best != ~0ull) {
                i32 slot = (i32)(best & 0xffffffffu), width = job.zero >= 0 ? 1 : 2 * job.reach + 1;
                i32 offset = slot % width - (job.zero >= 0 ? 0 : job.reach);
                candidate(job, span, factors[slot / width], offset, min, max, &choice);
                Choice winner = choice;
                best = sweep(job, x, at, counts, factors + job.coarse, job.fine, job.near, winner.scale, min, max, winner, 1, scratch);
                error = as_float((u32)(best >> 32));
                slot = (i32)(best & 0xffffffffu) - 1;
                width = job.zero >= 0 ? 1 : 2 * job.near + 1;
                offset = slot % width - (job.zero >= 0 ? 0 : job.near);
                if (slot >= 0) candidate(job, winner.scale, factors[job.coarse + slot / width], offset, min, max, &choice);
            }
        }
    }
    if (thread_x() == 0) {
        scales[block_x()] = choice.scale;
        zeros[block_x()] = (u8)choice.zero;
        extents[block_x()] = as_float(extent);
        errors[block_x()] = error;
    }
    if (!finite || choice.scale > 3.4028235e38f) return; // the whole block; the host says what is wrong
    float inverse = 1.0f / choice.scale, low = (float)(job.low - choice.zero), high = (float)(job.high - choice.zero);
    for (i32 k = thread_x(); k < job.len; k += threads_x()) {
        float step = min_(max_(float_at(x, job.form, at + k) * inverse, low), high);
        codes[at + k] = (u8)((i32)round_even(step) + choice.zero);
    }
}
