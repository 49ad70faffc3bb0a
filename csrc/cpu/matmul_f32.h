// The float32 micro-kernel, and the packing of 16 matrix rows into its panels. Included by level sources only.
//
// Owns register blocking: some rows of A, broadcast element by element, times a panel [K][16] that stays in the L1 cache. A
// row is summed over k in order, whatever other rows there are. Refuses to know what the rows mean; read `dense.cpp` and
// `attention.cpp`, which use it.
#pragma once
#include "layout.h"
#include "vec.h"

namespace gemcutter {
namespace {

constexpr int PANEL_VECTORS = PANEL / W;
#if defined(GC_LEVEL_AVX512)
constexpr int TILE_ROWS = 14;  // accumulators fill the registers except those for the panel and the broadcast
#elif defined(GC_LEVEL_AVX2)
constexpr int TILE_ROWS = 6;
#elif defined(GC_LEVEL_NEON)
constexpr int TILE_ROWS = 6;
#else
constexpr int TILE_ROWS = 2;
#endif

template <int R>
inline void gemm_tile(const float *a, int64_t lda, const float *panel, int64_t k, float *out, int64_t ldo, bool add) {
    V acc[R][PANEL_VECTORS];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < PANEL_VECTORS; ++c) acc[r][c] = add ? load(out + r * ldo + c * W) : set1(0.0f);
    const float *row[(R + 2) / 3];  // every third row, so that pointers and strides fit in the registers
    for (int r = 0; r < R; r += 3) row[r / 3] = a + r * lda;
    for (int64_t i = 0; i < k; ++i) {
        V b[PANEL_VECTORS];
        for (int c = 0; c < PANEL_VECTORS; ++c) b[c] = load(panel + i * PANEL + c * W);
        for (int r = 0; r < R; ++r) {
            V x = set1(row[r / 3][r % 3 * lda]);
            for (int c = 0; c < PANEL_VECTORS; ++c) acc[r][c] = fma(x, b[c], acc[r][c]);
        }
        for (int r = 0; r < R; r += 3) ++row[r / 3];
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < PANEL_VECTORS; ++c) store(out + r * ldo + c * W, acc[r][c]);
}

template <int R>
inline void gemm_rest(int64_t rows, const float *a, int64_t lda, const float *panel, int64_t k, float *out, int64_t ldo,
                      bool add) {
    if (rows == R) return gemm_tile<R>(a, lda, panel, k, out, ldo, add);
    if constexpr (R > 1) gemm_rest<R - 1>(rows, a, lda, panel, k, out, ldo, add);
}

// out[m * ldo + c] = (add ? itself : 0) + sum over i < k of a[m * lda + i] * panel[i * 16 + c], for 16 columns c.
inline void gemm_panel(const float *a, int64_t lda, int64_t rows, const float *panel, int64_t k, float *out, int64_t ldo,
                       bool add) {
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS, a += TILE_ROWS * lda, out += TILE_ROWS * ldo)
        gemm_tile<TILE_ROWS>(a, lda, panel, k, out, ldo, add);
    if constexpr (TILE_ROWS > 1) gemm_rest<TILE_ROWS - 1>(rows, a, lda, panel, k, out, ldo, add);
}

