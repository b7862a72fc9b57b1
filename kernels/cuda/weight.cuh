// A weight (N, K) as it lies on the device: dense floats, or the packed parts of a scheme of our own family, in the order
// of `Scheme::parts` (formats/scheme). `weight_at` is one element's value, by the formula in the artifact's manifest.
#pragma once
#include "device.cuh"

enum Form { F32 = 0, BF16 = 1, F16 = 2, AFFINE = 3, WINT2 = 4, WINT25 = 5, NF4 = 6 };

// Mirrors `WeightArgs` in weight.rs, field by field.
struct Weight {
    const u8 *parts[5]; // dense values; or codes and scales. WINT2: behind the slopes (N) lie whole numbers, see codewords.rs
    i32 form;           // of `Form`
    i32 n, k;
    i32 bits;           // AFFINE: of a code
    i32 group;          // AFFINE: columns that share a scale
    i32 zero;           // AFFINE: the fixed zero point, or -1 when parts[2] holds one a group
    i32 scale;          // AFFINE: F32, BF16 or F16
    i32 padding;
};

INLINE float float_at(const u8 *bytes, i32 form, i64 i) {
    if (form == F32) return ((const float *)bytes)[i];
    u16 half = ((const u16 *)bytes)[i];
    return form == BF16 ? from_bf16(half) : from_f16(half);
}

// What a column is multiplied by to find its group: 2^32 / group, rounded up, whose upper half times k is k / group for any k below
// 2^32 / group; 0 for a group that is a row.
INLINE u32 share_of(const Weight &w) { return w.group == w.k ? 0 : 0xffffffffu / (u32)w.group + 1u; }
INLINE i32 group_at(i32 k, u32 share) { return (i32)((u64)(u32)k * share >> 32); }

// `lsb-rows`: value i of a row of `bits`-bit values, lowest bits first. Rows are whole bytes.
INLINE i32 code_at(const u8 *row, i32 i, i32 bits) {
    if (bits == 8) return row[i];
    i32 at = i * bits;
    u32 pair = row[at / 8];
    if (at % 8 + bits > 8) pair |= (u32)row[at / 8 + 1] << 8;
    return (i32)((pair >> (at % 8)) & ((1u << bits) - 1u));
}

// The levels of `formats/scheme/nf4.rs`.
INLINE float nf4_level(i32 code) {
    const float levels[16] = {-1.0f,        -0.6961928f,  -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                              -0.091050036f, 0.0f,         0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                              0.44070983f,   0.562617f,    0.72295684f,  1.0f};
    return levels[code];
}

INLINE float weight_at(const Weight &w, i32 n, i32 k) {
    if (w.form <= F16) return float_at(w.parts[0], w.form, (i64)n * w.k + k);
    if (w.form == AFFINE) {
        i32 groups = w.k / w.group, g = k / w.group;
        i32 code = code_at(w.parts[0] + (i64)n * ((w.k * w.bits + 7) / 8), k, w.bits);
        i32 zero = w.zero;
        if (zero < 0) zero = code_at(w.parts[2] + (i64)n * ((groups * w.bits + 7) / 8), g, w.bits);
        return (float)(code - zero) * float_at(w.parts[1], w.scale, (i64)n * groups + g);
    }
    if (w.form == WINT2) {
        u8 byte = w.parts[0][(i64)n * (w.k / 4) + k / 4];
        u8 pair = w.parts[1][(i64)n * ((w.k / 64 + 1) / 2) + k / 128];
        i32 local = (k / 64) % 2 == 0 ? pair >> 4 : pair & 15;
        float super = from_bf16(((const u16 *)w.parts[2])[n]);
        float line = (float)byte * ((const float *)w.parts[3])[n] + ((const float *)w.parts[4])[n];
        i32 code = (i32)floor_(line + 0.5f);
        return (float)(((code >> (9 - 3 * (k % 4))) & 63) - 32) * ((float)local * super);
    }
    if (w.form == NF4) {
        i32 code = code_at(w.parts[0] + (i64)n * (w.k / 2), k, 4);
        return nf4_level(code) * ((const float *)w.parts[1])[(i64)n * (w.k / 64) + k / 64];
    }
    const u16 *words = (const u16 *)w.parts[0] + ((i64)n * (w.k / 64) + k / 64) * 10;
    i32 i = k % 64, place = i % 7;
    i32 window = i == 63 ? words[9] >> 13 : (words[i / 7] >> (place < 3 ? 13 - 2 * place : 12 - 2 * place)) & 7;
    float super = from_bf16(((const u16 *)w.parts[1])[n]);
    return (float)(window - 4) * ((float)(words[9] & 8191) * super);
}
