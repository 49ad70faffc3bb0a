// One float vector type for all levels: V, of W lanes. Included by level sources only, which are compiled once per level.
#pragma once
#include <stdint.h>
#include <string.h>

#include "intrinsics.h"

#define GC_JOIN2(a, b) a##_##b
#define GC_JOIN(a, b) GC_JOIN2(a, b)
#define GC_NAME(name) GC_JOIN(name, GC_LEVEL)  // vector_ops -> vector_ops_avx2

namespace gemcutter {
namespace {

#if defined(GC_LEVEL_AVX512)
constexpr int W = 16;
typedef __m512 V;
inline V load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, V v) { _mm512_storeu_ps(p, v); }
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline V vmin(V a, V b) { return _mm512_min_ps(a, b); }
inline float sum(V v) { return _mm512_reduce_add_ps(v); }
inline float top(V v) { return _mm512_reduce_max_ps(v); }
inline V load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
inline V load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

#elif defined(GC_LEVEL_AVX2)
constexpr int W = 8;
typedef __m256 V;
inline V load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, V v) { _mm256_storeu_ps(p, v); }
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V vmax(V a, V b) { return _mm256_max_ps(a, b); }
inline V vmin(V a, V b) { return _mm256_min_ps(a, b); }
inline float sum(V v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float top(V v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline V load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
inline V load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
#elif defined(GC_LEVEL_NEON)
constexpr int W = 4;
typedef float32x4_t V;
inline V load(const float *p) { return vld1q_f32(p); }
inline void store(float *p, V v) { vst1q_f32(p, v); }
inline V set1(float x) { return vdupq_n_f32(x); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V vmax(V a, V b) { return vmaxq_f32(a, b); }
inline V vmin(V a, V b) { return vminq_f32(a, b); }
inline float sum(V v) { return vaddvq_f32(v); }
inline float top(V v) { return vmaxvq_f32(v); }
inline V load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline V load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
#else
constexpr int W = 8;
typedef float V __attribute__((vector_size(32)));
inline V load(const float *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float *p, V v) { memcpy(p, &v, sizeof v); }
inline V set1(float x) { return V{x, x, x, x, x, x, x, x}; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V vmax(V a, V b) { return a > b ? a : b; }
inline V vmin(V a, V b) { return a < b ? a : b; }
inline float sum(V v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
inline float top(V v) {
    float best = v[0];
    for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
    return best;
}
inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff, bits;
    float value;
    if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
        value = (float)mantissa * 5.9604644775390625e-08f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    }
    memcpy(&value, &bits, 4);
    return value;
}
inline V load_bf16(const uint16_t *p) {
    V v;
    for (int i = 0; i < W; ++i) {
        uint32_t bits = (uint32_t)p[i] << 16;
        float value;
        memcpy(&value, &bits, 4);
        v[i] = value;
    }
    return v;
}
inline V load_f16(const uint16_t *p) {
    V v;
    for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i]);
    return v;
}
#endif

// Keeps the compiler from loading a value anew for every use of it.
template <typename Vector>
inline void in_register(Vector &value) {
#if defined(GC_EMULATE) || !defined(__x86_64__)
    (void)value;
#elif defined(GC_LEVEL_AVX512)
    __asm__("" : "+v"(value));
#else
    __asm__("" : "+x"(value));
#endif
}

}  // namespace
}  // namespace gemcutter
