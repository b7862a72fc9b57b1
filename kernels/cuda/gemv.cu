// y (M, N) = x (M, K) times the transpose of w (N, K) for 1 to 16 rows, each packed byte of w read once.
//
//   y[m][n] = sum over groups g of scale(n, g) * sum over k in g of x[m][k] * (code(n, k) - zero(n, g))
//
// Tensor cores do the sums, even for one row: w is what they call A, its numbers exact (gemv.cuh), and x is B, each number of x split
// into parts in columns of their own, so that nothing is lost of it. What is left to do is decoding.
//
// A block of 16 warps stages its columns of x once, in shared memory, and walks over tiles of 256 / `ways` rows of w: 16 rows a
// warp, `ways` warps taking turns at the steps of their columns. A lane reads its own two rows, 16 bytes a step of each, two
// steps ahead; no barrier is met but one at the end of a tile, where the warps' sums meet. Blocks that share rows, (x) same and
// (y) of other columns, leave their sums in `partials`; the last of them adds these up. All sums are taken in an order that
// depends on sizes alone.
#include "gemv.cuh"

enum { GEMV_WARPS = 16, GEMV_THREADS = 32 * GEMV_WARPS, GEMV_ROWS = 16 };
#ifdef HOST_SHIM
#define GEMV_BOUND
#else
#define GEMV_BOUND __attribute__((launch_bounds(512, 1)))
#endif

// What a lane reads in a step: 16 bytes of each of its two rows, and of each unit of these what its group has.
template <i32 UNITS> struct Packet { u32 words[2][4], scales[2][UNITS], zeros[2][UNITS]; };

// Where the next packet comes from.
struct Cursor {
    i32 tile, step;
    const u8 *codes[2], *scales[2], *zeros[2];
};

template <i32 FORM, i32 BITS, i32 UNIT> struct Reader {
    const Weight &w;
    i32 from, steps, way, ways, tiles, row, shift, groups, lane; // row: of a tile
};

// To the tile that `at` names.
template <i32 FORM, i32 BITS, i32 UNIT> INLINE void stand_at(const Reader<FORM, BITS, UNIT> &reader, Cursor *at) {
    typedef Shape<FORM, BITS, UNIT> S;
    const Weight &w = reader.w;
    UNROLL for (i32 r = 0; r < 2; r++) {
        i64 n = at->tile * (256 / reader.ways) + reader.row + 8 * r;
        n = n < w.n ? n : w.n - 1;
        at->codes[r] = w.parts[0] + n * (i64)(w.k / S::columns) * UNIT + (i64)(reader.from / S::columns + reader.lane % 4) * UNIT;
        if constexpr (FORM == AFFINE) {
            at->scales[r] = w.parts[1] + n * reader.groups * (w.scale == F32 ? 4 : 2);
            at->zeros[r] = w.parts[2] + n * ((reader.groups * BITS + 7) / 8);
        }
        if constexpr (FORM == NF4) at->scales[r] = w.parts[1] + n * reader.groups * 4;
        if constexpr (FORM == WINT2) at->scales[r] = w.parts[1] + n * ((reader.groups + 1) / 2);
    }
}

