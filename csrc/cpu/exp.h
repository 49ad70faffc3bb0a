// The exponential function on vectors, shared by level sources: the softmax of attention, the GELU and the soft cap.
//
// Owns one polynomial, accurate to about 2 units in the last place from -87 to 88; below that it returns 0 (so exp(-infinity) is
// 0), above it exp(88), and NaN stays NaN. Read `vec.h` first.
#pragma once
#include "vec.h"

namespace gemcutter {
namespace {

// Lanes of `yes` where a < b, of `no` elsewhere.
#if defined(GC_LEVEL_AVX512)
inline V where_less(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
#elif defined(GC_LEVEL_AVX2)
inline V where_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
#elif defined(GC_LEVEL_NEON)
inline V where_less(V a, V b, V yes, V no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
#else
inline V where_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
#endif

constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits of the sum

// 2^n of x = ROUNDER + n.
#if defined(GC_LEVEL_AVX512)
inline V power_of_two(V x) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(x), 23), _mm512_set1_epi32(127 << 23)));
}
#elif defined(GC_LEVEL_AVX2)
inline V power_of_two(V x) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(x), 23), _mm256_set1_epi32(127 << 23)));
}
#elif defined(GC_LEVEL_NEON)
inline V power_of_two(V x) {
    return vreinterpretq_f32_u32(vaddq_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 23), vdupq_n_u32(127u << 23)));
}
#else
inline V power_of_two(V x) {
    typedef uint32_t Bits __attribute__((vector_size(32)));
    Bits bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits << 23) + (127u << 23);
    memcpy(&x, &bits, sizeof x);
    return x;
}
#endif

inline V exp(V x) {
    const V lowest = set1(-87.0f), rounder = set1(ROUNDER);
    V clamped = vmax(lowest, vmin(set1(88.0f), x));  // this order of arguments propagates NaN
    V shifted = fma(clamped, set1(1.44269504f), rounder), n = shifted - rounder;
    V r = fma(n, set1(-0.693145752f), clamped);  // log 2 as a sum of two, the first exact in products with n
    r = fma(n, set1(-1.42860677e-06f), r);
    V p = set1(1.98992878e-04f);
    p = fma(p, r, set1(1.39336525e-03f));
    p = fma(p, r, set1(8.33329847e-03f));
    p = fma(p, r, set1(4.16664649e-02f));
    p = fma(p, r, set1(0.166666667f));
    p = fma(p, r, set1(0.5f));
    V value = fma(p * r, r, r) + set1(1.0f);
    return where_less(x, lowest, set1(0.0f), value * power_of_two(shifted));
}

}  // namespace
}  // namespace gemcutter
