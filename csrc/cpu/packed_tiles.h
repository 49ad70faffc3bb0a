// Products of neighbouring panels with many int8 rows, a tile of rows and panels in registers at a time.
//
// Owns the order of loops: runs of columns are unpacked once for all rows, a broadcast of a row's columns serves all panels, and
// a row's sums wait in scratch memory from run to run. Where an instruction multiplies and adds four bytes, what is left is 8
// integer products for two float ones: products can reach 80 % of the instruction's rate. The float operations are those of
// `packed_int8.h` in the same order: a row's result is the same in both. Included by level sources only; refuses to know threads
// and few rows. Read `packed.cpp` for the choice.
#pragma once
#include "packed_int8.h"

namespace gemcutter {
namespace {

#if defined(GC_LEVEL_AVX512)
constexpr int PANELS_AT_ONCE = 3, TILE_M = 4;
#elif defined(GC_DOT_BYTES)
constexpr int PANELS_AT_ONCE = 1, TILE_M = 6;  // their sums of a block take 12 of 16 registers
#elif defined(GC_LEVEL_AVX2) || defined(GC_LEVEL_NEON)
constexpr int PANELS_AT_ONCE = 1, TILE_M = 4;
#else
constexpr int PANELS_AT_ONCE = 1, TILE_M = 2;
#endif
constexpr int64_t TILE_RUN = 12;  // blocks: 18 KB of codes for three panels, so that rows fit beside them in the L1 cache
constexpr int64_t TILE_ROWS = CHUNK_ROWS + FEW_ROWS;  // at a time: their sums for three panels take 52 KB of the L2 cache
constexpr int PART_BYTES = QUAD_BYTES / PARTS;        // of a quad's codes for W rows of the matrix
static_assert(TILE_M - 1 <= SPARE_ROWS, "tiles read along rows that must exist");

// A run of columns of up to three panels, unpacked.
template <int PIECES>
struct PanelRuns {
    alignas(64) uint8_t codes[PANELS_AT_ONCE * PARTS][TILE_RUN][QUADS * PART_BYTES];
    V scale[TILE_RUN][PIECES][PANELS_AT_ONCE * PARTS], bias[TILE_RUN][PIECES][PANELS_AT_ONCE * PARTS];
};

template <int PIECES>
struct TileScratch {
    PanelRuns<PIECES> runs;
    alignas(64) float shift[TILE_ROWS + 2 * TILE_M][PIECES][RUN];
    alignas(64) float sums[(TILE_ROWS + TILE_M) * PANELS_AT_ONCE * PANEL];
};

// TILE_M rows from the first block of a run on; row m is m strides away.
template <int PIECES>
struct TileRows {
    const int8_t *q;
    const float *scale, *sum, *shift;  // shift: [TILE_M, PIECES, RUN], `sum` times the offset of the matrix' codes
    int64_t columns, blocks;