// Reads what `at` stands at, and goes on.
template <i32 FORM, i32 BITS, i32 UNIT>
INLINE void fetch_packet(Packet<Shape<FORM, BITS, UNIT>::units> *packet, const Reader<FORM, BITS, UNIT> &reader, Cursor *at) {
    typedef Shape<FORM, BITS, UNIT> S;
    const Weight &w = reader.w;
    UNROLL for (i32 r = 0; r < 2; r++) UNROLL for (i32 i = 0; i < 4; i++) packet->words[r][i] = 0;
    UNROLL for (i32 r = 0; r < 2; r++) UNROLL for (i32 i = 0; i < S::units; i++) packet->scales[r][i] = packet->zeros[r][i] = 0;
    if (at->tile < reader.tiles && at->step < reader.steps) {
        UNROLL for (i32 u = 0; u < S::units; u++) {
            i32 k = reader.from + at->step * S::span + u * 4 * S::columns, mine = k + reader.lane % 4 * S::columns;
            UNROLL for (i32 r = 0; r < 2; r++) {
                const u8 *codes = at->codes[r] + at->step * 64 + u * 4 * UNIT;
                if (mine < w.k) {
                    if constexpr (UNIT == 16) {
                        Pack pack = *(const Pack *)codes;
                        UNROLL for (i32 i = 0; i < 4; i++) packet->words[r][i] = pack.words[i];
                    } else if constexpr (UNIT == 8) {
                        HalfPack pack = *(const HalfPack *)codes;
                        packet->words[r][2 * u] = pack.words[0], packet->words[r][2 * u + 1] = pack.words[1];
                    } else {
                        packet->words[r][u] = *(const u32 *)codes;
                    }
                }
                if constexpr (FORM == AFFINE) {
                    i32 g = k >> reader.shift;
                    g = g < reader.groups ? g : reader.groups - 1;
                    packet->scales[r][u] = w.scale == F32 ? ((const u32 *)at->scales[r])[g] : ((const u16 *)at->scales[r])[g];
                    if (w.zero < 0) packet->zeros[r][u] = at->zeros[r][g * BITS / 8];
                }
                if constexpr (FORM == NF4) packet->scales[r][u] = ((const u32 *)at->scales[r])[k < w.k ? k / 64 : reader.groups - 1];
                if constexpr (FORM == WINT2) packet->scales[r][u] = at->scales[r][(mine < w.k ? mine : 0) / 128];
            }
        }
    }
    at->step += reader.ways;
    if (at->step >= reader.steps) {
        at->step = reader.way, at->tile += blocks_x();
        if (at->tile < reader.tiles) stand_at(reader, at);
    }
}

// The scale of unit `u` of row r, and what its codes mean; k is its first column.
template <i32 FORM, i32 BITS, i32 UNIT>
INLINE float mean_of(Meaning *meaning, const Reader<FORM, BITS, UNIT> &reader, const Packet<Shape<FORM, BITS, UNIT>::units> &packet, i32 r, i32 u, i32 k) {
    const Weight &w = reader.w;
    u32 scale = packet.scales[r][u];
    if constexpr (FORM == AFFINE) {
        i32 g = k >> reader.shift;
        g = g < reader.groups ? g : reader.groups - 1;
        u32 zero = packet.zeros[r][u];
        if (BITS == 4) zero = (g % 2 ? zero >> 4 : zero) & 15u;
        mean_affine<BITS>(meaning, w.zero >= 0 ? (u32)w.zero : zero);
        return w.scale == F16 ? from_f16((u16)scale) : as_float(w.scale == BF16 ? scale << 16 : scale);
    }
    if constexpr (FORM == NF4) return as_float(scale) * 0.00390625f;
    return 1.0f;
}

