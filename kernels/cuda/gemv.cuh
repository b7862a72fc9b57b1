// How packed weights become factors of tensor cores in products of few rows (gemv.cu). Every number here is exact: codes less
// their zero, WINT2's windows times their group's scale (10 bits), BF16 as it is, and NF4's levels as the sum of two f16.
//
// A lane holds eight columns of a row at a time, a piece, as four pairs. Which columns a pair holds is free as long as x lies
// alike: neighbours (BF16, INT8, NF4), or column i and column i + 4 (INT4, WINT2), which is what a mask leaves of a word.
#pragma once
#include "tensor.cuh"
#include "weight.cuh"

struct alignas(16) Pack { u32 words[4]; };
struct alignas(8) HalfPack { u32 words[2]; };

// Of a form whose lanes take UNIT bytes in a row, and BYTES in a step: `columns` in a unit, `units` in a step, `span` columns of the four
// lanes of a row in a step; of AFFINE with groups of GROUP columns (0: a row) how many, `scales`, are in those; and how many numbers
// stand for one of x.
template <i32 FORM, i32 BITS, i32 UNIT, i32 GROUP, i32 BYTES> struct Shape {
    static constexpr i32 form = FORM, width = BITS, unit = UNIT, group = GROUP, bytes = BYTES;
    static constexpr i32 bits = FORM == AFFINE ? BITS : FORM == WINT2 ? 2 : FORM == NF4 ? 4 : 16;
    static constexpr i32 columns = UNIT * 8 / bits, pieces = columns / 8, units = BYTES / UNIT, span = 4 * columns * units;
    static constexpr i32 scales = GROUP == 0 ? 1 : span / GROUP;
    static constexpr i32 parts = FORM == BF16 ? 3 : 2, rows = FORM == BF16 ? 2 : 4; // of x: to a number, and to eight columns
    static constexpr bool paired = FORM == WINT2 || (FORM == AFFINE && BITS == 4);
    static constexpr i32 table = FORM == NF4 ? 256 * 16 * 8 : FORM == WINT2 ? 16 * 16 : 0; // bytes
};

// What turns the codes of one row of a unit into numbers.
struct Meaning {
    u32 halves[4];             // each two alike
    u32 factor, addend;        // WINT2: of the codewords, by integers
    float slope, offset;       // and by the artifact's formula
    const u8 *table;           // NF4: this lane's
};

INLINE u32 both(u32 half) { return half * 0x00010001u; }

// `less` is -(1024 + zero), twice; the zero is at most 255, and at most 15 of 4 bits.
INLINE void mean_affine(Meaning *meaning, u32 less) {
    meaning->halves[0] = less;
    meaning->halves[1] = add_halves(less, both(0x6380u)); // + 960: -(64 + zero)
}
// A window w lies in an f16 as 1024 + 2 w or 1024 + 16 w, and stands for (w - 32) times its group's number, 0 to 15: the factors and
// addends of each number that make it so.
INLINE void fill_meanings(u8 *table, i32 thread) {
    if (thread >= 16) return;
    u32 scale = add_halves(both(0x6400u | (u32)thread), both(0xe400u)); // less 1024
    Pack *entry = (Pack *)(table + thread * 16);
    entry->words[0] = fma_halves(scale, both(0x3800u), 0u); // / 2
    entry->words[1] = fma_halves(scale, both(0xe040u), 0u); // * -544
    entry->words[2] = fma_halves(scale, both(0x2c00u), 0u); // / 16
    entry->words[3] = fma_halves(scale, both(0xd600u), 0u); // * -96
}

// Twice the codeword of byte `i` of `word`, and some lower bit, in a half of a word: by integers in the high half (codewords.rs), or by
// the artifact's formula in the low one.
template <i32 I> INLINE u32 codeword(u32 word, const Meaning &meaning) { return pick<0x4440 | I>(word, 0u) * meaning.factor + meaning.addend; }
INLINE u32 codeword_of_line(u32 word, i32 i, const Meaning &meaning) {
    float line = (float)(u8)(word >> 8 * i) * meaning.slope + meaning.offset;
    return (u32)(i32)floor_(line + 0.5f) << 1;
}

