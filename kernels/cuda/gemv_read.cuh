// What a lane of a product of few rows (gemv.cu) reads of w, and where: its two rows' packed bytes and what their groups have, one
// step before they are needed.
#pragma once
#include "gemv.cuh"

// What a lane reads in a step: the bytes of each of its two rows, and what the groups in them have: of AFFINE two scales of 16 bits to
// a word and zeros of 4 bits, of NF4 a scale to a word, of WINT2 the two numbers of a byte to each unit.
template <class S> struct Packet {
    static constexpr i32 kept = S::form == AFFINE ? (S::scales + 1) / 2 : S::units;
    u32 words[2][S::bytes / 4], scales[2][kept], zeros[2];
};

// Units that share a scale.
template <class S> INLINE constexpr i32 units_of_group() { return S::form == AFFINE && S::group > 0 ? S::group / (4 * S::columns) : 1; }

// Brings the next COUNT units to the front: whole groups, or part of the only one.
template <class S, i32 COUNT> INLINE void pass_units(Packet<S> *packet) {
    constexpr i32 words = COUNT * S::unit / 4, groups = COUNT / units_of_group<S>(), kept = Packet<S>::kept;
    UNROLL for (i32 r = 0; r < 2; r++) {
        UNROLL for (i32 i = 0; i + words < S::bytes / 4; i++) packet->words[r][i] = packet->words[r][i + words];
        if constexpr (groups == 0) {
            static_assert(S::scales == 1);
        } else if constexpr (S::form == AFFINE && S::group > 0 && groups == 1) {
            UNROLL for (i32 i = 0; i < kept; i++)
                packet->scales[r][i] = packet->scales[r][i] >> 16 | (i + 1 < kept ? packet->scales[r][i + 1] << 16 : 0);
        } else if constexpr (S::form == AFFINE && S::group > 0) {
            UNROLL for (i32 i = 0; i + groups / 2 < kept; i++) packet->scales[r][i] = packet->scales[r][i + groups / 2];
        } else {
            UNROLL for (i32 i = 0; i + COUNT < kept; i++) packet->scales[r][i] = packet->scales[r][i + COUNT];
        }
        packet->zeros[r] >>= 4 * groups;
    }
}

// Where the next packet comes from: the first row's codes, how far away the second's are, and where in parts[1] and parts[2] what
// belongs to the rows begins.
struct Cursor {
    i32 tile, step;
    const u8 *codes;
    u32 second, scales[2], zeros[2];
};

// Whose work this is: columns from `from` on in `steps` steps, of which every 2^way_bits-th is this warp's, and tiles of 256 >> way_bits
// rows.
struct Share {
    i32 from, steps, way_bits, lane;
};
// The first step of this warp, and the first row of a tile that is this lane's. Cheap, and not worth a register.
INLINE i32 first_step(const Share &share) { return (thread_x() / 32) & ((1 << share.way_bits) - 1); }
INLINE i32 first_row(const Share &share, i32 tile) {
    i32 thread = anew(thread_x());
    return (tile << (8 - share.way_bits)) + (thread / 32 >> share.way_bits) * 16 + thread % 32 / 4;
}
INLINE bool is_there(const Weight &w, const Share &share, i32 tile) { return tile << (8 - share.way_bits) < w.n; }

// To the tile that `at` names.
template <class S> INLINE void stand_at(const Weight &w, const Share &share, Cursor *at) {
    i32 first = first_row(share, at->tile), n[2] = {first < w.n ? first : w.n - 1, first + 8 < w.n ? first + 8 : w.n - 1};
    i32 pitch = w.k / S::columns * S::unit;
    at->codes = w.parts[0] + (i64)n[0] * pitch + (i64)(share.from / S::columns + share.lane % 4) * S::unit;
    at->second = (u32)((n[1] - n[0]) * pitch);
    UNROLL for (i32 r = 0; r < 2; r++) {
        if constexpr (S::form == AFFINE && S::group > 0) {
            i32 groups = w.k / S::group;
            at->scales[r] = (u32)n[r] * (u32)groups * 2;
            at->zeros[r] = (u32)n[r] * (u32)((groups * S::width + 7) / 8);
        }
        if constexpr (S::form == NF4) at->scales[r] = (u32)n[r] * (u32)(w.k / 64) * 4;
        if constexpr (S::form == WINT2) at->scales[r] = (u32)n[r] * (u32)((w.k / 64 + 1) / 2) + (u32)(share.from / 64 + share.lane % 4) / 2;
    }
}

