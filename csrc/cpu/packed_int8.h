// Products of a panel with int8 activations: GEMV-like straight from the packed codes for a few rows, GEMM-like from unpacked
// runs of columns for many.
//
// Owns the float side: the sum over blocks of scale * (a * dot(code, q) + offset * sum) + bias * sum. Both do the
// same operations in the same order, so a row's result does not depend on how many rows there are. Included by level sources
// only; refuses to know threads. Read `packed_dot.h` for the integer side, `packed.cpp` for the choice of kernel.
#pragma once
#include "packed_dot.h"

namespace gemcutter {
namespace {

constexpr int64_t RUN = 16;  // blocks unpacked at once: 8 KB of codes, which fit the L1 cache together with scales and rows

// M neighbouring rows, some blocks of them. Rows are reached by strides: arrays of pointers would live in memory.
template <int PIECES, int M>
struct RowRun {
    const int8_t *q;
    const float *scale, *sum;
    int64_t columns, blocks;                    // strides
    float halves[PIECES == 2 ? M : 1][2][RUN];  // with scales for 16 columns: `sum` of each half block

    GC_INLINE RowRun(const Rows &rows, int64_t row, int64_t first, int64_t count)
        : q(rows.q + row * rows.columns + first * BLOCK),
          scale(rows.scale + row * (rows.columns / BLOCK) + first),
          sum(rows.sum + row * (rows.columns / BLOCK) + first),
          columns(rows.columns),
          blocks(rows.columns / BLOCK) {
        if (PIECES == 2)
            for (int m = 0; m < M; ++m) sum_halves(q + m * columns, scale + m * blocks, count, halves[m][0], RUN);
    }
};

// Adds the products of block b to the totals of H parts of the panel from `part` on: all columns of one scale at a time.
template <class CodeReader, int PIECES, int M, int H>
GC_INLINE void add_block(const uint8_t *codes, int part, const Scales<PIECES> &scales, bool is_biased, float offset,
                         const RowRun<PIECES, M> &rows, int64_t b, V (*total)[PARTS]) {
    constexpr int COUNT = QUADS / PIECES;
#pragma GCC unroll 2
    for (int piece = 0; piece < PIECES; ++piece) {
        N sums[M][H];
        dot<CodeReader, COUNT, M, H>(codes, part, piece * COUNT, rows.q + b * BLOCK, rows.columns, sums);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const float a = rows.scale[m * rows.blocks + b];
            const float sum = PIECES == 1 ? rows.sum[m * rows.blocks + b] : rows.halves[m][piece][b];
            const V shift = set1(sum * offset);
#pragma GCC unroll 2
            for (int h = 0; h < H; ++h) {
                V &t = total[m][part + h];
                t = fma(scales.scale[piece][part + h], fma(to_float(sums[m][h]), set1(a), shift), t);
                if (is_biased) t = fma(scales.bias[piece][part + h], set1(sum), t);
            }
        }
    }
}

GC_INLINE void load_row(const float *from, int width, V *to) {
    alignas(64) float padded[PANEL] = {};
    if (width < PANEL) memcpy(padded, from, sizeof(float) * (size_t)width);
    for (int h = 0; h < PARTS; ++h) to[h] = load((width < PANEL ? padded : from) + h * W);
}

GC_INLINE void store_row(float *to, int width, const V *from) {
    alignas(64) float padded[PANEL];
    for (int h = 0; h < PARTS; ++h) store((width < PANEL ? padded : to) + h * W, from[h]);
    if (width < PANEL) memcpy(to, padded, sizeof(float) * (size_t)width);
}

inline int width_of(const gc_matrix &m, int64_t panel) {
    const int64_t left = m.rows - panel * PANEL;
    return left < PANEL ? (int)left : PANEL;
}

// GEMV-like: M rows times a panel in one pass over its packed codes.
template <class Code, int PIECES, int M>
void int8_gemv(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t row, float *out, int64_t ld, const void *next) {
    using From = CodeReader<Code, false>;
    PanelDecoder<PIECES> decoder(m, panel);
    V total[M][PARTS];
    for (int i = 0; i < M; ++i)
        for (int h = 0; h < PARTS; ++h) total[i][h] = zero();
    constexpr int CODE_BYTES = Code::KIND == GC_U4 ? 256 : Code::KIND == GC_U6 ? 384 : 512;
    const float offset = (float)(m.offset - From::SHIFT);
    const int64_t all = rows.columns / BLOCK;
    const uint8_t *end = panel_of(m, panel) + m.stride;
    const int64_t jump = next ? static_cast<const uint8_t *>(next) - end : 0;
    for (int64_t start = 0; start < all; start += RUN) {
        const int64_t blocks = all - start < RUN ? all - start : RUN;
        const RowRun<PIECES, M> own(rows, row, start, blocks);
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t *codes = decoder.next();
            const uint8_t *ahead = codes + PREFETCH_BYTES < end ? codes + PREFETCH_BYTES : codes + PREFETCH_BYTES + jump;
#pragma GCC unroll 9
            for (int i = 0; i <= CODE_BYTES; i += 64) __builtin_prefetch(ahead + i);
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; ++part)
                add_block<From, PIECES, M, 1>(codes, part, decoder.scales, decoder.is_biased, offset, own, b, total);
        }
    }
    for (int i = 0; i < M; ++i) store_row(out + i * ld, width_of(m, panel), total[i]);
}