// The columns `from` to `from + length` of x, in parts, where `few_rows` looks for them: of each row, piece by piece, of each part,
// the four lanes' eight columns. Powers of two that the sums are to be multiplied by go to `up`.
template <class S, bool HALF> INLINE void stage_parts(u8 *staged, const float *x, i32 k, i32 m, i32 from, i32 length, i32 padded, float *up) {
    i32 warp = thread_x() / 32, lane = thread_x() % 32;
    float *down = up + 16;
    u32 *most = (u32 *)(up + 32);
    if constexpr (HALF) {
        i32 warps = m == 1 ? 16 : m == 2 ? 8 : m <= 4 ? 4 : m <= 8 ? 2 : 1; // to a row
        u32 top = 0;
        if (warp / warps < m) {
            const Pack *row = (const Pack *)(x + (i64)(warp / warps) * k + from);
            for (i32 i = warp % warps * 32 + lane; i < length / 4; i += warps * 32) {
                Pack four = row[i];
                UNROLL for (i32 j = 0; j < 4; j++) {
                    u32 size = four.words[j] & 0x7fffffffu;
                    top = size > top ? size : top;
                }
            }
        }
        for (i32 other = 16; other > 0; other >>= 1) {
            u32 theirs = shuffle_xor(top, other);
            top = theirs > top ? theirs : top;
        }
        if (lane == 0) most[warp] = top;
        barrier();
        if (thread_x() < m) {
            u32 largest = 0;
            for (i32 i = 0; i < warps; i++) {
                u32 size = most[thread_x() * warps + i];
                largest = size > largest ? size : largest;
            }
            u32 exponent = largest >> 23; // the largest becomes 2^14 to 2^15, or less if it is below 2^-98
            exponent = exponent < 29 ? 29 : exponent;
            bool finite = exponent < 255;
            down[thread_x()] = finite ? as_float((268 - exponent) << 23) : 0.0f;
            up[thread_x()] = finite ? as_float((exponent - 14) << 23) : 1.0f;
        }
        barrier();
    }
    for (i32 i = thread_x(); i < m * (padded / 8); i += GEMV_THREADS) {
        i32 row = i / (padded / 8), at = i % (padded / 8);
        i32 lanes = at % 4, piece = at / 4 % S::pieces, unit = at / 4 / S::pieces;
        i32 column = (unit * 4 + lanes) * S::columns + piece * 8;
        float eight[8];
        UNROLL for (i32 j = 0; j < 8; j++) eight[j] = 0.0f;
        if (column < length) {
            const Pack *source = (const Pack *)(x + (i64)row * k + from + column);
            Pack first = source[0], second = source[1];
            UNROLL for (i32 j = 0; j < 4; j++) eight[j] = as_float(first.words[j]), eight[4 + j] = as_float(second.words[j]);
        }
        u32 parts[4 * S::parts];
        if constexpr (HALF) {
            part_f16<S::paired>(parts, eight, down[row]);
        } else {
            part_bf16(parts, eight);
        }
        u8 *to = staged + (i64)row * padded * 2 * S::parts + ((at / 4) * S::parts * 4 + lanes) * 16;
        UNROLL for (i32 part = 0; part < S::parts; part++) {
            Pack pack;
            UNROLL for (i32 j = 0; j < 4; j++) pack.words[j] = parts[4 * part + j];
            *(Pack *)(to + part * 64) = pack;
        }
    }
}

