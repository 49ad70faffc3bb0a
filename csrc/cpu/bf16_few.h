// Products of bfloat16 matrices with up to 16 rows that are rounded to bfloat16. Included by sources of the level avx512_bf16 only.
//
// Owns register blocking: vectors of 32 columns of some matrix rows, where they lie, times those of some activation rows; a sum has
// a lane for every two columns, so nothing is converted or turned. A row is summed in the same order beside any others. Read
// `dense.cpp` for the same without products of bfloat16, `bf16.cpp` for more rows.
#pragma once
#include "kernels.h"
#include "matmul_bf16.h"
#include "matmul_f32.h"
#include "matrix_rows.h"

namespace gemcutter {
namespace {

constexpr int64_t FEW_COLUMNS = 32;  // of one product
constexpr int MATRIX_ROWS = 4;
constexpr int MOST_AT_ONCE = 6;  // activation rows; their sums and four matrix rows fill the registers

// out[i * ld + r] = products of M activation rows with R matrix rows.
template <int M, int R>
void few_tile(const gc_matrix &m, int64_t row, const uint16_t *x, float *out, int64_t ld) {
    const uint16_t *w[R];
    for (int r = 0; r < R; ++r) w[r] = reinterpret_cast<const uint16_t *>(row_of(m, row + r));
    V total[M][R];
    for (int i = 0; i < M; ++i)
        for (int r = 0; r < R; ++r) total[i][r] = set1(0.0f);
    const int64_t columns = m.columns, ahead = m.stride <= SHORT_ROW ? R * m.stride : 0;
    int64_t k = 0;
    for (; k + FEW_COLUMNS <= columns; k += FEW_COLUMNS) {
        __m512i b[R];
        for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char *>(w[r] + k) + ahead);
        for (int r = 0; r < R; ++r) b[r] = _mm512_loadu_si512(w[r] + k);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const __m512i a = _mm512_loadu_si512(x + i * columns + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total[i][r] = dot_pairs(total[i][r], b[r], a);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int r = 0; r < R; ++r) {
            float whole = sum(total[i][r]);
            for (int64_t c = k; c < columns; ++c) whole += Bf16::one(x + i * columns + c) * Bf16::one(w[r] + c);
            out[i * ld + r] = whole;
        }
}

template <int M>
void few_rows(int64_t count, const gc_matrix &m, int64_t first, int64_t last, const uint16_t *x, float *out, int64_t ld) {
    if constexpr (M > 1)
        if (count < M) return few_rows<M - 1>(count, m, first, last, x, out, ld);
    int64_t row = first;
    for (; row + MATRIX_ROWS <= last; row += MATRIX_ROWS) few_tile<M, MATRIX_ROWS>(m, row, x, out + row - first, ld);
    for (; row < last; ++row) few_tile<M, 1>(m, row, x, out + row - first, ld);
}

// `count` rows times a panel, in equal passes; after the first one the panel is in the cache.
inline void multiply_few(const gc_matrix &m, int64_t panel, const uint16_t *x, int64_t count, float *out, int64_t ld) {
    const int64_t first = panel * PANEL, last = first + PANEL < m.rows ? first + PANEL : m.rows;
    for (int64_t passes = (count + MOST_AT_ONCE - 1) / MOST_AT_ONCE; passes > 0; --passes) {
        const int64_t some = (count + passes - 1) / passes;
        few_rows<MOST_AT_ONCE>(some, m, first, last, x, out, ld);
        count -= some, x += some * m.columns, out += some * ld;
    }
}

}  // namespace
}  // namespace gemcutter