inline float widen(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Types of stored elements: how one, or a vector of W, becomes float32.
struct Bf16 {
    typedef uint16_t Element;
    static float one(const Element *p) { return widen((uint32_t)*p << 16); }
    static V vector(const Element *p) { return load_bf16(p); }
};
struct F16 {
    typedef uint16_t Element;
    static V vector(const Element *p) { return load_f16(p); }
    static float one(const Element *p) {
        Element padded[W] = {*p};
        float wide[W];
        store(wide, load_f16(padded));
        return wide[0];
    }
};
// Codes that a scale, which whoever reads them knows, makes numbers of.
struct S8 {
    typedef int8_t Element;
    static float one(const Element *p) { return (float)*p; }
    static V vector(const Element *p) {
#if defined(GC_LEVEL_AVX512)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(GC_LEVEL_AVX2)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
        float wide[W];
        for (int i = 0; i < W; ++i) wide[i] = (float)p[i];
        return load(wide);
#endif
    }
};
struct F32 {
    typedef float Element;
    static float one(const Element *p) { return *p; }
    static V vector(const Element *p) { return load(p); }
};

#if defined(GC_LEVEL_AVX2) || defined(GC_LEVEL_AVX512)
inline __m256 eight(const float *p) { return _mm256_loadu_ps(p); }
inline __m256 eight_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline __m256 eight_s8(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }

// Transposes 8 vectors of 8 32-bit lanes.
inline void transpose(__m256 (&v)[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

// Packs columns of 8 rows: out[c * 16 + r]. Returns the number of columns packed.
inline int64_t pack_eight(const uint16_t *const *rows, int64_t columns, float *out, Bf16) {
    int64_t i = 0;
    for (; i + 16 <= columns; i += 16) {  // transposes pairs of columns as 32-bit lanes, then splits each pair
        __m256 v[8];
        for (int r = 0; r < 8; ++r) v[r] = eight((const float *)(rows[r] + i));
        transpose(v);
        const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
        for (int c = 0; c < 8; ++c) {
            __m256i pair = _mm256_castps_si256(v[c]);
            _mm256_storeu_si256((__m256i *)(out + (i + 2 * c) * PANEL), _mm256_slli_epi32(pair, 16));
            _mm256_storeu_si256((__m256i *)(out + (i + 2 * c + 1) * PANEL), _mm256_and_si256(pair, upper));
        }
    }
    return i;
}

template <typename Element, __m256 (*LOAD)(const Element *)>
inline int64_t pack_elements(const Element *const *rows, int64_t columns, float *out) {
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) {
        __m256 v[8];
        for (int r = 0; r < 8; ++r) v[r] = LOAD(rows[r] + i);
        transpose(v);
        for (int c = 0; c < 8; ++c) _mm256_storeu_ps(out + (i + c) * PANEL, v[c]);
    }
    return i;
}
inline int64_t pack_eight(const uint16_t *const *rows, int64_t columns, float *out, F16) {
    return pack_elements<uint16_t, eight_f16>(rows, columns, out);
}
inline int64_t pack_eight(const int8_t *const *rows, int64_t columns, float *out, S8) {
    return pack_elements<int8_t, eight_s8>(rows, columns, out);
}
inline int64_t pack_eight(const float *const *rows, int64_t columns, float *out, F32) {
    return pack_elements<float, eight>(rows, columns, out);
}
#elif defined(GC_LEVEL_NEON)
// Transposes 4 vectors of 4 lanes.
inline void transpose(V (&v)[4]) {
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(v[0], v[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(v[0], v[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(v[2], v[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(v[2], v[3]));
    v[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c)), v[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    v[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c)), v[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

template <typename Type>
inline int64_t pack_eight(const typename Type::Element *const *rows, int64_t columns, float *out, Type) {
    int64_t i = 0;
    for (; i + W <= columns; i += W)
        for (int half = 0; half < 8; half += W) {
            V v[W];
            for (int r = 0; r < W; ++r) v[r] = Type::vector(rows[half + r] + i);
            transpose(v);
            for (int c = 0; c < W; ++c) store(out + (i + c) * PANEL + half, v[c]);
        }
    return i;
}
#else
template <typename Type>
inline int64_t pack_eight(const typename Type::Element *const *, int64_t, float *, Type) {
    return 0;
}
#endif

// panel[c * 16 + r] = element c of row r, in float32, for 16 rows.
template <typename Type>
inline void pack_panel(const typename Type::Element *const *rows, int64_t columns, float *panel) {
    for (int half = 0; half < PANEL; half += 8) {
        int64_t done = pack_eight(rows + half, columns, panel + half, Type());
        for (int r = half; r < half + 8; ++r)
            for (int64_t i = done; i < columns; ++i) panel[i * PANEL + r] = Type::one(rows[r] + i);
    }
}

}  // namespace
}  // namespace gemcutter
