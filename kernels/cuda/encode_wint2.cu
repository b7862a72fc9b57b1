// WINT2 (CCQ) codes, local scales, super scales and pairs, the same bytes as the encoder of `calib/ccq.rs`: a block of 256
// threads for a row, 16 threads for a group, a thread for a vector of four weights.
//
//   minimise  sum_k d_k (x_k - window(byte, k mod 4) * local * super)^2     over bytes, locals (4 bits), super (bf16) and pair
//   score     512 c.X - 16384 c.c + 255 - byte,   X = rne(64 x / scale)      in integers: the largest names the byte
//             512 c.Y - 256 c^2.W + 255 - byte,   Y = rne(a d x / scale), W = rne(a d)     where columns count d_k
//             a = min(511 / max W, 24575 / max |Y|) of the vector
//
// Real-valued scales are found under the first pair's codebook, pairs race on growing parts of the row, and the winners get a
// super scale, local scales and codes. Floats are added in the CPU's order, in f32 and f64 where it does so; nothing is fused.
#include "wint2_search.cuh"

// Mirrors `Wint2Args` in encode.rs, field by field.
struct Wint2Job {
    i32 n, k;        // k a multiple of 64
    i32 form;        // of `Form`: the type of the weights
    i32 step;        // groups are visited in steps of this, coprime to their number
    i32 refine;      // whether scales walk from their first guess
    i32 finalists, supers, rounds;
    i32 heats;       // at most 3; each with
    i32 pairs[3];    //   pairs that enter
    i32 parts[3];    //   one over the part of the groups that judges them
    i32 tried[3];    //   scales tried: the first of `factors`
    float factors[3];
    i32 cells;       // gains a row needs room for
};

INLINE double power_of_two(i32 e) { return __builtin_bit_cast(double, (u64)(e + 1023) << 52); }

// `half`'s conversion of a number of at least zero, which looks at the upper 32 bits only.
INLINE u16 to_bf16_from_f64(double value) {
    u32 x = (u32)(__builtin_bit_cast(u64, value) >> 32), man = x & 0xfffffu;
    i32 e = (i32)(x >> 20) - 1023 + 127;
    if (e >= 255) return 0x7f80;
    if (e <= 0) {
        if (7 - e > 21) return 0;
        man |= 0x100000u;
        u32 bit = 1u << (13 - e);
        return (u16)((man >> (14 - e)) + ((man & bit) != 0 && (man & (3 * bit - 1)) != 0));
    }
    return (u16)(((u32)e << 7 | man >> 13) + ((man & 0x1000u) != 0 && (man & 0x2fffu) != 0));
}
INLINE u16 stored_super(float scale, i32 exponent) {
    double real = (double)scale * power_of_two(exponent);
    return to_bf16_from_f64(real < 6.6e35 ? real : 6.6e35);
}
INLINE float storable(float scale, i32 exponent) {
    return (float)((double)from_bf16(stored_super(scale, exponent)) * power_of_two(-exponent));
}
// Orders doubles as Rust's `total_cmp`.
INLINE i64 total(double x) {
    i64 bits = __builtin_bit_cast(i64, x);
    return bits < 0 ? bits ^ 0x7fffffffffffffffll : bits;
}
// 1.15^v for -1 <= v <= 1, by the series of e^(v ln 1.15): `step_to_the` of calib/ccq/row.rs.
INLINE float step_to_the(float v) {
    double t = (double)v * 0.13976192164310813, sum = 1.0;
    for (i32 i = 10; i > 0; i--) sum = 1.0 + sum * t / (double)i;
    return (float)sum;
}
INLINE float vertex(float low, float middle, float high) {
    float bend = 2.0f * middle - low - high;
    if (!(bend > 0.0f)) return 0.0f;
    return min_(max_(0.5f * (high - low) / bend, -1.0f), 1.0f);
}