// Scales and zeros of 4 bits of a step's groups, from group `g` on; where rows are not whole steps one by one, and past the end the last.
template <class S> INLINE void fetch_groups(Packet<S> *packet, const Weight &w, const Cursor &at, i32 g) {
    UNROLL for (i32 r = 0; r < 2; r++) {
        const u8 *scales = w.parts[1] + at.scales[r], *zeros = w.parts[2] + at.zeros[r];
        packet->zeros[r] = 0;
        if (w.k % S::span == 0) {
            const u8 *here = scales + g * 2, *there = zeros + g / 2;
            if constexpr (S::scales == 8) {
                Pack pack = *(const Pack *)here;
                UNROLL for (i32 i = 0; i < 4; i++) packet->scales[r][i] = pack.words[i];
                if (w.zero < 0) packet->zeros[r] = *(const u32 *)there;
            } else if constexpr (S::scales == 4) {
                HalfPack pack = *(const HalfPack *)here;
                UNROLL for (i32 i = 0; i < 2; i++) packet->scales[r][i] = pack.words[i];
                if (w.zero < 0) packet->zeros[r] = *(const u16 *)there;
            } else if constexpr (S::scales == 2) {
                packet->scales[r][0] = *(const u32 *)here;
                if (w.zero < 0) packet->zeros[r] = *there;
            } else {
                packet->scales[r][0] = *(const u16 *)here;
                if (w.zero < 0) packet->zeros[r] = *there >> g % 2 * 4;
            }
        } else {
            UNROLL for (i32 i = 0; i < S::scales; i++) {
                i32 own = g + i < w.k / S::group ? g + i : w.k / S::group - 1;
                u32 scale = ((const u16 *)scales)[own];
                packet->scales[r][i / 2] = i % 2 ? packet->scales[r][i / 2] | scale << 16 : scale;
                if (w.zero < 0) packet->zeros[r] |= (((u32)zeros[own / 2] >> own % 2 * 4) & 15u) << 4 * i;
            }
        }
    }
}

// Reads what `at` stands at, if anything, and goes on. What lies past the end of a row meets zeros of x,
// so it is left as it is unless it could be an infinity.
template <class S> INLINE void fetch_packet(Packet<S> *packet, const Weight &w, const Share &share, Cursor *at) {
    if constexpr (S::form == BF16)
        UNROLL for (i32 r = 0; r < 2; r++)
            UNROLL for (i32 i = 0; i < S::bytes / 4; i++) packet->words[r][i] = 0;
    if constexpr (S::form == NF4)
        UNROLL for (i32 r = 0; r < 2; r++)
            UNROLL for (i32 i = 0; i < S::units; i++) packet->scales[r][i] = 0;
    if (is_there(w, share, at->tile) && at->step < share.steps) {
        i32 start = share.from + at->step * S::span, first = start + share.lane % 4 * S::columns;
        UNROLL for (i32 r = 0; r < 2; r++) {
            const u8 *codes = at->codes + (r ? at->second : 0) + at->step * 4 * S::bytes;
            UNROLL for (i32 u = 0; u < S::units; u++) {
                if (first + u * 4 * S::columns >= w.k) continue;
                if constexpr (S::unit == 16) {
                    Pack pack = *(const Pack *)(codes + u * 64);
                    UNROLL for (i32 i = 0; i < 4; i++) packet->words[r][4 * u + i] = pack.words[i];
                } else if constexpr (S::unit == 8) {
                    HalfPack pack = *(const HalfPack *)(codes + u * 32);
                    packet->words[r][2 * u] = pack.words[0], packet->words[r][2 * u + 1] = pack.words[1];
                } else {
                    packet->words[r][u] = *(const u32 *)(codes + u * 16);
                }
                if constexpr (S::form == WINT2) packet->scales[r][u] = (w.parts[1] + at->scales[r])[at->step * (2 * S::units) + 2 * u];
                if constexpr (S::form == NF4) packet->scales[r][u] = ((const u32 *)(w.parts[1] + at->scales[r]))[start / 64 + u];
            }
        }
        if constexpr (S::form == AFFINE && S::group > 0) fetch_groups(packet, w, *at, start / S::group);
    }
    at->step += 1 << share.way_bits;
    if (at->step >= share.steps) {
        at->step = first_step(share), at->tile += blocks_x();
        if (is_there(w, share, at->tile)) stand_at<S>(w, share, at);
    }
}