// Blocks that were unpacked, with their scales.
template <int PIECES>
struct Run {
    alignas(64) uint8_t codes[RUN][QUADS * QUAD_BYTES];
    Scales<PIECES> scales[RUN];
};

// M rows times a run's blocks, added to out unless it is the first run.
template <class Code, int PIECES, int M>
void tile(const gc_matrix &m, const Run<PIECES> &run, int64_t first_block, int64_t blocks, const Rows &rows, int64_t row,
          float *out, int64_t ld, int width) {
    using From = CodeReader<Code, true>;
    const RowRun<PIECES, M> own(rows, row, first_block, blocks);
    V total[M][PARTS];
    for (int i = 0; i < M; ++i)
        for (int h = 0; h < PARTS; ++h) total[i][h] = zero();
    if (first_block)
        for (int i = 0; i < M; ++i) load_row(out + i * ld, width, total[i]);
    const float offset = (float)(m.offset - From::SHIFT);
    const bool is_biased = has_bias(m);
    for (int64_t b = 0; b < blocks; ++b)
        add_block<From, PIECES, M, PARTS>(run.codes[b], 0, run.scales[b], is_biased, offset, own, b, total);
    for (int i = 0; i < M; ++i) store_row(out + i * ld, width, total[i]);
}

template <class Code, int PIECES>
void int8_gemm(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t first, int64_t last, float *out, int64_t ld,
               void *scratch) {
    Run<PIECES> &run = *static_cast<Run<PIECES> *>(scratch);
    PanelDecoder<PIECES> decoder(m, panel);
    const int64_t all = rows.columns / BLOCK;
    const int width = width_of(m, panel);
    for (int64_t start = 0; start < all; start += RUN) {
        const int64_t blocks = all - start < RUN ? all - start : RUN;
        for (int64_t b = 0; b < blocks; ++b) {
            unpack_block(Code::KIND, decoder.next(), run.codes[b]);
            run.scales[b] = decoder.scales;
        }
        int64_t row = first;
        float *to = out;
        for (; row + ROWS_AT_ONCE <= last; row += ROWS_AT_ONCE, to += ROWS_AT_ONCE * ld)
            tile<Code, PIECES, ROWS_AT_ONCE>(m, run, start, blocks, rows, row, to, ld, width);
        for (; row + 4 <= last && ROWS_AT_ONCE > 4; row += 4, to += 4 * ld)
            tile<Code, PIECES, 4>(m, run, start, blocks, rows, row, to, ld, width);
        for (; row + 2 <= last; row += 2, to += 2 * ld) tile<Code, PIECES, 2>(m, run, start, blocks, rows, row, to, ld, width);
        for (; row < last; ++row, to += ld) tile<Code, PIECES, 1>(m, run, start, blocks, rows, row, to, ld, width);
    }
}

template <class Code, int PIECES>
void int8_panel(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t first, int64_t last, float *out, int64_t ld,
                void *scratch, const void *next) {
    if constexpr (STREAMS) {
        switch (last - first) {
            case 1: return int8_gemv<Code, PIECES, 1>(m, panel, rows, first, out, ld, next);
            case 2: return int8_gemv<Code, PIECES, 2>(m, panel, rows, first, out, ld, next);
            case 3: return int8_gemv<Code, PIECES, 3>(m, panel, rows, first, out, ld, next);
            case 4: return int8_gemv<Code, PIECES, 4>(m, panel, rows, first, out, ld, next);
            default: break;  // enough rows to make unpacking worth it
        }
    }
    int8_gemm<Code, PIECES>(m, panel, rows, first, last, out, ld, scratch);
}

}  // namespace
}  // namespace gemcutter
