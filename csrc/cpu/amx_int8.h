// Products of packed panels with up to 16 int8 rows by AMX's integer tiles: tokens of several sequences, guesses, an expert's rows.
// Included by sources of the level amx only.
//
// Owns the order of steps: a block of 32 columns is unpacked to bytes, multiplied as one tile of codes with 16 rows, and its sums
// are converted, scaled and added in vector registers; each step is about another block, so that none waits for the one before.
// The integer sums are exact and the float operations are those of `packed_int8.h` in their order: a row's result is the same in
// both, whatever the number of rows. Read `packed_dot.h` for what codes become, `amx.cpp` for who chooses.
#pragma once
#include "amx_tiles.h"
#include "packed_int8.h"

namespace gemcutter {
namespace {

// From so many rows on tiles take less time than vectors; where a scale has 16 columns, a block takes two of each kind of tile.
constexpr int64_t least_int8_rows(int pieces) { return pieces == 1 ? 11 : 13; }

// How many blocks codes are unpacked before they are multiplied, and multiplied before their sums are added: neither a tile nor a
// vector can be loaded from stores that have not reached the cache.
constexpr int64_t UNPACKED_AHEAD = 2, MULTIPLIED_AHEAD = 4, RING = 8;
static_assert(FEW_ROWS == TILE_HEIGHT && least_int8_rows(1) + SPARE_ROWS >= TILE_HEIGHT, "whole tiles of rows are read");
static_assert(UNPACKED_AHEAD + MULTIPLIED_AHEAD < RING, "a block's place is free when the next one comes");

// Tiles 0 and 1: sums; 4 and 5: rows, as many columns as have a scale; 6 and 7: the codes of these columns in quads.
template <int PIECES>
inline void configure_int8() {
    TileShapes shapes;
    for (int tile = 0; tile < 2; ++tile) {
        shapes.set(tile, TILE_HEIGHT, TILE_LINE);
        shapes.set(4 + tile, TILE_HEIGHT, BLOCK / PIECES);
        shapes.set(6 + tile, QUADS / PIECES, TILE_LINE);
    }
    shapes.configure();
}

// What blocks wait in from one step to the next.
template <int PIECES>
struct Int8Ring {
    alignas(64) uint8_t codes[RING][QUADS * QUAD_BYTES];
    alignas(64) int32_t sums[RING][PIECES][TILE_FLOATS];
    V scale[RING][PIECES], bias[RING][PIECES];
};

// Makes bytes of a block's codes, and keeps its scales.
template <bool IS_BIASED, class Code, int PIECES>
GC_INLINE void unpack_to_ring(const CodeReader<Code> &reader, const uint8_t *from, const Scales<PIECES> &scales,
                              Int8Ring<PIECES> &ring, int64_t block) {
    uint8_t *codes = ring.codes[block % RING];
#pragma GCC unroll 8
    for (int j = 0; j < QUADS; ++j) _mm512_storeu_si512(codes + j * QUAD_BYTES, reader.quad(from, 0, j));
    for (int piece = 0; piece < PIECES; ++piece) {
        ring.scale[block % RING][piece] = scales.scale[piece][0];
        if (IS_BIASED) ring.bias[block % RING][piece] = scales.bias[piece][0];
    }
}

// Multiplies a block's codes with its columns of rows that are `stride` bytes apart; blocks take turns with two sets of tiles.
template <int PIECES>
GC_INLINE void multiply_block(Int8Ring<PIECES> &ring, int64_t block, const int8_t *rows, int64_t stride) {
    const uint8_t *codes = ring.codes[block % RING];
    int32_t (*sums)[TILE_FLOATS] = ring.sums[block % RING];
    memory_is_read(codes);
#define GC_MULTIPLY(PIECE, SUMS, ROWS, CODES)                                        \
    _tile_loadd(CODES, codes + (PIECE) * (QUADS / PIECES) * QUAD_BYTES, QUAD_BYTES); \
    _tile_loadd(ROWS, rows + (PIECE) * (BLOCK / PIECES), stride);                    \
    _tile_zero(SUMS);                                                                \
    _tile_dpbsud(SUMS, ROWS, CODES);                                                 \
    _tile_stored(SUMS, sums[PIECE], TILE_LINE);
    if (PIECES > 1) {
        GC_MULTIPLY(0, 0, 4, 6)
        GC_MULTIPLY(PIECES - 1, 1, 5, 7)
    } else if (block % 2) {
        GC_MULTIPLY(0, 1, 5, 7)
    } else {
        GC_MULTIPLY(0, 0, 4, 6)
    }
#undef GC_MULTIPLY
}

// Adds a block's sums, which are column `b` of the rows' run, to the totals.
template <int PIECES, bool IS_BIASED>
GC_INLINE void add_sums(const Int8Ring<PIECES> &ring, int64_t block, const RowRun<PIECES, TILE_HEIGHT> &rows, int64_t b,
                        V (&total)[TILE_HEIGHT]) {
#pragma GCC unroll 2
    for (int piece = 0; piece < PIECES; ++piece) {
        const V scale = ring.scale[block % RING][piece], bias = ring.bias[block % RING][piece];
        const int32_t *sums = ring.sums[block % RING][piece];
#pragma GCC unroll 16
        for (int m = 0; m < TILE_HEIGHT; ++m) {
            const V sum = to_float(_mm512_loadu_si512(sums + m * PANEL));
            total[m] = fma(scale, fma(sum, set1(rows.scale[m][b]), set1(rows.shift[m][piece][b])), total[m]);
            if (IS_BIASED) total[m] = fma(bias, set1(rows.sum[m][piece][b]), total[m]);
        }
    }
}

// `count` rows from `row` on times a panel. Rows beyond the last are read, up to 16, and what follows from them is dropped.
template <class Code, int PIECES, bool IS_BIASED>
void int8_tile(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t row, int64_t count, float *out, int64_t ld,
               const void *next) {
    constexpr int CODE_BYTES = (int)code_block_bytes(Code::KIND);
    PanelDecoder<PIECES> decoder(m, panel);
    const CodeReader<Code> reader(m);
    Int8Ring<PIECES> ring;
    const CodesAhead codes_ahead(m, panel, next);
    const int64_t all = rows.columns / BLOCK;
    const int8_t *q = rows.q + row * rows.columns;
    V total[TILE_HEIGHT];
#pragma GCC unroll 16
    for (int i = 0; i < TILE_HEIGHT; ++i) total[i] = zero();
    const float offset = (float)(m.offset - CodeReader<Code>::SHIFT);
    int64_t step = -UNPACKED_AHEAD;
    for (int64_t start = 0; start < all; start += RUN) {
        const int64_t blocks = all - start < RUN ? all - start : RUN;
        const RowRun<PIECES, TILE_HEIGHT> own(rows, row, start, blocks, offset, IS_BIASED);
        for (int64_t b = 0; b < blocks; ++b) {
            for (; step <= start + b + MULTIPLIED_AHEAD; ++step) {  // once, but for the first block
                if (step + UNPACKED_AHEAD < all) {
                    const uint8_t *codes = decoder.next();
                    codes_ahead.look<CODE_BYTES>(codes);
                    unpack_to_ring<IS_BIASED>(reader, codes, decoder.scales, ring, step + UNPACKED_AHEAD);
                }
                if (step >= 0 && step < all) multiply_block(ring, step, q + step * BLOCK, rows.columns);
            }
            add_sums<PIECES, IS_BIASED>(ring, start + b, own, b, total);
        }
    }
    const int width = width_of(m, panel);
#pragma GCC unroll 16
    for (int i = 0; i < TILE_HEIGHT; ++i)
        if (i < count) store_row(out + i * ld, width, total + i);
}

template <class Code, int PIECES>
auto *int8_tile_of(const gc_matrix &m) {
    return has_bias(m) ? int8_tile<Code, PIECES, true> : int8_tile<Code, PIECES, false>;
}

// Rows first..last-1, `least_int8_rows` to 16, times neighbouring panels.
template <int PIECES>
void multiply_int8_rows(const gc_matrix &m, int64_t panel, int64_t panels, const Rows &rows, int64_t first, int64_t last,
                        float *out, int64_t ld, const void *next) {
    auto *run = m.codes == GC_U4   ? int8_tile_of<Code4, PIECES>(m)
                : m.codes == GC_U6 ? int8_tile_of<Code6, PIECES>(m)
                : m.codes == GC_S8 ? int8_tile_of<Code8, PIECES>(m)
                                   : int8_tile_of<CodeT4<128>, PIECES>(m);
    configure_int8<PIECES>();
    for (; panels > 0; --panels, ++panel, out += PANEL)
        run(m, panel, rows, first, last - first, out, ld, panels > 1 ? nullptr : next);
    release_tiles();
}

}  // namespace
}  // namespace gemcutter
