// Products of a panel with a few int8 rows, straight from the packed codes.
//
// Owns the float side: the sum over blocks of scale * (a * dot(code, q) + offset * sum) + bias * sum, in the order of blocks, so
// that a row's result does not depend on how many rows there are. Included by level sources only; refuses to know threads. Read
// `packed_dot.h` for the integer side, `packed_tiles.h` for many rows, `packed.cpp` for the choice of kernel.
#pragma once
#include "packed_dot.h"

namespace gemcutter {
namespace {

#if defined(GC_LEVEL_NEON)
constexpr int PARTS_AT_ONCE = PARTS;  // a row's columns, once loaded, meet all rows of a panel
#else
constexpr int PARTS_AT_ONCE = 1;
#endif
constexpr int64_t RUN = 16;  // blocks whose row scales are brought into one place at once

// to = from * by for the blocks of a run; a whole run takes a few vectors, and nothing beyond `count` is read.
GC_INLINE void scale_run(const float *from, float by, int64_t count, float *to) {
    if (count == RUN) {
#pragma GCC unroll 4
        for (int i = 0; i < RUN; i += W) store(to + i, load(from + i) * set1(by));
        return;
    }
#if defined(GC_LEVEL_AVX512) && !defined(GC_EMULATE)
    _mm512_storeu_ps(to, _mm512_maskz_loadu_ps((__mmask16)((1 << count) - 1), from) * set1(by));
#else
    int64_t b = 0;
    for (; b + 4 <= count; b += 4)
        for (int i = 0; i < 4; ++i) to[b + i] = from[b + i] * by;
    for (; b < count; ++b) to[b] = from[b] * by;
#endif
}

// M neighbouring rows, some blocks of them. Rows of codes are reached by strides: arrays of pointers would live in memory. Scales
// and what follows from them are copied, so that the loops broadcast them from one place on the stack.
template <int PIECES, int M>
struct RowRun {
    const int8_t *q;
    int64_t columns;                                         // stride of q
    alignas(64) float scale[M][RUN], shift[M][PIECES][RUN];  // shift: `sum` times the offset of the matrix' codes
    float sum[M][PIECES][RUN];  // of the columns of each of the matrix' scales; unless it has no biases

