// The micro-kernel of products of bfloat16 pairs, sums in float32. Included by sources of the level avx512_bf16 only.
//
// Owns register blocking: some rows, broadcast pair by pair, times 16 columns of pairs that lie side by side. A row is summed in
// order, whatever other rows there are. Read `bf16.cpp` and `vision_bf16.cpp`, which use it.
#pragma once
#include "layout.h"
#include "vec.h"

namespace gemcutter {
namespace {

constexpr int BF16_ROWS = 14;  // accumulators fill the registers but for the panel's

inline V dot_pairs(V sum, __m512i a, __m512i b) {
#if defined(GC_EMULATE)
    return _mm512_dpbf16_ps(sum, a, b);
#else
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
}

template <int R>
inline void pair_tile(const uint32_t *a, int64_t lda, const uint32_t *panel, int64_t ldp, int64_t pairs, float *out, int64_t ldo,
                      bool add) {
    V acc[R];
    for (int r = 0; r < R; ++r) acc[r] = add ? load(out + r * ldo) : set1(0.0f);
    const uint32_t *row[(R + 2) / 3];  // every third row, so that pointers and strides fit in the registers
    for (int r = 0; r < R; r += 3) row[r / 3] = a + r * lda;
    for (int64_t i = 0; i < pairs; ++i) {
        __m512i b = _mm512_loadu_si512(panel + i * ldp);
        for (int r = 0; r < R; ++r) acc[r] = dot_pairs(acc[r], b, _mm512_set1_epi32((int)row[r / 3][r % 3 * lda]));
        for (int r = 0; r < R; r += 3) ++row[r / 3];
    }
    for (int r = 0; r < R; ++r) store(out + r * ldo, acc[r]);
}

// to [M, H * 16] = from (null: 0) + M rows of pairs, `lda` apart, times `count` pairs of H panels, `ldp` apart.
template <int M, int H>
inline void pair_tiles(const uint32_t *a, int64_t lda, const uint32_t *panels, int64_t ldp, int64_t count, const float *from,
                       int64_t ldf, float *to, int64_t ldo) {
    V total[M][H];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
        for (int h = 0; h < H; ++h) total[m][h] = from ? load(from + m * ldf + h * W) : set1(0.0f);
    const uint32_t *row[(M + 2) / 3];
    for (int m = 0; m < M; m += 3) row[m / 3] = a + m * lda;
    for (int64_t i = 0; i < count; ++i) {
        __m512i b[H];
#pragma GCC unroll 3
        for (int h = 0; h < H; ++h) b[h] = _mm512_loadu_si512(panels + h * ldp + i * PANEL);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            __m512i x = _mm512_set1_epi32((int)row[m / 3][m % 3 * lda + i]);
            in_register(x);
#pragma GCC unroll 3
            for (int h = 0; h < H; ++h) total[m][h] = dot_pairs(total[m][h], b[h], x);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
        for (int h = 0; h < H; ++h) store(to + m * ldo + h * W, total[m][h]);
}

template <int R>
inline void pair_rest(int64_t rows, const uint32_t *a, int64_t lda, const uint32_t *panel, int64_t ldp, int64_t pairs, float *out,
                      int64_t ldo, bool add) {
    if (rows == R) return pair_tile<R>(a, lda, panel, ldp, pairs, out, ldo, add);
    if constexpr (R > 1) pair_rest<R - 1>(rows, a, lda, panel, ldp, pairs, out, ldo, add);
}

// out[m * ldo + c] = (add ? itself : 0) + the products of `count` rows of pairs with 16 columns of pairs, `ldp` apart.
inline void pair_panel(const uint32_t *a, int64_t lda, int64_t count, const uint32_t *panel, int64_t ldp, int64_t pairs,
                       float *out, int64_t ldo, bool add) {
    for (; count >= BF16_ROWS; count -= BF16_ROWS, a += BF16_ROWS * lda, out += BF16_ROWS * ldo)
        pair_tile<BF16_ROWS>(a, lda, panel, ldp, pairs, out, ldo, add);
    pair_rest<BF16_ROWS - 1>(count, a, lda, panel, ldp, pairs, out, ldo, add);
}

}  // namespace
}  // namespace gemcutter