    GC_INLINE TileRows(const Rows &rows, int64_t row, int64_t block, const float (*shifts)[RUN])
        : q(rows.q + row * rows.columns + block * BLOCK),
          scale(rows.scale + row * (rows.columns / BLOCK) + block),
          sum((PIECES == 1 ? rows.sum : rows.halves) + row * PIECES * (rows.columns / BLOCK) + block),
          shift(shifts[0]),
          columns(rows.columns),
          blocks(rows.columns / BLOCK) {}
    GC_INLINE V scale_of(int m, int64_t b) const { return set1(scale[m * blocks + b]); }
    GC_INLINE V sum_of(int m, int piece, int64_t b) const { return set1(sum[(m * PIECES + piece) * blocks + b]); }
    GC_INLINE V shift_of(int m, int piece, int64_t b) const { return set1(shift[(m * PIECES + piece) * RUN + b]); }
};

// Fills shift [rows, PIECES, RUN] for the blocks of a run.
template <int PIECES>
GC_INLINE void shift_rows(const Rows &rows, int64_t first, int64_t last, int64_t block, int64_t count, float offset,
                          float (*shift)[PIECES][RUN]) {
    const int64_t blocks = rows.columns / BLOCK;
    const float *sums = (PIECES == 1 ? rows.sum : rows.halves) + first * PIECES * blocks + block;
    for (int64_t row = first; row < last; ++row, ++shift)
        for (int piece = 0; piece < PIECES; ++piece, sums += blocks) scale_run(sums, offset, count, (*shift)[piece]);
}

// to [TILE_M, H * W] = from (null: 0) + the products of a run with H parts of panels.
template <class Code, int PIECES, bool IS_BIASED, int H>
void multiply_tile(const PanelRuns<PIECES> &runs, int64_t blocks, const TileRows<PIECES> &rows, const float *from, float *to,
                   int64_t ld) {
    constexpr int COUNT = QUADS / PIECES;
    V total[TILE_M][H];
#pragma GCC unroll 6
    for (int m = 0; m < TILE_M; ++m)
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) total[m][h] = from ? load(from + (m * H + h) * W) : zero();
    const int8_t *q = rows.q;
    for (int64_t b = 0; b < blocks; ++b, q += BLOCK) {
#pragma GCC unroll 2
        for (int piece = 0; piece < PIECES; ++piece) {
            N sums[TILE_M][H];
            const auto quads = [&runs, b](int h, int j) { return load_codes(runs.codes[h][b] + j * PART_BYTES); };
            dot<Code, COUNT, TILE_M, H>(quads, piece * COUNT, q, rows.columns, sums);
#pragma GCC unroll 6
            for (int m = 0; m < TILE_M; ++m) {
                const V a = rows.scale_of(m, b), shift = rows.shift_of(m, piece, b);
#pragma GCC unroll 4
                for (int h = 0; h < H; ++h) {
                    V &t = total[m][h];
                    t = fma(runs.scale[b][piece][h], fma(to_float(sums[m][h]), a, shift), t);
                    if (IS_BIASED) t = fma(runs.bias[b][piece][h], rows.sum_of(m, piece, b), t);
                }
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < TILE_M; ++m)
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) store(to + m * ld + h * W, total[m][h]);
}

// Unpacks the next `blocks` blocks of a panel, whose first part becomes part h of the run.
template <class Code, int PIECES>
GC_INLINE void unpack_run(const gc_matrix &m, PanelDecoder<PIECES> &decoder, int64_t blocks, int h, PanelRuns<PIECES> &runs) {
    [[maybe_unused]] const CodeReader<Code> reader(m);
    for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t *codes = decoder.next();
#if defined(GC_LEVEL_AVX512) || defined(GC_LEVEL_AVX2) || defined(GC_LEVEL_NEON)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part)
#pragma GCC unroll 8
            for (int j = 0; j < QUADS; ++j) {
                const auto quad = reader.quad(codes, part, j);
                memcpy(runs.codes[h + part][b] + j * PART_BYTES, &quad, sizeof quad);
            }
#else
        uint8_t bytes[QUADS * QUAD_BYTES];
        unpack_block(m, codes, bytes);
        for (int i = 0; i < QUADS * PARTS; ++i)
            memcpy(runs.codes[h + i % PARTS][b] + i / PARTS * PART_BYTES, bytes + i * PART_BYTES, PART_BYTES);
#endif
        for (int part = 0; part < PARTS; ++part)
            for (int piece = 0; piece < PIECES; ++piece) {
                runs.scale[b][piece][h + part] = decoder.scales.scale[piece][part];
                runs.bias[b][piece][h + part] = decoder.scales.bias[piece][part];
            }
    }
}

// Rows first..last-1, TILE_ROWS at most, times H panels. Up to TILE_M - 1 rows beyond the last are read, and what follows from them
// is dropped.
template <class Code, int PIECES, bool IS_BIASED, int H>
void multiply_panels(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t first, int64_t last, float *out, int64_t ld,
                     TileScratch<PIECES> &scratch, const void *next) {
#if defined(GC_DOT_BYTES)
    using TileCode = Code8;  // unpacked codes are bytes, whatever they were: one kernel for all
#else
    using TileCode = Code;
#endif
    PanelRuns<PIECES> &runs = scratch.runs;
    const int64_t all = rows.columns / BLOCK, left = m.rows - panel * PANEL, width = left < H * PANEL ? left : H * PANEL;
    const int64_t tiles = (last - first + TILE_M - 1) / TILE_M;
    const float offset = (float)(m.offset - CodeReader<Code>::SHIFT);
    PanelDecoder<PIECES> decoders[] = {{m, panel}, {m, panel + (H > 1 ? 1 : 0)}, {m, panel + (H > 2 ? 2 : 0)}};
    for (int64_t start = 0; start < all; start += TILE_RUN) {
        const int64_t blocks = all - start < TILE_RUN ? all - start : TILE_RUN;
        for (int h = 0; h < H; ++h) unpack_run<Code>(m, decoders[h], blocks, h * PARTS, runs);
        const bool is_last = start + blocks == all;
        const char *ahead_at = reinterpret_cast<const char *>(decoders[0].at);
        if (is_last) ahead_at = next ? static_cast<const char *>(next) : ahead_at + (H - 1) * m.stride;
        LinesAhead<> ahead = {ahead_at, m.stride * blocks / all, m.stride, H};
        const int64_t lines = (ahead.bytes / 64 + 1) * H / tiles + 1;
        auto shift_tile = [&](int64_t row) {
            shift_rows<PIECES>(rows, row, row + TILE_M, start, blocks, offset, scratch.shift + (row - first));
        };
        shift_tile(first);
        for (int64_t row = first; row < last; row += TILE_M) {
            ahead.some(lines);
            // A tile ahead: vectors that were stored just now can't be read as single numbers yet.
            if (row + TILE_M < last) shift_tile(row + TILE_M);
            const TileRows<PIECES> own(rows, row, start, scratch.shift[row - first]);
            float *sums = scratch.sums + (row - first) * H * PANEL;
            const float *from = start ? sums : nullptr;
            const bool is_whole = is_last && row + TILE_M <= last && width == H * PANEL;
            multiply_tile<TileCode, PIECES, IS_BIASED, H * PARTS>(
                runs, blocks, own, from, is_whole ? out + (row - first) * ld : sums, is_whole ? ld : H * PANEL);
            if (!is_last || is_whole) continue;
            for (int64_t i = row; i < row + TILE_M && i < last; ++i)
                memcpy(out + (i - first) * ld, sums + (i - row) * H * PANEL, sizeof(float) * (size_t)width);
        }
    }
}

template <class Code, int PIECES>
void int8_tiles(const gc_matrix &m, int64_t panel, [[maybe_unused]] int64_t panels, const Rows &rows, int64_t first, int64_t last,
                float *out, int64_t ld, void *scratch, const void *next) {
    TileScratch<PIECES> &own = *static_cast<TileScratch<PIECES> *>(scratch);
    auto *run = has_bias(m) ? multiply_panels<Code, PIECES, true, 1> : multiply_panels<Code, PIECES, false, 1>;
    if constexpr (PANELS_AT_ONCE == 3) {
        if (panels == 3) run = has_bias(m) ? multiply_panels<Code, PIECES, true, 3> : multiply_panels<Code, PIECES, false, 3>;
        if (panels == 2) run = has_bias(m) ? multiply_panels<Code, PIECES, true, 2> : multiply_panels<Code, PIECES, false, 2>;
    }
    for (; first < last; first += TILE_ROWS, out += TILE_ROWS * ld)
        run(m, panel, rows, first, last < first + TILE_ROWS ? last : first + TILE_ROWS, out, ld, own, next);
}

}  // namespace
}  // namespace gemcutter