// Piece `i` of a unit of one row as four pairs; `low` of NF4 is what is to be added to them.
template <class S, bool LINES> INLINE void decode_piece(u32 *pairs /* (4) */, u32 *low /* (4) */, const u32 *words, i32 i, const Meaning &meaning) {
    if constexpr (S::form == BF16) {
        UNROLL for (i32 j = 0; j < 4; j++) pairs[j] = words[j];
    } else if constexpr (S::form == WINT2) {
        u32 word = words[i / 2] >> (i % 2 * 16), two;
        if constexpr (LINES) {
            two = pick<0x5410>(codeword_of_line(word, 0, meaning), codeword_of_line(word, 1, meaning));
        } else {
            two = pick<0x7632>(i % 2 ? codeword<2>(words[i / 2], meaning) : codeword<0>(words[i / 2], meaning),
                               i % 2 ? codeword<3>(words[i / 2], meaning) : codeword<1>(words[i / 2], meaning));
        }
        u32 high = two >> 6;
        pairs[0] = fma_halves(above_1024<0x03f0>(high), meaning.halves[2], meaning.halves[3]);
        pairs[1] = fma_halves(above_1024<0x007e>(high), meaning.halves[0], meaning.halves[1]);
        pairs[2] = fma_halves(above_1024<0x03f0>(two), meaning.halves[2], meaning.halves[3]);
        pairs[3] = fma_halves(above_1024<0x007e>(two), meaning.halves[0], meaning.halves[1]);
    } else if constexpr (S::form == NF4) {
        u32 word = words[i];
        UNROLL for (i32 j = 0; j < 4; j++) {
            u32 byte = (j == 0 ? word << 7 : word >> (8 * j - 7)) & 0x7f80u; // times the 128 bytes of an entry
            HalfPack level = *(const HalfPack *)(meaning.table + byte);
            pairs[j] = level.words[0], low[j] = level.words[1];
        }
    } else if constexpr (S::width == 8) {
        UNROLL for (i32 j = 0; j < 2; j++) {
            pairs[2 * j] = add_halves(pick<0x4140>(words[2 * i + j], 0x64646464u), meaning.halves[0]);
            pairs[2 * j + 1] = add_halves(pick<0x4342>(words[2 * i + j], 0x64646464u), meaning.halves[0]);
        }
    } else {
        u32 word = words[i], high = word >> 8;
        pairs[0] = add_halves(above_1024<0x000f>(word), meaning.halves[0]);
        pairs[1] = fma_halves(above_1024<0x00f0>(word), both(0x2c00u), meaning.halves[1]); // / 16
        pairs[2] = add_halves(above_1024<0x000f>(high), meaning.halves[0]);
        pairs[3] = fma_halves(above_1024<0x00f0>(high), both(0x2c00u), meaning.halves[1]);
    }
}

// Fills the table of NF4: for each byte and each of 16 lanes, so that none waits for another, its two levels times 256 as pairs of
// f16, and what is missing of them.
INLINE void fill_table(u8 *table, i32 thread, i32 threads) {
    for (i32 i = thread; i < 256 * 16; i += threads) {
        float first = nf4_level(i / 16 % 16) * 256.0f, second = nf4_level(i / 256) * 256.0f;
        u32 near = pair_f16(first, second);
        HalfPack *entry = (HalfPack *)(table + i * 8);
        entry->words[0] = near;
        entry->words[1] = pair_f16(first - from_f16((u16)near), second - from_f16((u16)(near >> 16)));
    }
}

// Eight numbers of x as pairs of each of its parts. f16: a number times `down`, a power of two, is the first plus 2^-11 of the
// second, but for one unit of its last place at most. A row with an infinity or NaN has `down` 0, and nothing else then; UNIT for
// weights that are sums of two: an infinity is one there, as it would not go with a second of another sign, and `up` is infinite.
template <bool PAIRED, bool UNIT> INLINE void part_f16(u32 *parts /* (2, 4) */, const float *x /* (8) */, float down) {
    UNROLL for (i32 j = 0; j < 4; j++) {
        float two[2] = {x[PAIRED ? j : 2 * j], x[PAIRED ? j + 4 : 2 * j + 1]};
        if (down == 0.0f) {
            UNROLL for (i32 h = 0; h < 2; h++) {
                u32 bits = bits_of(two[h]);
                if ((bits & 0x7f800000u) != 0x7f800000u) two[h] = 0.0f;
                if (UNIT && (bits & 0x7fffffffu) == 0x7f800000u) two[h] = as_float((bits & 0x80000000u) | 0x3f800000u);
            }
            parts[j] = pair_f16(two[0], two[1]);
            parts[4 + j] = 0;
            continue;
        }
        float a = two[0] * down, b = two[1] * down;
        u32 near = pair_f16(a, b);
        parts[j] = near;
        parts[4 + j] = pair_f16((a - from_f16((u16)near)) * 2048.0f, (b - from_f16((u16)(near >> 16))) * 2048.0f);
    }
}
// bf16: three parts of eight bits, cut off, which are the number together.
INLINE void part_bf16(u32 *parts /* (3, 4) */, const float *x /* (8) */) {
    UNROLL for (i32 j = 0; j < 4; j++) {
        u32 three[3] = {0, 0, 0};
        UNROLL for (i32 half = 0; half < 2; half++) {
            float a = x[2 * j + half];
            bool finite = (bits_of(a) & 0x7f800000u) != 0x7f800000u;
            u32 high = a == a ? bits_of(a) & 0xffff0000u : 0x7fc00000u;
            float rest = finite ? a - as_float(high) : 0.0f;
            u32 middle = bits_of(rest) & 0xffff0000u;
            u32 low = bits_of(rest - as_float(middle));
            three[0] |= high >> 16 << 16 * half;
            three[1] |= middle >> 16 << 16 * half;
            three[2] |= low >> 16 << 16 * half;
        }
        UNROLL for (i32 part = 0; part < 3; part++) parts[4 * part + j] = three[part];
    }
}