// The local scale nearest to a group's best, and the error beyond the best that it brings, relative to the energy.
INLINE double nearest_local(float wanted, float super, i32 *local) {
    *local = 0;
    if (!(wanted > 0.0f)) return 0.0;
    float floor = floor_(wanted / super);
    i32 below = floor > 15.0f ? 15 : (i32)floor;
    double best = 1.0;
    for (i32 l = below; l <= below + 1; l++) {
        if (l < 1 || l > 15) continue;
        float ratio = (float)l * super / wanted;
        double square = (double)(ratio * ratio), excess = 0.052 * (square + 1.0 / square) - 0.104;
        if (excess < best) best = excess, *local = l;
    }
    return best;
}

// Improves the first guesses by a walk in steps of 15 % and a parabola through the best three.
template <bool WEIGHTED> INLINE void find_scales(const Row &row, const Word *book) {
    const float up_by = 1.15f, down_by = 1.0f / 1.15f;
    for (i32 from = 0; from < row.groups; from += threads_x() / 16) {
        i32 mine = from + thread_x() / 16, g = mine < row.groups ? mine : row.groups - 1;
        float centre = row.scale[g], scales[3] = {centre * down_by, centre * 1.0f, centre * up_by}, three[3];
        i32 codes[3], same[3] = {g, g, g};
        search<WEIGHTED, 3>(row, book, same, scales, codes, three);
        bool walking = true;
        for (i32 walked = 0; walked < 12; walked++) {
            bool up = three[2] > three[1] && three[2] >= three[0], down = three[0] > three[1] && !up;
            walking = walking && (up || down);
            if (!any(walking)) break;
            float factor = up ? up_by : down_by, next = centre * factor, gain, scale = next * factor;
            search<WEIGHTED, 1>(row, book, same, &scale, codes, &gain);
            if (!walking) continue;
            centre = next;
            if (up) three[0] = three[1], three[1] = three[2], three[2] = gain;
            else three[2] = three[1], three[1] = three[0], three[0] = gain;
        }
        if (lane16() == 0 && mine < row.groups) row.scale[g] = centre * step_to_the(vertex(three[0], three[1], three[2]));
    }
    barrier();
}

// The gains of pairs `place[0..pairs]` on groups `judged..judged + len`, each with the best of its scales, into row.cells.
template <bool WEIGHTED>
INLINE void judge(const Row &row, const Wint2Job &job, const Word *books, const i32 *place, i32 pairs, i32 judged, i32 len,
                  i32 tried) {
    i32 fours = (len + 3) / 4, items = tried == 1 ? pairs * fours : pairs * len;
    for (i32 from = 0; from < items; from += threads_x() / 16) {
        i32 mine = from + thread_x() / 16, item = mine < items ? mine : items - 1, codes[4];
        if (tried == 1) {
            i32 pair = item / fours, first = item % fours * 4;
            i32 group[4];
            float scale[4], gains[4];
            UNROLL for (i32 j = 0; j < 4; j++) {
                i32 g = judged + (first + j < len ? first + j : len - 1);
                group[j] = g;
                scale[j] = row.scale[g] * job.factors[0];
            }
            search<WEIGHTED, 4>(row, books + 256 * place[pair], group, scale, codes, gains);
            if (lane16() == 0 && mine < items)
                UNROLL for (i32 j = 0; j < 4; j++)
                    if (first + j < len) row.cells[pair * len + first + j] = max_(gains[j], 0.0f);
        } else {
            i32 pair = item / len, g = judged + item % len, same[3] = {g, g, g};
            float scale[3], gains[3], best = 0.0f;
            UNROLL for (i32 j = 0; j < 3; j++) scale[j] = row.scale[g] * job.factors[j];
            search<WEIGHTED, 3>(row, books + 256 * place[pair], same, scale, codes, gains);
            UNROLL for (i32 j = 0; j < 3; j++) best = j < tried ? max_(gains[j], best) : best;
            if (lane16() == 0 && mine < items) row.cells[pair * len + item % len] = best;
        }
    }
    barrier();
}