    GC_INLINE RowRun(const Rows &rows, int64_t row, int64_t first, int64_t count, float offset, bool is_biased)
        : q(rows.q + row * rows.columns + first * BLOCK), columns(rows.columns) {
        const int64_t blocks = columns / BLOCK;
        const float *scales = rows.scale + row * blocks + first;
        const float *sums = (PIECES == 1 ? rows.sum : rows.halves) + row * PIECES * blocks + first;
        for (int m = 0; m < M; ++m) {
            scale_run(scales + m * blocks, 1.0f, count, scale[m]);
            for (int i = 0; i < PIECES; ++i) {
                scale_run(sums + (m * PIECES + i) * blocks, offset, count, shift[m][i]);
                if (is_biased) scale_run(sums + (m * PIECES + i) * blocks, 1.0f, count, sum[m][i]);
            }
        }
    }
};

// Adds the products of block b to the totals of H parts of the panel from `part` on: all columns of one scale at a time.
template <class Code, int PIECES, int M, int H>
GC_INLINE void add_block(const CodeReader<Code> &reader, const uint8_t *codes, int part, const Scales<PIECES> &scales,
                         bool is_biased, const RowRun<PIECES, M> &rows, int64_t b, V (*total)[PARTS]) {
    constexpr int COUNT = QUADS / PIECES;
#pragma GCC unroll 2
    for (int piece = 0; piece < PIECES; ++piece) {
        N sums[M][H];
        const auto quads = [&reader, codes, part](int h, int j) { return reader.quad(codes, part + h, j); };
        dot<Code, COUNT, M, H>(quads, piece * COUNT, rows.q + b * BLOCK, rows.columns, sums);
        int64_t at = b;
        if (piece > 0) __asm__("" : "+r"(at));  // both pieces' row scales, were they known to be equal, would crowd out the sums
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const V a = set1(rows.scale[m][at]), shift = set1(rows.shift[m][piece][b]);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                V &t = total[m][part + h];
                t = fma(scales.scale[piece][part + h], fma(to_float(sums[m][h]), a, shift), t);
                if (is_biased) t = fma(scales.bias[piece][part + h], set1(rows.sum[m][piece][b]), t);
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

// Asks for the codes that are read PREFETCH_BYTES later: of this panel, or of what the thread reads after it.
class CodesAhead {
  public:
    GC_INLINE CodesAhead(const gc_matrix &m, int64_t panel, const void *next)
        : end_(panel_of(m, panel) + m.stride), jump_(next ? static_cast<const uint8_t *>(next) - end_ : 0) {}
    // A block of BYTES, and the scales before it.
    template <int BYTES>
    GC_INLINE void look(const uint8_t *codes) const {
        const uint8_t *ahead = codes + PREFETCH_BYTES < end_ ? codes + PREFETCH_BYTES : codes + PREFETCH_BYTES + jump_;
#pragma GCC unroll 9
        for (int i = 0; i <= BYTES; i += 64) __builtin_prefetch(ahead + i, 0, IN_L2);
    }

  private:
    const uint8_t *end_;
    int64_t jump_;
};

// GEMV-like: M rows times a panel in one pass over its packed codes.
template <class Code, int PIECES, int M>
void int8_gemv(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t row, float *out, int64_t ld, const void *next) {
    PanelDecoder<PIECES> decoder(m, panel);
    const CodeReader<Code> reader(m);
    V total[M][PARTS];
    for (int i = 0; i < M; ++i)
        for (int h = 0; h < PARTS; ++h) total[i][h] = zero();
    constexpr int CODE_BYTES = (int)code_block_bytes(Code::KIND);
    const float offset = (float)(m.offset - CodeReader<Code>::SHIFT);
    const int64_t all = rows.columns / BLOCK;
    const CodesAhead codes_ahead(m, panel, next);
    for (int64_t start = 0; start < all; start += RUN) {
        const int64_t blocks = all - start < RUN ? all - start : RUN;
        const RowRun<PIECES, M> own(rows, row, start, blocks, offset, decoder.is_biased);
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t *codes = decoder.next();
            codes_ahead.look<CODE_BYTES>(codes);
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; part += PARTS_AT_ONCE)
                add_block<Code, PIECES, M, PARTS_AT_ONCE>(reader, codes, part, decoder.scales, decoder.is_biased, own, b, total);
        }
    }
    for (int i = 0; i < M; ++i) store_row(out + i * ld, width_of(m, panel), total[i]);
}

template <class Code, int PIECES, int M>
GC_INLINE void int8_gemv_of(int64_t count, const gc_matrix &m, int64_t panel, const Rows &rows, int64_t row, float *out,
                            int64_t ld, const void *next) {
    if (count == M) return int8_gemv<Code, PIECES, M>(m, panel, rows, row, out, ld, next);
    if constexpr (M > 1) int8_gemv_of<Code, PIECES, M - 1>(count, m, panel, rows, row, out, ld, next);
}

// GEMV-like, in equal passes of as many rows as the registers hold; after the first pass the panel is in the cache.
template <class Code, int PIECES>
void int8_stream(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t first, int64_t last, float *out, int64_t ld,
                 const void *next) {
    for (int64_t passes = (last - first + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; passes > 0; --passes) {
        const int64_t count = (last - first + passes - 1) / passes;
        int8_gemv_of<Code, PIECES, ROWS_AT_ONCE>(count, m, panel, rows, first, out, ld, next);
        first += count, out += count * ld;
    }
}

}  // namespace
}  // namespace gemcutter
