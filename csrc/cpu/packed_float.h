// Products of a panel with float32 activations: a run of columns is dequantized, then multiplied in float32.
//
// Used where the reference's numerics are asked for (activations rounded to bfloat16, or not rounded at all). Included by level
// sources only; refuses to know int8. Read `packed_int8.h` for the faster kernels.
#pragma once
#include "packed_tiles.h"

namespace gemcutter {
namespace {

constexpr int64_t FLOAT_RUN = 8;              // blocks: 16 KB of values
constexpr int FLOAT_ROWS = W == 16 ? 12 : 6;  // sums of 6 x 16 fill the registers of AVX2

struct FloatRun {
    alignas(64) float values[FLOAT_RUN * BLOCK][PANEL];
};

// M rows times the columns of a run, added to out unless it is the first run. As in float_gemv, each block has its own
// sum: the sums are independent of each other, and a row's result is the same for any number of rows.
template <int M>
void float_tile(const FloatRun &run, int64_t first_column, int64_t columns, const Rows &rows, int64_t row, float *out, int64_t ld,
                int width) {
    V total[M][PARTS];
    const float *x = rows.x + row * rows.columns + first_column;
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < PARTS; ++h) total[m][h] = zero();
    if (first_column)
        for (int m = 0; m < M; ++m) load_row(out + m * ld, width, total[m]);
    for (int64_t start = 0; start < columns; start += BLOCK) {
        V sum[M][PARTS];
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < PARTS; ++h) sum[m][h] = zero();
        for (int64_t c = start; c < start + BLOCK; ++c) {
            V w[PARTS];
            for (int h = 0; h < PARTS; ++h) w[h] = load(run.values[c] + h * W);
#pragma GCC unroll 12
            for (int m = 0; m < M; ++m)
                for (int h = 0; h < PARTS; ++h) sum[m][h] = fma(set1(x[m * rows.columns + c]), w[h], sum[m][h]);
        }
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < PARTS; ++h) total[m][h] = total[m][h] + sum[m][h];
    }
    for (int m = 0; m < M; ++m) store_row(out + m * ld, width, total[m]);
}

// GEMV-like: M rows times a panel, whose values are never stored.
template <int PIECES, int M>
void float_gemv(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t row, float *out, int64_t ld) {
    PanelDecoder<PIECES> decoder(m, panel);
    V total[M][PARTS];
    for (int i = 0; i < M; ++i)
        for (int h = 0; h < PARTS; ++h) total[i][h] = zero();
    const float *x = rows.x + row * rows.columns;
    for (int64_t block = 0; block < rows.columns / BLOCK; ++block, x += BLOCK) {
        V sum[M][PARTS];
        for (int i = 0; i < M; ++i)
            for (int h = 0; h < PARTS; ++h) sum[i][h] = zero();
        each_value(m, decoder, [&](int column, int part, V value) {
            for (int i = 0; i < M; ++i) sum[i][part] = fma(set1(x[i * rows.columns + column]), value, sum[i][part]);
        });
        for (int i = 0; i < M; ++i)
            for (int h = 0; h < PARTS; ++h) total[i][h] = total[i][h] + sum[i][h];
    }
    for (int i = 0; i < M; ++i) store_row(out + i * ld, width_of(m, panel), total[i]);
}

template <int PIECES>
void float_panel(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t first, int64_t last, float *out, int64_t ld,
                 void *scratch) {
    if constexpr (STREAM_ROWS > 0) {
        if (last - first == 1) return float_gemv<PIECES, 1>(m, panel, rows, first, out, ld);
        if (last - first == 2) return float_gemv<PIECES, 2>(m, panel, rows, first, out, ld);
    }
    FloatRun &run = *static_cast<FloatRun *>(scratch);
    PanelDecoder<PIECES> decoder(m, panel);
    const int64_t all = rows.columns / BLOCK;
    const int width = width_of(m, panel);
    for (int64_t start = 0; start < all; start += FLOAT_RUN) {
        const int64_t blocks = all - start < FLOAT_RUN ? all - start : FLOAT_RUN;
        const int64_t column = start * BLOCK, columns = blocks * BLOCK;
        dequantize(m, decoder, blocks, run.values[0]);
        int64_t row = first;
        float *to = out;
        for (; row + FLOAT_ROWS <= last; row += FLOAT_ROWS, to += FLOAT_ROWS * ld)
            float_tile<FLOAT_ROWS>(run, column, columns, rows, row, to, ld, width);
        for (; row + 3 <= last; row += 3, to += 3 * ld) float_tile<3>(run, column, columns, rows, row, to, ld, width);
        for (; row < last; ++row, to += ld) float_tile<1>(run, column, columns, rows, row, to, ld, width);
    }
}

}  // namespace
}  // namespace gemcutter
