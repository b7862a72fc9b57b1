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
#include "gemv_read.cuh"

enum { GEMV_WARPS = 16, GEMV_THREADS = 32 * GEMV_WARPS, GEMV_ROWS = 16 };
#ifdef HOST_SHIM
#define GEMV_BOUND
#else
#define GEMV_BOUND __attribute__((launch_bounds(512, 1)))
#endif

// The columns `from` to `from + length` of x, in parts, where `few_rows` looks for them: of each row, piece by piece, of each part,
// the four lanes' eight columns. Powers of two that the sums are to be multiplied by go to `up`.
template <class S> INLINE void stage_parts(u8 *staged, const float *x, i32 k, i32 m, i32 from, i32 length, i32 padded, float *up) {
    i32 warp = thread_x() / 32, lane = thread_x() % 32;
    float *down = up + 16;
    u32 *most = (u32 *)(up + 32);
    if constexpr (S::parts == 2) {
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
            up[thread_x()] = finite ? as_float((exponent - 14) << 23) : S::form == NF4 ? as_float(0x7f800000u) : 1.0f;
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
        if constexpr (S::parts == 2) {
            part_f16<S::paired, S::form == NF4>(parts, eight, down[row]);
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

// Adds what a packet gives to `totals`: for each eight columns of B, of rows g and g + 8. `lines` is where this lane's part of x lies.
// With many rows of x the units of a packet take turns in one loop, the packet going by beneath it: unrolled, reading x ahead
// would take more registers than there are.
template <class S, i32 TILES, bool LOOP, bool LINES>
INLINE void accumulate(float (*totals)[2], Packet<S> *packet, const Weight &w, const Share &share, const Rows &rows, const i32 *lines, i32 tile, i32 step) {
    constexpr bool half = S::form != BF16;
    constexpr i32 together = !LOOP ? S::units : S::unit == 4 ? 2 : S::scales > 1 ? units_of_group<S>() : 1;
    i32 place = step * S::units * S::pieces * S::parts * 64;
    KEEP_LOOP for (i32 turn = 0; turn < S::units / together; turn++) {
        UNROLL for (i32 u = 0; u < together; u++) {
            float scales[2];
            Meaning meanings[2];
            UNROLL for (i32 r = 0; r < 2; r++) {
                meanings[r].table = shared_bytes + share.lane % 16 * 8;
                scales[r] = mean_of<S, LINES>(&meanings[r], w, share, *packet, rows, tile, r, u);
            }
            float sum[TILES][4];
            UNROLL for (i32 j = 0; j < TILES; j++) UNROLL for (i32 i = 0; i < 4; i++) sum[j][i] = 0.0f;
            UNROLL for (i32 i = 0; i < S::pieces; i++) {
                u32 a[2][4], low[2][4];
                UNROLL for (i32 r = 0; r < 2; r++) decode_piece<S, LINES>(a[r], low[r], packet->words[r] + u * (S::unit / 4), i, meanings[r]);
                UNROLL for (i32 j = 0; j < TILES; j++) {
                    Pack b = *(const Pack *)(shared_bytes + lines[j] + place + (u * S::pieces + i) * S::parts * 64);
                    UNROLL for (i32 h = 0; h < 2; h++) {
                        u32 factors[4] = {a[0][2 * h], a[1][2 * h], a[0][2 * h + 1], a[1][2 * h + 1]};
                        if constexpr (half) {
                            multiply_add_f16(sum[j], factors, b.words + 2 * h);
                        } else {
                            multiply_add(sum[j], factors, b.words + 2 * h);
                        }
                        if constexpr (S::form == NF4) {
                            u32 rest[4] = {low[0][2 * h], low[1][2 * h], low[0][2 * h + 1], low[1][2 * h + 1]};
                            multiply_add_f16(sum[j], rest, b.words + 2 * h);
                        }
                    }
                }
            }
            UNROLL for (i32 j = 0; j < TILES; j++)
                UNROLL for (i32 r = 0; r < 2; r++) {
                    if constexpr (!half) {
                        totals[j][r] += share.lane % 2 ? sum[j][2 * r] : sum[j][2 * r] + sum[j][2 * r + 1];
                    } else if constexpr (S::group > 0 || S::form == NF4) {
                        totals[j][r] = fma_(fma_(sum[j][2 * r + 1], 0.00048828125f, sum[j][2 * r]), scales[r], totals[j][r]);
                    } else {
                        totals[j][r] += fma_(sum[j][2 * r + 1], 0.00048828125f, sum[j][2 * r]);
                    }
                }
        }
        if constexpr (together < S::units) {
            pass_units<S, together>(packet);
            place += together * S::pieces * S::parts * 64;
        }
    }
}

// Where a block's things lie: numbers of the rows of x (16, three times), x in parts, sums (2, warps, m, 16). Rows of x that are
// not there are columns that nobody looks at, so any numbers will do for them: with 4 rows at most those of the last that is, with more
// what lies in the room that is kept for 8 or 16.
template <class S> INLINE float *row_numbers() { return (float *)(shared_bytes + S::table); }
template <class S> INLINE i32 staged_at() { return S::table + 256; }
template <class S, i32 BATCH> INLINE float *block_sums(i32 m, i32 part) {
    return (float *)(shared_bytes + staged_at<S>() + (BATCH == 4 ? m : BATCH) * part * 2 * S::parts);
}

// The end of a tile, where the warps' sums meet: lane (g, c) holds rows g and g + 8 of row c of x, or, with three parts, of half of row
// c / 2. What is known here is reckoned anew each time, to leave registers to the loop over steps.
template <class S, i32 BATCH>
INLINE void end_tile(float (*totals)[2], float *y, const Weight &w, i32 m, float *partials, i32 part, i32 way_bits, i32 tile, i32 buffer) {
    constexpr bool half = S::form != BF16;
    i32 thread = anew(thread_x()), warp = thread / 32, g = thread % 32 / 4, c = thread % 4, row_bits = 8 - way_bits;
    m = anew(m);
    float *here = block_sums<S, BATCH>(m, part) + buffer * GEMV_WARPS * 16 * m;
    i32 first = half ? c : c / 2;
    UNROLL for (i32 j = 0; j < BATCH / S::rows; j++)
        UNROLL for (i32 r = 0; r < 2; r++) {
            float total = totals[j][r];
            if constexpr (!half) total += shuffle_xor(total, 1);
            i32 b = first + j * S::rows;
            if (b < m && (half || c % 2 == 0)) here[(warp * m + b) * 16 + g + 8 * r] = total;
            totals[j][r] = 0.0f;
        }
    barrier();
    KEEP_LOOP for (i32 i = thread; i < m << row_bits; i += GEMV_THREADS) {
        i32 row = i & ((1 << row_bits) - 1), b = i >> row_bits, n = (tile << row_bits) + row;
        if (n >= w.n) continue;
        float total = 0.0f;
        const float *theirs = here + ((row / 16 << way_bits) * m + b) * 16 + row % 16;
        KEEP_LOOP for (i32 v = 0; v < 1 << way_bits; v++) total += theirs[v * m * 16];
        if constexpr (S::form == WINT2) total *= from_bf16(((const u16 *)w.parts[2])[n]);
        if constexpr (S::form == AFFINE && S::group == 0) total *= float_at(w.parts[1], w.scale, n);
        if constexpr (half) total *= row_numbers<S>()[b];
        float *to = blocks_y() == 1 ? y + (i64)b * w.n : partials + ((i64)block_y() * m + b) * w.n;
        to[n] = total;
    }
}

// The last block of these rows adds up what all have left.
INLINE void add_partials(float *y, const Weight &w, i32 m, const float *partials, u32 *arrived, const Share &share) {
    i32 thread = anew(thread_x()), row_bits = 8 - share.way_bits;
    u32 *last = (u32 *)shared_bytes; // what was there is done with behind the barrier
    fence();
    barrier();
    if (thread == 0) *last = add_atomically(arrived + block_x(), 1) == (u32)blocks_y() - 1;
    barrier();
    if (!*last) return;
    fence();
    KEEP_LOOP for (i32 tile = block_x(); is_there(w, share, tile); tile += blocks_x())
        KEEP_LOOP for (i32 i = thread; i < m << row_bits; i += GEMV_THREADS) {
            i32 b = i >> row_bits, n = (tile << row_bits) + (i & ((1 << row_bits) - 1));
            if (n >= w.n) continue;
            float total = 0.0f;
            KEEP_LOOP for (i32 p = 0; p < blocks_y(); p++) total += partials[((i64)p * m + b) * w.n + n];
            y[(i64)b * w.n + n] = total;
        }
    if (thread == 0) arrived[block_x()] = 0; // for the next product
}

template <i32 FORM, i32 BITS, i32 UNIT, i32 GROUP, i32 BYTES, i32 BATCH>
INLINE void few_rows(float *y, const float *x, const Weight &w, i32 m, float *partials /* (parts, M, N) */, u32 *arrived, i32 part, i32 way_bits) {
    typedef Shape<FORM, BITS, UNIT, GROUP, BYTES> S;
    constexpr i32 tiles = BATCH / S::rows; // of eight columns of B
    i32 from = block_y() * part, length = w.k - from < part ? w.k - from : part, lane = thread_x() % 32;
    Share share = {from, (length + S::span - 1) / S::span, way_bits, lane};
    Cursor at;
    at.tile = block_x(), at.step = first_step(share);
    UNROLL for (i32 r = 0; r < 2; r++) at.scales[r] = at.zeros[r] = 0;
    stand_at<S>(w, share, &at);
    Packet<S> packet, next;
    Rows rows, next_rows;
    fetch_packet<S>(&packet, w, share, &at);
    read_rows<S>(&rows, w, share, block_x());
    read_rows<S>(&next_rows, w, share, block_x() + blocks_x());
    if constexpr (FORM == NF4) fill_table(shared_bytes, thread_x(), GEMV_THREADS);
    if constexpr (FORM == WINT2) fill_meanings(shared_bytes, thread_x());
    stage_parts<S>(shared_bytes + staged_at<S>(), x, w.k, m, from, length, part, row_numbers<S>());
    barrier();

    // Lane (g, c) holds of B column g in the lanes c of the rows: part g % 2 of row g / 2, or of three parts that of row g / 4.
    i32 g = lane / 4, c = lane % 4, mine = g * S::rows / 8;
    i32 own = S::parts == 2 ? g % 2 : g % 4 < 2 ? g % 4 : 2;
    i32 pitch = part * 2 * S::parts, line = staged_at<S>() + mine * pitch + (own * 4 + c) * 16, lines[tiles];
    UNROLL for (i32 j = 0; j < tiles; j++) lines[j] = line + (BATCH == 4 && j * S::rows + mine >= m ? m - 1 - mine : j * S::rows) * pitch;
    float totals[tiles][2];
    UNROLL for (i32 j = 0; j < tiles; j++) totals[j][0] = totals[j][1] = 0.0f;
    i32 tile = block_x(), step = first_step(share), buffer = 0;
    bool some = (tile << (8 - way_bits)) + (thread_x() / 32 >> way_bits) * 16 < w.n; // of this warp's rows are there
    KEEP_LOOP for (;;) {
        fetch_packet<S>(&next, w, share, &at);
        if (step < share.steps && some) {
            bool formula = FORM == WINT2 && rows.factors[0] == 0; // of all rows of a warp or of none
            if (!formula) accumulate<S, tiles, (BATCH > 4), false>(totals, &packet, w, share, rows, lines, tile, step);
            if constexpr (FORM == WINT2)
                if (formula) accumulate<S, tiles, true, true>(totals, &packet, w, share, rows, lines, tile, step);
        }
        packet = next;
        step += 1 << way_bits;
        if (step < share.steps) continue;
        end_tile<S, BATCH>(totals, y, w, m, partials, part, way_bits, tile, buffer);
        buffer ^= 1; // the one before is free: all have passed a barrier since it was read
        tile += blocks_x();
        if (!is_there(w, share, tile)) break;
        step = first_step(share);
        some = (tile << (8 - way_bits)) + (thread_x() / 32 >> way_bits) * 16 < w.n;
        rows = next_rows;
        read_rows<S>(&next_rows, w, share, tile + blocks_x());
    }
    if (blocks_y() > 1) add_partials(y, w, m, partials, arrived, share);
}

#define GEMV(NAME, BATCH, BYTES, FORM, BITS, UNIT, GROUP)                                                                        \
    extern "C" __global__ GEMV_BOUND void NAME##_##BATCH(float *y /* (M, N) */, const float *x /* (M, K) */, Weight w, i32 m,      \
                                                         float *partials, u32 *arrived, i32 part, i32 way_bits) {                \
        few_rows<FORM, BITS, UNIT, GROUP, BYTES, BATCH>(y, x, w, m, partials, arrived, part, way_bits);                          \
    }
// More rows leave fewer registers for what is under way.
#define GEMVS(NAME, FORM, BITS, UNIT, GROUP)                                                                                     \
    GEMV(NAME, 4, 32, FORM, BITS, UNIT, GROUP) GEMV(NAME, 8, 32, FORM, BITS, UNIT, GROUP) GEMV(NAME, 16, 16, FORM, BITS, UNIT, GROUP)
GEMVS(gemv_bf16, BF16, 0, 16, 0)        // K a multiple of 8
GEMVS(gemv_int8, AFFINE, 8, 16, 0)      // of 16; a scale to a row
GEMVS(gemv_int4, AFFINE, 4, 16, 0)      // of 32; a scale to a row
GEMVS(gemv_int4_128, AFFINE, 4, 8, 128) // of 128; scales of 16 bits, as those that follow
GEMVS(gemv_int4_64, AFFINE, 4, 8, 64)   // of 64
GEMVS(gemv_int4_32, AFFINE, 4, 4, 32)   // of 32
GEMVS(gemv_wint2, WINT2, 0, 16, 0)
GEMV(gemv_nf4, 4, 16, NF4, 0, 8, 0)
GEMV(gemv_nf4, 8, 16, NF4, 0, 8, 0)
GEMV(gemv_nf4, 16, 16, NF4, 0, 8, 0)