// The best local scale of each group and its codes, into encoding NOW. Starts near those of FREE, or else near the group's own
// best scale. Returns the error, the same in all threads.
template <bool WEIGHTED>
INLINE double fit_locals(const Row &row, const Word *book, float super, bool from_free, double energy, double *told) {
    for (i32 from = 0; from < row.groups; from += threads_x() / 16) {
        i32 mine = from + thread_x() / 16, g = mine < row.groups ? mine : row.groups - 1, start, codes[3];
        nearest_local(row.scale[g], super, &start);
        if (from_free) start = locals_of(row, FREE)[g];
        i32 tried[3] = {start, start < 15 ? start + 1 : 15, start > 0 ? start - 1 : 0};
        i32 same[3] = {g, g, g};
        float scale[3], gains[3], best = 0.0f;
        UNROLL for (i32 j = 0; j < 3; j++) scale[j] = (float)tried[j] * super;
        search<WEIGHTED, 3>(row, book, same, scale, codes, gains);
        i32 local = 0, code = 0;
        UNROLL for (i32 j = 0; j < 3; j++)
            if (gains[j] > best) best = gains[j], local = tried[j], code = codes[j];
        i32 direction = local - start;
        direction = direction > 0 ? 1 : direction < 0 ? -1 : 0;
        bool walking = best > 0.0f && direction != 0;
        for (;;) { // on where the best lies at an end of the three
            i32 next = local + direction;
            walking = walking && next >= 1 && next <= 15;
            if (!any(walking)) break;
            float gain, at = (float)next * super;
            i32 found;
            search<WEIGHTED, 1>(row, book, same, &at, &found, &gain);
            walking = walking && gain > best;
            if (walking) best = gain, local = next, code = found;
        }
        if (mine < row.groups) {
            codes_of(row, NOW)[16 * g + lane16()] = (u8)code;
            if (lane16() == 0) locals_of(row, NOW)[g] = (u8)local, row.gain[g] = best;
        }
    }
    barrier();
    if (thread_x() == 0) {
        double gained = 0.0;
        for (i32 g = 0; g < row.groups; g++) gained += (double)row.gain[g];
        *told = energy - gained;
    }
    barrier();
    double error = *told;
    barrier();
    return error;
}

// The super scale of least error for encoding FREE, `super` when there is none. The same in all threads.
template <bool WEIGHTED> INLINE float least_squares(const Row &row, const Word *book, float super, float *told) {
    for (i32 from = 0; from < row.groups; from += threads_x() / 16) {
        i32 mine = from + thread_x() / 16, g = mine < row.groups ? mine : row.groups - 1;
        u32 windows = book[codes_of(row, FREE)[16 * g + lane16()]].windows;
        float cross = 0.0f, square = 0.0f;
        UNROLL for (i32 i = 0; i < 4; i++) {
            float c = (float)(signed char)(windows >> (8 * i));
            i32 at = 64 * g + 16 * i + lane16();
            cross += (WEIGHTED ? row.wx[at] : row.x[at]) * c;
            square += (WEIGHTED ? c * row.w[at] : c) * c;
        }
        cross = lane_sum(cross);
        square = lane_sum(square);
        if (lane16() == 0 && mine < row.groups) row.cross[g] = cross, row.square[g] = square;
    }
    barrier();
    if (thread_x() == 0) {
        double xy = 0.0, yy = 0.0;
        for (i32 g = 0; g < row.groups; g++) {
            double l = (double)locals_of(row, FREE)[g];
            xy += (double)row.cross[g] * l;
            yy += (double)row.square[g] * l * l;
        }
        *told = yy > 0.0 && xy > 0.0 ? (float)(xy / yy) : super;
    }
    barrier();
    float wanted = *told;
    barrier();
    return wanted;
}