// What belongs to a lane's two rows: of WINT2 the integers that give codewords, of AFFINE without groups -(1024 + zero), twice.
struct Rows {
    u32 factors[2], addends[2], zeros[2];
};
template <class S> INLINE void read_rows(Rows *rows, const Weight &w, const Share &share, i32 tile) {
    UNROLL for (i32 r = 0; r < 2; r++) {
        i32 n = first_row(share, tile) + 8 * r;
        n = n < w.n ? n : w.n - 1;
        if constexpr (S::form == WINT2) rows->factors[r] = ((const u32 *)w.parts[3])[w.n + n], rows->addends[r] = ((const u32 *)w.parts[3])[2 * w.n + n];
        if constexpr (S::form == AFFINE && S::group == 0) {
            u32 zero = w.zero >= 0 ? (u32)w.zero : w.parts[2][n] & ((1u << S::width) - 1u);
            rows->zeros[r] = both(0xe400u | zero);
        }
    }
}

// What the codes of unit `u` of row r mean, and what multiplies their sums. LINES: codewords by the formula.
template <class S, bool LINES>
INLINE float mean_of(Meaning *meaning, const Weight &w, const Share &share, const Packet<S> &packet, const Rows &rows, i32 tile, i32 r, i32 u) {
    if constexpr (S::form == NF4) return as_float(packet.scales[r][u]) * 0.00390625f;
    if constexpr (S::form == WINT2) {
        u32 local = (packet.scales[r][u] >> (share.lane % 2 ? 0 : 4)) & 15u;
        Pack entry = *(const Pack *)(shared_bytes + local * 16);
        UNROLL for (i32 i = 0; i < 4; i++) meaning->halves[i] = entry.words[i];
        meaning->factor = rows.factors[r], meaning->addend = rows.addends[r];
        if constexpr (LINES) {
            i32 n = first_row(share, tile) + 8 * r;
            n = n < w.n ? n : w.n - 1;
            meaning->slope = ((const float *)w.parts[3])[n], meaning->offset = ((const float *)w.parts[4])[n];
        }
    }
    if constexpr (S::form == AFFINE && S::group == 0) mean_affine(meaning, rows.zeros[r]);
    if constexpr (S::form == AFFINE && S::group > 0) {
        constexpr i32 each = S::group / (4 * S::columns); // units
        i32 i = u / each;
        u32 word = packet.scales[r][i / 2], pair = ((packet.zeros[r] >> 4 * (i % 4)) & 0x000f000fu) | 0xe400e400u;
        mean_affine(meaning, w.zero >= 0 ? both(0xe400u | (u32)w.zero) : i < 4 ? pick<0x1010>(pair, 0u) : pick<0x3232>(pair, 0u));
        if (w.scale == F16) return from_f16((u16)(i % 2 ? word >> 16 : word));
        return as_float(i % 2 ? word & 0xffff0000u : word << 16);
    }
    return 1.0f;
}