template <i32 FORM, i32 BITS, i32 UNIT, i32 BATCH>
INLINE void few_rows(float *y, const float *x, const Weight &w, i32 m, float *partials /* (parts, M, N) */, u32 *arrived, i32 part, i32 ways) {
    typedef Shape<FORM, BITS, UNIT> S;
    constexpr bool half = FORM != BF16;
    constexpr i32 TILES = BATCH / S::rows; // of eight columns of B
    i32 thread = thread_x(), warp = thread / 32, lane = thread % 32, parts = (w.k + part - 1) / part;
    i32 from = block_y() * part, length = w.k - from < part ? w.k - from : part;
    u8 *staged = shared_bytes + S::table;                   // (m, part) in parts
    float *sums = (float *)(staged + m * part * 2 * S::parts); // (2, warps, m, 16)
    float *up = sums + 2 * GEMV_WARPS * 16 * m;              // (16), and as many `down` and `most`
    i32 shift = 31, group = FORM == AFFINE ? w.group : 64, together = 256 / ways; // rows
    if (group < w.k)
        for (shift = 0; group >> shift > 1;) shift++;
    Reader<FORM, BITS, UNIT> reader = {w, from, (length + S::span - 1) / S::span, warp % ways, ways, (w.n + together - 1) / together,
                                       warp / ways * 16 + lane / 4, shift, group < w.k ? w.k / group : 1, lane};
    Cursor at;
    at.tile = block_x(), at.step = reader.way;
    UNROLL for (i32 r = 0; r < 2; r++) at.codes[r] = at.scales[r] = at.zeros[r] = nullptr;
    stand_at(reader, &at);
    Packet<S::units> next, after;
    fetch_packet(&next, reader, &at);
    fetch_packet(&after, reader, &at);
    if constexpr (FORM == NF4) fill_table(shared_bytes, thread, GEMV_THREADS);
    stage_parts<S, half>(staged, x, w.k, m, from, length, part, up);
    barrier();

    // Lane (g, c) holds of B column g in the lanes c of the rows: part g % 2 of row g / 2, or of three parts that of row g / 4.
    i32 g = lane / 4, c = lane % 4;
    i32 own = half ? g % 2 : g % 4 < 2 ? g % 4 : 2;
    const u8 *lines[TILES];
    UNROLL for (i32 j = 0; j < TILES; j++) {
        i32 row = j * S::rows + g * S::rows / 8;
        lines[j] = staged + (i64)(row < m ? row : m - 1) * part * 2 * S::parts + (own * 4 + c) * 16;
    }
    float slopes[2], offsets[2], slopes_next[2], offsets_next[2];
    auto line = [&](i32 tile, float *slope, float *offset) {
        UNROLL for (i32 r = 0; r < 2; r++) {
            i32 n = tile * together + reader.row + 8 * r;
            n = n < w.n ? n : w.n - 1;
            slope[r] = ((const float *)w.parts[3])[n], offset[r] = ((const float *)w.parts[4])[n];
        }
    };
    if constexpr (FORM == WINT2) {
        line(block_x(), slopes, offsets);
        line(block_x() + blocks_x(), slopes_next, offsets_next);
    }
    float totals[TILES][2];
    UNROLL for (i32 j = 0; j < TILES; j++) totals[j][0] = totals[j][1] = 0.0f;
    i32 tile = block_x(), step = reader.way, buffer = 0;
    KEEP_LOOP for (;;) {
        Packet<S::units> late;
        fetch_packet(&late, reader, &at);
        if (step < reader.steps && tile * together + warp / ways * 16 < w.n) {
            UNROLL for (i32 u = 0; u < S::units; u++) {
                float scales[2];
                Meaning meanings[2];
                UNROLL for (i32 r = 0; r < 2; r++) {
                    meanings[r].table = shared_bytes + lane % 16 * 8;
                    i32 k = from + step * S::span + u * 4 * S::columns;
                    scales[r] = mean_of(&meanings[r], reader, next, r, u, k);
                    if constexpr (FORM == WINT2) {
                        u32 pair = next.scales[r][0];
                        bool odd = (k + c * S::columns) / 64 % 2;
                        mean_wint2(&meanings[r], (odd ? pair : pair >> 4) & 15u, slopes[r], offsets[r]);
                    }
                }
                float sum[TILES][4];
                UNROLL for (i32 j = 0; j < TILES; j++) UNROLL for (i32 i = 0; i < 4; i++) sum[j][i] = 0.0f;
                UNROLL for (i32 i = 0; i < S::pieces; i++) {
                    u32 a[2][4], low[2][4];
                    UNROLL for (i32 r = 0; r < 2; r++) decode_piece<FORM, BITS>(a[r], low[r], next.words[r] + u * (UNIT / 4), i, meanings[r]);
                    i32 place = ((step * S::units + u) * S::pieces + i) * S::parts * 64;
                    UNROLL for (i32 j = 0; j < TILES; j++) {
                        Pack b = *(const Pack *)(lines[j] + place);
                        UNROLL for (i32 h = 0; h < 2; h++) {
                            u32 factors[4] = {a[0][2 * h], a[1][2 * h], a[0][2 * h + 1], a[1][2 * h + 1]};
                            if constexpr (half) {
                                multiply_add_f16(sum[j], factors, b.words + 2 * h);
                            } else {
                                multiply_add(sum[j], factors, b.words + 2 * h);
                            }
                            if constexpr (FORM == NF4) {
                                u32 rest[4] = {low[0][2 * h], low[1][2 * h], low[0][2 * h + 1], low[1][2 * h + 1]};
                                multiply_add_f16(sum[j], rest, b.words + 2 * h);
                            }
                        }
                    }
                }
                UNROLL for (i32 j = 0; j < TILES; j++)
                    UNROLL for (i32 r = 0; r < 2; r++) {
                        if constexpr (half) {
                            totals[j][r] = fma_(fma_(sum[j][2 * r + 1], 0.00048828125f, sum[j][2 * r]), scales[r], totals[j][r]);
                        } else {
                            totals[j][r] += c % 2 ? sum[j][2 * r] : sum[j][2 * r] + sum[j][2 * r + 1];
                        }
                    }
            }
        }
        next = after, after = late;
        step += ways;
        if (step < reader.steps) continue;
        // The tile ends: lane (g, c) holds rows g and g + 8 of row c of x, or, with three parts, of half of row c / 2.
        float *here = sums + buffer * GEMV_WARPS * 16 * m;
        UNROLL for (i32 j = 0; j < TILES; j++)
            UNROLL for (i32 r = 0; r < 2; r++) {
                float total = totals[j][r];
                if constexpr (!half) total += shuffle_xor(total, 1);
                i32 row = j * S::rows + (half ? c : c / 2);
                if (row < m && (half || c % 2 == 0)) here[(warp * m + row) * 16 + g + 8 * r] = total;
                totals[j][r] = 0.0f;
            }
        barrier();
        for (i32 i = thread; i < together * m; i += GEMV_THREADS) {
            i32 row = i % together, b = i / together, n = tile * together + row;
            if (n >= w.n) continue;
            float total = 0.0f;
            for (i32 v = 0; v < ways; v++) total += here[((row / 16 * ways + v) * m + b) * 16 + row % 16];
            if constexpr (FORM == WINT2) total *= from_bf16(((const u16 *)w.parts[2])[n]);
            if constexpr (half) total *= up[b];
            if (parts == 1) {
                y[(i64)b * w.n + n] = total;
            } else {
                partials[((i64)block_y() * m + b) * w.n + n] = total;
            }
        }
        buffer ^= 1; // the one before is free: all have passed a barrier since it was read
        tile += blocks_x();
        if (tile >= reader.tiles) break;
        step = reader.way;
        if constexpr (FORM == WINT2) {
            UNROLL for (i32 r = 0; r < 2; r++) slopes[r] = slopes_next[r], offsets[r] = offsets_next[r];
            line(tile + blocks_x(), slopes_next, offsets_next);
        }
    }
    if (parts == 1) return;
    // The last block of these rows adds up what all have left.
    u32 *last = (u32 *)up + 48;
    fence();
    barrier();
    if (thread == 0) *last = add_atomically(arrived + block_x(), 1) == (u32)parts - 1;
    barrier();
    if (!*last) return;
    fence();
    for (tile = block_x(); tile < reader.tiles; tile += blocks_x())
        for (i32 i = thread; i < together * m; i += GEMV_THREADS) {
            i32 b = i / together, n = tile * together + i % together;
            if (n >= w.n) continue;
            float total = 0.0f;
            for (i32 p = 0; p < parts; p++) total += partials[((i64)p * m + b) * w.n + n];
            y[(i64)b * w.n + n] = total;
        }
    if (thread == 0) arrived[block_x()] = 0; // for the next product
}

#define GEMV(NAME, BATCH, FORM, BITS, UNIT)                                                                                      \
    extern "C" __global__ GEMV_BOUND void NAME##_##BATCH(float *y /* (M, N) */, const float *x /* (M, K) */, Weight w, i32 m,      \
                                                         float *partials, u32 *arrived, i32 part, i32 ways) {                    \
        few_rows<FORM, BITS, UNIT, BATCH>(y, x, w, m, partials, arrived, part, ways);                                            \
    }
#define GEMVS(NAME, FORM, BITS, UNIT)                                                                                            \
    GEMV(NAME, 4, FORM, BITS, UNIT) GEMV(NAME, 8, FORM, BITS, UNIT) GEMV(NAME, 16, FORM, BITS, UNIT)
GEMVS(gemv_bf16, BF16, 0, 16)     // K a multiple of 8
GEMVS(gemv_int8, AFFINE, 8, 16)   // of 16, groups of 64, 128, 256 ... or a row
GEMVS(gemv_int4, AFFINE, 4, 8)    // the same
GEMVS(gemv_int4_32, AFFINE, 4, 4) // groups of 32
GEMVS(gemv_wint2, WINT2, 0, 16)
GEMVS(gemv_nf4, NF4, 0, 8)