INLINE void copy_encoding(const Row &row, i32 to, i32 from) {
    for (i32 i = thread_x(); i < 16 * row.groups; i += threads_x()) codes_of(row, to)[i] = codes_of(row, from)[i];
    for (i32 i = thread_x(); i < row.groups; i += threads_x()) locals_of(row, to)[i] = locals_of(row, from)[i];
    barrier();
}

template <bool WEIGHTED>
INLINE void encode_rows(u8 *codes, u8 *locals, u16 *supers, i32 *pairs, i32 *finite, double *errors, float *asked, const u8 *x,
                        const float *importance, const double *masses, const Word *books, float *floats, u8 *bytes,
                        const Wint2Job &job) {
    __shared__ u32 magnitudes[32];
    __shared__ double gains[2][256], forecasts[128], told;
    __shared__ i32 places[2][256], count;
    __shared__ float candidates[128], shorts[8], top, middle, told_scale;
    i32 thread = thread_x(), groups = job.k / 64;
    i64 room = job.k * (WEIGHTED ? 3 : 1) + 5 * (i64)groups + job.cells;
    Row row;
    row.groups = groups;
    row.x = floats + block_x() * room;
    row.w = row.x + job.k;
    row.wx = row.w + job.k;
    row.energy = WEIGHTED ? row.wx + job.k : row.w;
    row.scale = row.energy + groups;
    row.gain = row.scale + groups;
    row.cross = row.gain + groups;
    row.square = row.cross + groups;
    row.cells = row.square + groups;
    row.bytes = bytes + block_x() * (i64)4 * 17 * groups;
    for (i32 n = block_x(); n < job.n; n += blocks_x()) {
        i64 at = (i64)n * job.k;
        u32 largest = 0;
        for (i32 k = thread; k < job.k; k += 256) {
            u32 magnitude = bits_of(float_at(x, job.form, at + k)) & 0x7fffffffu;
            largest = largest > magnitude ? largest : magnitude;
        }
        for (i32 lane = 16; lane > 0; lane >>= 1) {
            u32 other = shuffle_xor(largest, lane);
            largest = largest > other ? largest : other;
        }
        if (thread % 32 == 0) magnitudes[thread / 32] = largest;
        barrier();
        for (i32 i = 0; i < 8; i++) largest = largest > magnitudes[i] ? largest : magnitudes[i];
        barrier();
        // A row of zeros, until something better is known.
        for (i32 i = thread; i < 16 * groups; i += 256) codes[(i64)n * 16 * groups + i] = 0;
        for (i32 i = thread; i < groups; i += 256) locals[(i64)n * groups + i] = 0;
        if (thread == 0) supers[n] = 0x3f80, pairs[n] = 0, finite[n] = largest < 0x7f800000u, errors[n] = 0.0, asked[n] = 0.0f;
        if (largest == 0 || largest >= 0x7f800000u) continue; // the whole block

        i32 exponent = (i32)(__builtin_bit_cast(u64, (double)as_float(largest)) >> 52) - 1023;
        bool plain = exponent >= -126 && exponent <= 126;
        for (i32 i = thread; i < job.k; i += 256) {
            i64 g = (i64)(i / 64) * job.step % groups;
            float w = float_at(x, job.form, at + g * 64 + i % 16 * 4 + i % 64 / 16);
            float scaled = plain ? w * (float)power_of_two(-exponent) : (float)((double)w * power_of_two(-exponent));
            row.x[i] = scaled;
            if (WEIGHTED) {
                float counts = importance[g * 64 + i % 16 * 4 + i % 64 / 16];
                row.w[i] = counts;
                row.wx[i] = counts * scaled;
            }
        }
        barrier();
        for (i32 from = 0; from < groups; from += 16) {
            i32 mine = from + thread / 16, g = mine < groups ? mine : groups - 1;
            float sum = 0.0f, reach = 0.0f;
            UNROLL for (i32 i = 0; i < 4; i++) {
                float w = row.x[64 * g + 16 * i + lane16()];
                sum += w * (WEIGHTED ? row.wx[64 * g + 16 * i + lane16()] : w);
                reach = max_(w < 0.0f ? -w : w, reach);
            }
            sum = lane_sum(sum);
            for (i32 lane = 8; lane > 0; lane >>= 1) reach = max_(shuffle_xor(reach, lane), reach);
            if (lane16() == 0 && mine < groups) {
                row.energy[g] = sum;
                double mass = WEIGHTED ? masses[(i64)g * job.step % groups] : 64.0;
                float rms = (float)sqrt64((double)sum / mass);
                row.scale[g] = reach < 1e-6f ? 0.0f : max_(0.062f * rms, reach / 50.0f);
            }
        }
        barrier();
        if (job.refine) find_scales<WEIGHTED>(row, books);

        // The race.
        places[0][thread] = thread;
        gains[0][thread] = 0.0;
        barrier();
        i32 judged = 0, tried = 1;
        for (i32 heat = 0; heat < job.heats; heat++) {
            i32 entered = job.pairs[heat];
            if (job.tried[heat] != tried) {
                judged = 0, tried = job.tried[heat];
                gains[0][thread] = 0.0;
            }
            i32 end = (groups + job.parts[heat] - 1) / job.parts[heat];
            i32 len = end > judged ? end - judged : 0;
            if (len > 0) judge<WEIGHTED>(row, job, books, places[0], entered, judged, len, tried);
            if (thread < entered) {
                double sum = 0.0;
                for (i32 i = 0; i < len; i++) sum += (double)row.cells[thread * len + i];
                gains[0][thread] += sum;
            }
            barrier();
            if (thread < entered) { // its place: how many come before it
                i64 mine = total(gains[0][thread]);
                i32 place = places[0][thread], rank = 0;
                for (i32 i = 0; i < entered; i++) {
                    i64 other = total(gains[0][i]);
                    rank += other > mine || (other == mine && places[0][i] < place);
                }
                places[1][rank] = place;
                gains[1][rank] = gains[0][thread];
            }
            barrier();
            if (thread < entered) places[0][thread] = places[1][thread], gains[0][thread] = gains[1][thread];
            barrier();
            judged = judged + len;
        }

        // Super scales of at most four significant bits, and the few that promise most.
        if (thread == 0) top = middle = 0.0f, count = 0;
        barrier();
        for (i32 g = thread; g < groups; g += 256) {
            float scale = row.scale[g];
            i32 some = 0, rank = 0;
            for (i32 i = 0; i < groups; i++) {
                float other = row.scale[i];
                some += other > 0.0f;
                rank += other > 0.0f && (other < scale || (other == scale && i < g));
            }
            if (scale > 0.0f && rank == some / 2) middle = scale;
            if (scale > 0.0f && rank == some - 1) top = scale;
        }
        barrier();
        if (thread == 0 && top > 0.0f) {
            float next = as_float(bits_of(2.0f * top / 15.0f) & 0xfff00000u), least = middle / 15.0f / 1.1f;
            while (next >= least && count < 128) {
                float scale = storable(next, exponent);
                if (scale > 0.0f && (count == 0 || candidates[count - 1] != scale)) candidates[count++] = scale;
                next = as_float(bits_of(next * 0.99f) & 0xfff00000u);
            }
        }
        barrier();
        if (thread < count) {
            double sum = 0.0;
            for (i32 g = 0; g < groups; g++) {
                i32 local;
                double excess = nearest_local(row.scale[g], candidates[thread], &local);
                sum += (double)row.energy[g] * excess;
            }
            forecasts[thread] = sum;
        }
        barrier();
        if (thread < count) {
            i64 mine = total(forecasts[thread]);
            i32 rank = 0;
            for (i32 i = 0; i < count; i++) {
                i64 other = total(forecasts[i]);
                rank += other < mine || (other == mine && candidates[i] > candidates[thread]);
            }
            if (rank < job.supers) shorts[rank] = candidates[thread];
        }
        barrier();
        i32 supers_tried = count < job.supers ? count : job.supers;
        if (thread == 0) {
            double sum = 0.0;
            for (i32 g = 0; g < groups; g++) sum += (double)row.energy[g];
            told = sum;
        }
        barrier();
        double energy = told;
        barrier();

        // Each finalist fitted, and the best of them kept.
        double best_error = 0.0;
        float best_super = 0.0f;
        float wish = 0.0f;
        i32 best_pair = -1;
        for (i32 finalist = 0; finalist < job.finalists && supers_tried > 0; finalist++) {
            const Word *book = books + 256 * places[0][finalist];
            double agreeing_error = 0.0;
            float agreeing = 0.0f;
            for (i32 i = 0; i < supers_tried; i++) {
                double error = fit_locals<WEIGHTED>(row, book, shorts[i], false, energy, &told);
                if (i == 0 || error < agreeing_error) {
                    agreeing_error = error, agreeing = shorts[i];
                    copy_encoding(row, AGREEING, NOW);
                }
            }
            copy_encoding(row, FREE, AGREEING);
            double error = agreeing_error;
            float super = agreeing;
            for (i32 round = 0; round < job.rounds; round++) {
                wish = least_squares<WEIGHTED>(row, book, super, &told_scale);
                float wanted = storable(wish, exponent);
                if (wanted == super || !(wanted > 0.0f)) break;
                double next = fit_locals<WEIGHTED>(row, book, wanted, true, energy, &told);
                if (next >= error) break;
                error = next, super = wanted;
                copy_encoding(row, FREE, NOW);
            }
            bool is_free = error < agreeing_error * (1.0 - 2e-4);
            if (!is_free) error = agreeing_error, super = agreeing;
            if (best_pair < 0 || error < best_error) {
                best_error = error, best_super = super, best_pair = places[0][finalist];
                copy_encoding(row, BEST, is_free ? FREE : AGREEING);
            }
        }
        if (thread == 0) errors[n] = best_error, asked[n] = wish;
        if (!(best_super > 0.0f)) continue; // the whole block: nothing that can be stored
        for (i32 i = thread; i < 16 * groups; i += 256) {
            i64 g = (i64)(i / 16) * job.step % groups;
            codes[((i64)n * groups + g) * 16 + i % 16] = locals_of(row, BEST)[i / 16] > 0 ? codes_of(row, BEST)[i] : 0;
        }
        for (i32 i = thread; i < groups; i += 256) locals[(i64)n * groups + (i64)i * job.step % groups] = locals_of(row, BEST)[i];
        if (thread == 0) supers[n] = stored_super(best_super, exponent), pairs[n] = best_pair;
        // The next row has barriers before it takes the memory.
    }
}

#define ENCODE_WINT2(NAME, WEIGHTED)                                                                                           \
    extern "C" __global__ void NAME(                                                                                           \
        u8 *codes /* (N, K/4) */, u8 *locals /* (N, G) */, u16 *supers /* (N) */, i32 *pairs /* (N): number in the list */,     \
        i32 *finite /* (N) */, double *errors /* (N): in units of the row's power of two squared */,                           \
        float *asked /* (N): what least squares asked for last, before it was rounded */, const u8 *x /* (N, K) */,            \
        const float *importance /* (K) */, const double *masses /* (G): its sums */, const Word *books /* (256, 256) */,       \
        float *floats /* (blocks, room) */, u8 *bytes /* (blocks, 4, K/4 + G) */, Wint2Job job) {                              \
        encode_rows<WEIGHTED>(codes, locals, supers, pairs, finite, errors, asked, x, importance, masses, books, floats, bytes, job); \
    }
ENCODE_WINT2(encode_wint2, false) // importance and masses are not read
ENCODE_WINT2(encode_wint2_weighted, true)
