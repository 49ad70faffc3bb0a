// AVX-512 in plain C++, so that the kernels of wider processors are tested on any x86-64 with AVX2 (-DGC_EMULATE).
//
// Owns functions with the intrinsics' own names in namespace gemcutter: a kernel's unqualified call finds them before the
// compiler's. What is missing here fails to compile, since these builds lack the instructions' flags; add it with the exact
// semantics of the instruction (masks, signedness, no saturation where there is none). Refuses to be fast. Read `tiles.h` for
// AMX.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

// Names that are macros in some compilers, or at some levels of optimization.
#undef _mm256_dpbusd_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_cmpeq_epi32_mask
#undef _mm512_cmpge_epi32_mask
#undef _mm512_cmpgt_epi32_mask
#undef _mm512_cmple_epi32_mask
#undef _mm512_cmplt_epi32_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x4_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_extracti32x4_epi32
#undef _mm512_extracti32x8_epi32
#undef _mm512_extracti64x4_epi64
#undef _mm512_i32gather_epi32
#undef _mm512_i32gather_ps
#undef _mm512_insertf32x8
#undef _mm512_inserti32x4
#undef _mm512_inserti32x8
#undef _mm512_inserti64x4
#undef _mm512_permute_ps
#undef _mm512_roundscale_ps
#undef _mm512_setr_epi32
#undef _mm512_shuffle_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4
#undef _mm512_shuffle_i64x2
#undef _mm512_shuffle_ps
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_slli_epi64
#undef _mm512_srai_epi16
#undef _mm512_srai_epi32
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32
#undef _mm512_srli_epi64
#undef _mm512_ternarylogic_epi32
#undef _mm_dpbusd_epi32

#pragma GCC diagnostic ignored "-Wignored-attributes"  // vectors as template arguments lose may_alias; memcpy needs none

// Not inlined: a kernel is thousands of words, and each word a loop over lanes.
#define WORD static __attribute__((noinline, unused))

namespace gemcutter {
namespace {

// ---- lanes ----

typedef uint8_t U8 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint64_t U64 __attribute__((vector_size(64)));
typedef int16_t S16 __attribute__((vector_size(64)));
typedef int32_t S32 __attribute__((vector_size(64)));

template <typename T, typename V>
struct Lanes {
    static constexpr int COUNT = sizeof(V) / sizeof(T);
    T at[COUNT];
    explicit Lanes(V v) { memcpy(at, &v, sizeof v); }
    V vector() const {
        V v;
        memcpy(&v, at, sizeof v);
        return v;
    }
};

// A vector of `count` lanes computed from their numbers.
template <typename T, typename V, typename F>
inline V make(F lane) {
    Lanes<T, V> out{V{}};
    for (int i = 0; i < out.COUNT; ++i) out.at[i] = (T)lane(i);
    return out.vector();
}
template <typename T, typename V, typename F>
inline V each(V a, F f) {
    Lanes<T, V> x(a);
    return make<T, V>([&](int i) { return f(x.at[i]); });
}
template <typename T, typename V, typename F>
inline V each(V a, V b, F f) {
    Lanes<T, V> x(a), y(b);
    return make<T, V>([&](int i) { return f(x.at[i], y.at[i]); });
}
// Lanes of one type made of as many lanes of another.
template <typename To, typename W, typename From, typename V>
inline W convert(V a) {
    static_assert(sizeof(W) / sizeof(To) == sizeof(V) / sizeof(From), "as many lanes");
    Lanes<From, V> x(a);
    return make<To, W>([&](int i) { return (To)x.at[i]; });
}
template <typename T, typename V>
inline V select(uint64_t mask, V on, V off) {
    Lanes<T, V> x(on), y(off);
    return make<T, V>([&](int i) { return mask >> i & 1 ? x.at[i] : y.at[i]; });
}
template <typename T, typename V, typename F>
inline uint64_t mask_where(V a, V b, F is_true) {
    Lanes<T, V> x(a), y(b);
    uint64_t mask = 0;
    for (int i = 0; i < x.COUNT; ++i) mask |= (uint64_t)(is_true(x.at[i], y.at[i]) ? 1 : 0) << i;
    return mask;
}
template <typename V>
inline V load_any(const void *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
// Lanes that the mask leaves out are neither read nor written: a masked load may end at the end of a page.
template <typename T, typename V>
inline V load_masked(uint64_t mask, const void *p) {
    const char *from = (const char *)p;
    return make<T, V>([&](int i) {
        T x = 0;
        if (mask >> i & 1) memcpy(&x, from + i * sizeof x, sizeof x);
        return x;
    });
}
template <typename T, typename V>
inline void store_masked(void *p, uint64_t mask, V a) {
    Lanes<T, V> x(a);
    for (int i = 0; i < x.COUNT; ++i)
        if (mask >> i & 1) memcpy((char *)p + i * sizeof(T), &x.at[i], sizeof(T));
}
template <typename W, typename V>
inline W part(V a, int index) {
    W w;
    memcpy(&w, (const char *)&a + index * sizeof w, sizeof w);
    return w;
}
template <typename V, typename W>
inline V with_part(V a, W w, int index) {
    memcpy((char *)&a + index * sizeof w, &w, sizeof w);
    return a;
}
// f(lanes of 128 bits of a, of b, of the result), four times.
template <typename T, typename V, typename F>
inline V each_quarter(V a, V b, F f) {
    Lanes<T, V> x(a), y(b), out(a);
    constexpr int N = 16 / sizeof(T);
    for (int at = 0; at < x.COUNT; at += N) f(x.at + at, y.at + at, out.at + at);
    return out.vector();
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
// As MINPS and MAXPS: the second operand where either is NaN or both are zero.
inline float lesser(float a, float b) { return a < b ? a : b; }
inline float greater(float a, float b) { return a > b ? a : b; }
inline int32_t saturate(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }
inline int32_t rounded(float x) {  // to nearest even; what does not fit becomes the smallest integer
    return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)rintf(x) : INT32_MIN;
}
inline int32_t truncated(float x) { return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)x : INT32_MIN; }

// ---- load, store, set ----

WORD __m512 _mm512_loadu_ps(const void *p) { return load_any<__m512>(p); }
WORD __m512 _mm512_load_ps(const void *p) { return load_any<__m512>(p); }
WORD __m512i _mm512_loadu_si512(const void *p) { return load_any<__m512i>(p); }
WORD __m512i _mm512_load_si512(const void *p) { return load_any<__m512i>(p); }
WORD __m512i _mm512_loadu_epi8(const void *p) { return load_any<__m512i>(p); }
WORD __m512i _mm512_loadu_epi16(const void *p) { return load_any<__m512i>(p); }
WORD __m512i _mm512_loadu_epi32(const void *p) { return load_any<__m512i>(p); }
WORD void _mm512_storeu_ps(void *p, __m512 a) { memcpy(p, &a, sizeof a); }
WORD void _mm512_store_ps(void *p, __m512 a) { memcpy(p, &a, sizeof a); }
WORD void _mm512_storeu_si512(void *p, __m512i a) { memcpy(p, &a, sizeof a); }
WORD void _mm512_store_si512(void *p, __m512i a) { memcpy(p, &a, sizeof a); }
WORD void _mm512_stream_si512(__m512i *p, __m512i a) { memcpy((void *)p, &a, sizeof a); }
WORD void _mm512_stream_ps(float *p, __m512 a) { memcpy(p, &a, sizeof a); }
WORD __m512 _mm512_maskz_loadu_ps(__mmask16 k, const void *p) { return load_masked<float, __m512>(k, p); }
WORD void _mm512_mask_storeu_ps(void *p, __mmask16 k, __m512 a) { store_masked<float>(p, k, a); }
WORD __m512i _mm512_maskz_loadu_epi8(__mmask64 k, const void *p) { return load_masked<uint8_t, __m512i>(k, p); }
WORD void _mm512_mask_storeu_epi8(void *p, __mmask64 k, __m512i a) { store_masked<uint8_t>(p, k, a); }
WORD __m512i _mm512_maskz_loadu_epi16(__mmask32 k, const void *p) { return load_masked<uint16_t, __m512i>(k, p); }
WORD void _mm512_mask_storeu_epi16(void *p, __mmask32 k, __m512i a) { store_masked<uint16_t>(p, k, a); }
WORD __m512i _mm512_maskz_loadu_epi32(__mmask16 k, const void *p) { return load_masked<uint32_t, __m512i>(k, p); }
WORD void _mm512_mask_storeu_epi32(void *p, __mmask16 k, __m512i a) { store_masked<uint32_t>(p, k, a); }
WORD __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void *p) { return load_masked<uint16_t, __m256i>(k, p); }
WORD void _mm256_mask_storeu_epi16(void *p, __mmask16 k, __m256i a) { store_masked<uint16_t>(p, k, a); }
WORD __m128i _mm_maskz_loadu_epi8(__mmask16 k, const void *p) { return load_masked<uint8_t, __m128i>(k, p); }
WORD void _mm_mask_storeu_epi8(void *p, __mmask16 k, __m128i a) { store_masked<uint8_t>(p, k, a); }
WORD __m512 _mm512_setzero_ps() { return __m512{}; }
WORD __m512i _mm512_setzero_si512() { return __m512i{}; }
WORD __m512 _mm512_set1_ps(float x) { return make<float, __m512>([=](int) { return x; }); }
WORD __m512i _mm512_set1_epi8(char x) { return make<char, __m512i>([=](int) { return x; }); }
WORD __m512i _mm512_set1_epi16(short x) { return make<int16_t, __m512i>([=](int) { return x; }); }
WORD __m512i _mm512_set1_epi32(int x) { return make<int32_t, __m512i>([=](int) { return x; }); }
WORD __m512i _mm512_set1_epi64(long long x) { return make<int64_t, __m512i>([=](int) { return x; }); }
template <typename... Lane>
WORD __m512i _mm512_setr_epi32(Lane... x) {
    static_assert(sizeof...(x) == 16, "16 lanes");
    const int32_t at[] = {x...};
    return load_any<__m512i>(at);
}
template <typename... Lane>
WORD __m512i _mm512_set_epi32(Lane... x) {
    static_assert(sizeof...(x) == 16, "16 lanes, the last first");
    const int32_t at[] = {x...};
    return make<int32_t, __m512i>([&](int i) { return at[15 - i]; });
}
WORD __m512 _mm512_i32gather_ps(__m512i index, const void *p, int scale) {
    Lanes<int32_t, __m512i> x(index);
    return make<float, __m512>([&](int i) { return load_any<float>((const char *)p + (int64_t)x.at[i] * scale); });
}
WORD __m512i _mm512_i32gather_epi32(__m512i index, const void *p, int scale) {
    Lanes<int32_t, __m512i> x(index);
    return make<int32_t, __m512i>([&](int i) { return load_any<int32_t>((const char *)p + (int64_t)x.at[i] * scale); });
}

// ---- float32 ----

WORD __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
WORD __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
WORD __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
WORD __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
WORD __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    Lanes<float, __m512> x(a), y(b), z(c);
    return make<float, __m512>([&](int i) { return __builtin_fmaf(x.at[i], y.at[i], z.at[i]); });
}
WORD __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(-a, b, c); }
WORD __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, -c); }
WORD __m512 _mm512_max_ps(__m512 a, __m512 b) { return each<float>(a, b, greater); }
WORD __m512 _mm512_min_ps(__m512 a, __m512 b) { return each<float>(a, b, lesser); }
WORD __m512 _mm512_sqrt_ps(__m512 a) { return each<float>(a, [](float x) { return sqrtf(x); }); }
WORD __m512 _mm512_abs_ps(__m512 a) { return each<float>(a, [](float x) { return fabsf(x); }); }
WORD __m512 _mm512_scalef_ps(__m512 a, __m512 b) {  // x * 2^floor(y)
    return each<float>(a, b, [](float x, float y) { return y != y ? y : ldexpf(x, (int)fmaxf(fminf(floorf(y), 1e4f), -1e4f)); });
}
WORD __m512 _mm512_roundscale_ps(__m512 a, int how) {
    if ((how & 0xf0) || (how & 4)) __builtin_trap();  // only whole numbers, and the rounding named
    float (*const round[])(float) = {rintf, floorf, ceilf, truncf};
    return each<float>(a, [=](float x) { return round[how & 3](x); });
}
WORD float _mm512_reduce_add_ps(__m512 a) {  // halves are added, then their halves, and so on
    Lanes<float, __m512> x(a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x.at[i] += x.at[i + half];
    return x.at[0];
}
WORD float _mm512_reduce_max_ps(__m512 a) {
    Lanes<float, __m512> x(a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x.at[i] = greater(x.at[i], x.at[i + half]);
    return x.at[0];
}
WORD int _mm512_reduce_add_epi32(__m512i a) {
    Lanes<uint32_t, __m512i> x(a);
    uint32_t sum = 0;
    for (uint32_t lane : x.at) sum += lane;
    return (int)sum;
}
WORD __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
    return (__mmask16)mask_where<float>(a, b, [=](float x, float y) {
        switch (how) {
            case _CMP_EQ_OQ: return x == y;
            case _CMP_LT_OS:
            case _CMP_LT_OQ: return x < y;
            case _CMP_LE_OS:
            case _CMP_LE_OQ: return x <= y;
            case _CMP_GT_OS:
            case _CMP_GT_OQ: return x > y;
            case _CMP_GE_OS:
            case _CMP_GE_OQ: return x >= y;
            case _CMP_NEQ_UQ: return x != y;
            case _CMP_UNORD_Q: return x != x || y != y;
            case _CMP_ORD_Q: return x == x && y == y;
            default: __builtin_trap();
        }
    });
}
WORD __m512 _mm512_mask_blend_ps(__mmask16 k, __m512 off, __m512 on) { return select<float>(k, on, off); }
WORD __m512 _mm512_mask_mov_ps(__m512 off, __mmask16 k, __m512 on) { return select<float>(k, on, off); }
WORD __m512 _mm512_maskz_mov_ps(__mmask16 k, __m512 on) { return select<float>(k, on, __m512{}); }
WORD __m512 _mm512_mask_add_ps(__m512 off, __mmask16 k, __m512 a, __m512 b) { return select<float>(k, a + b, off); }
WORD __m512 _mm512_mask_mul_ps(__m512 off, __mmask16 k, __m512 a, __m512 b) { return select<float>(k, a * b, off); }
WORD __m512 _mm512_mask_max_ps(__m512 off, __mmask16 k, __m512 a, __m512 b) {
    return select<float>(k, _mm512_max_ps(a, b), off);
}
WORD __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
WORD __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
WORD __m512 _mm512_and_ps(__m512 a, __m512 b) { return (__m512)((__m512i)a & (__m512i)b); }
WORD __m512 _mm512_or_ps(__m512 a, __m512 b) { return (__m512)((__m512i)a | (__m512i)b); }
WORD __m512 _mm512_xor_ps(__m512 a, __m512 b) { return (__m512)((__m512i)a ^ (__m512i)b); }
WORD __m512 _mm512_andnot_ps(__m512 a, __m512 b) { return (__m512)(~(__m512i)a & (__m512i)b); }

// ---- conversions ----

WORD __m512 _mm512_cvtepi32_ps(__m512i a) { return convert<float, __m512, int32_t>(a); }
WORD __m512 _mm512_cvtepu32_ps(__m512i a) { return convert<float, __m512, uint32_t>(a); }
WORD __m512i _mm512_cvtps_epi32(__m512 a) {
    Lanes<float, __m512> x(a);
    return make<int32_t, __m512i>([&](int i) { return rounded(x.at[i]); });
}
WORD __m512i _mm512_cvttps_epi32(__m512 a) {
    Lanes<float, __m512> x(a);
    return make<int32_t, __m512i>([&](int i) { return truncated(x.at[i]); });
}
WORD __m512i _mm512_cvtepu8_epi32(__m128i a) { return convert<int32_t, __m512i, uint8_t>(a); }
WORD __m512i _mm512_cvtepi8_epi32(__m128i a) { return convert<int32_t, __m512i, int8_t>(a); }
WORD __m512i _mm512_cvtepu16_epi32(__m256i a) { return convert<int32_t, __m512i, uint16_t>(a); }
WORD __m512i _mm512_cvtepi16_epi32(__m256i a) { return convert<int32_t, __m512i, int16_t>(a); }
WORD __m512i _mm512_cvtepu8_epi16(__m256i a) { return convert<int16_t, __m512i, uint8_t>(a); }
WORD __m512i _mm512_cvtepi8_epi16(__m256i a) { return convert<int16_t, __m512i, int8_t>(a); }
WORD __m128i _mm512_cvtepi32_epi8(__m512i a) { return convert<uint8_t, __m128i, uint32_t>(a); }
WORD __m256i _mm512_cvtepi32_epi16(__m512i a) { return convert<uint16_t, __m256i, uint32_t>(a); }
WORD __m256i _mm512_cvtepi16_epi8(__m512i a) { return convert<uint8_t, __m256i, uint16_t>(a); }
WORD __m128i _mm512_cvtsepi32_epi8(__m512i a) {
    Lanes<int32_t, __m512i> x(a);
    return make<int8_t, __m128i>([&](int i) { return saturate(x.at[i], -128, 127); });
}
WORD __m256i _mm512_cvtsepi32_epi16(__m512i a) {
    Lanes<int32_t, __m512i> x(a);
    return make<int16_t, __m256i>([&](int i) { return saturate(x.at[i], -32768, 32767); });
}
WORD __m512 _mm512_cvtph_ps(__m256i a) {
    return with_part(with_part(__m512{}, _mm256_cvtph_ps(part<__m128i>(a, 0)), 0), _mm256_cvtph_ps(part<__m128i>(a, 1)), 1);
}
WORD __m256i _mm512_cvtps_ph(__m512 a, int how) {
    if ((how & 7) != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
    __m256i out = with_part(__m256i{}, _mm256_cvtps_ph(part<__m256>(a, 0), _MM_FROUND_TO_NEAREST_INT), 0);
    return with_part(out, _mm256_cvtps_ph(part<__m256>(a, 1), _MM_FROUND_TO_NEAREST_INT), 1);
}

// ---- integers ----

WORD __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
WORD __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
WORD __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
WORD __m512i _mm512_andnot_si512(__m512i a, __m512i b) { return ~a & b; }
WORD __m512i _mm512_and_epi32(__m512i a, __m512i b) { return a & b; }
WORD __m512i _mm512_or_epi32(__m512i a, __m512i b) { return a | b; }
WORD __m512i _mm512_xor_epi32(__m512i a, __m512i b) { return a ^ b; }
// Bit `4x + 2y + z` of the table for each triple of bits.
WORD __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    __m512i out{};
    for (int index = 0; index < 8; ++index)
        if (table >> index & 1) out |= (index & 4 ? a : ~a) & (index & 2 ? b : ~b) & (index & 1 ? c : ~c);
    return out;
}
WORD __m512i _mm512_add_epi8(__m512i a, __m512i b) { return (__m512i)((U8)a + (U8)b); }
WORD __m512i _mm512_sub_epi8(__m512i a, __m512i b) { return (__m512i)((U8)a - (U8)b); }
WORD __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((U16)a + (U16)b); }
WORD __m512i _mm512_sub_epi16(__m512i a, __m512i b) { return (__m512i)((U16)a - (U16)b); }
WORD __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a + (U32)b); }
WORD __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a - (U32)b); }
WORD __m512i _mm512_add_epi64(__m512i a, __m512i b) { return (__m512i)((U64)a + (U64)b); }
WORD __m512i _mm512_mullo_epi16(__m512i a, __m512i b) { return (__m512i)((U16)a * (U16)b); }
WORD __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a * (U32)b); }
WORD __m512i _mm512_max_epi32(__m512i a, __m512i b) { return (__m512i)((S32)a > (S32)b ? (S32)a : (S32)b); }
WORD __m512i _mm512_min_epi32(__m512i a, __m512i b) { return (__m512i)((S32)a < (S32)b ? (S32)a : (S32)b); }
WORD __m512i _mm512_abs_epi8(__m512i a) { return each<int8_t>(a, [](int8_t x) { return x < 0 ? -x : x; }); }
WORD __m512i _mm512_slli_epi16(__m512i a, unsigned n) { return n > 15 ? __m512i{} : (__m512i)((U16)a << (int)n); }
WORD __m512i _mm512_srli_epi16(__m512i a, unsigned n) { return n > 15 ? __m512i{} : (__m512i)((U16)a >> (int)n); }
WORD __m512i _mm512_srai_epi16(__m512i a, unsigned n) { return (__m512i)((S16)a >> (n > 15 ? 15 : (int)n)); }
WORD __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : (__m512i)((U32)a << (int)n); }
WORD __m512i _mm512_srli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : (__m512i)((U32)a >> (int)n); }
WORD __m512i _mm512_srai_epi32(__m512i a, unsigned n) { return (__m512i)((S32)a >> (n > 31 ? 31 : (int)n)); }
WORD __m512i _mm512_slli_epi64(__m512i a, unsigned n) { return n > 63 ? __m512i{} : (__m512i)((U64)a << (int)n); }
WORD __m512i _mm512_srli_epi64(__m512i a, unsigned n) { return n > 63 ? __m512i{} : (__m512i)((U64)a >> (int)n); }
WORD __m512i _mm512_sll_epi32(__m512i a, __m128i n) {
    uint64_t count = part<uint64_t>(n, 0);
    return _mm512_slli_epi32(a, count > 31 ? 32 : (unsigned)count);
}
WORD __m512i _mm512_srl_epi32(__m512i a, __m128i n) {
    uint64_t count = part<uint64_t>(n, 0);
    return _mm512_srli_epi32(a, count > 31 ? 32 : (unsigned)count);
}
WORD __m512i _mm512_sllv_epi32(__m512i a, __m512i n) {
    return each<uint32_t>(a, n, [](uint32_t x, uint32_t y) { return y > 31 ? 0 : x << y; });
}
WORD __m512i _mm512_srlv_epi32(__m512i a, __m512i n) {
    return each<uint32_t>(a, n, [](uint32_t x, uint32_t y) { return y > 31 ? 0 : x >> y; });
}
WORD __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
    return (__mmask16)mask_where<int32_t>(a, b, [](int32_t x, int32_t y) { return x == y; });
}
WORD __mmask16 _mm512_cmpgt_epi32_mask(__m512i a, __m512i b) {
    return (__mmask16)mask_where<int32_t>(a, b, [](int32_t x, int32_t y) { return x > y; });
}
WORD __mmask16 _mm512_cmplt_epi32_mask(__m512i a, __m512i b) {
    return (__mmask16)mask_where<int32_t>(a, b, [](int32_t x, int32_t y) { return x < y; });
}
WORD __mmask16 _mm512_cmpge_epi32_mask(__m512i a, __m512i b) {
    return (__mmask16)mask_where<int32_t>(a, b, [](int32_t x, int32_t y) { return x >= y; });
}
WORD __mmask16 _mm512_cmple_epi32_mask(__m512i a, __m512i b) {
    return (__mmask16)mask_where<int32_t>(a, b, [](int32_t x, int32_t y) { return x <= y; });
}
WORD __mmask64 _mm512_movepi8_mask(__m512i a) { return mask_where<int8_t>(a, a, [](int8_t x, int8_t) { return x < 0; }); }
WORD __m512i _mm512_mask_sub_epi8(__m512i off, __mmask64 k, __m512i a, __m512i b) {
    return select<uint8_t>(k, _mm512_sub_epi8(a, b), off);
}
WORD __m512i _mm512_mask_blend_epi16(__mmask32 k, __m512i off, __m512i on) { return select<uint16_t>(k, on, off); }
WORD __m512i _mm512_mask_blend_epi32(__mmask16 k, __m512i off, __m512i on) { return select<uint32_t>(k, on, off); }
WORD __m512i _mm512_mask_mov_epi32(__m512i off, __mmask16 k, __m512i on) { return select<uint32_t>(k, on, off); }
WORD __m512i _mm512_maskz_mov_epi32(__mmask16 k, __m512i on) { return select<uint32_t>(k, on, __m512i{}); }
WORD __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
    Lanes<int16_t, __m512i> x(a), y(b);
    return make<uint32_t, __m512i>([&](int i) {
        return (uint32_t)(x.at[2 * i] * y.at[2 * i]) + (uint32_t)(x.at[2 * i + 1] * y.at[2 * i + 1]);
    });
}
WORD __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {  // unsigned times signed, saturating
    Lanes<uint8_t, __m512i> x(a);
    Lanes<int8_t, __m512i> y(b);
    return make<int16_t, __m512i>([&](int i) {
        return saturate(x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1], -32768, 32767);
    });
}

// ---- VNNI ----

template <typename V>
inline V dpbusd(V sum, V a, V b) {  // unsigned times signed, four at a time, wrapping
    Lanes<uint32_t, V> s(sum);
    Lanes<uint8_t, V> x(a);
    Lanes<int8_t, V> y(b);
    return make<uint32_t, V>([&](int i) {
        int32_t dot = 0;
        for (int c = 4 * i; c < 4 * i + 4; ++c) dot += x.at[c] * y.at[c];
        return s.at[i] + (uint32_t)dot;
    });
}
WORD __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) { return dpbusd(sum, a, b); }
WORD __m256i _mm256_dpbusd_epi32(__m256i sum, __m256i a, __m256i b) { return dpbusd(sum, a, b); }
WORD __m128i _mm_dpbusd_epi32(__m128i sum, __m128i a, __m128i b) { return dpbusd(sum, a, b); }
WORD __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }

// ---- moving lanes ----

WORD __m512i _mm512_castsi256_si512(__m256i a) { return with_part(__m512i{}, a, 0); }
WORD __m512i _mm512_castsi128_si512(__m128i a) { return with_part(__m512i{}, a, 0); }
WORD __m512 _mm512_castps256_ps512(__m256 a) { return with_part(__m512{}, a, 0); }
WORD __m256i _mm512_castsi512_si256(__m512i a) { return part<__m256i>(a, 0); }
WORD __m128i _mm512_castsi512_si128(__m512i a) { return part<__m128i>(a, 0); }
WORD __m256 _mm512_castps512_ps256(__m512 a) { return part<__m256>(a, 0); }
WORD __m128 _mm512_castps512_ps128(__m512 a) { return part<__m128>(a, 0); }
WORD __m256i _mm512_extracti64x4_epi64(__m512i a, int index) { return part<__m256i>(a, index & 1); }
WORD __m256i _mm512_extracti32x8_epi32(__m512i a, int index) { return part<__m256i>(a, index & 1); }
WORD __m128i _mm512_extracti32x4_epi32(__m512i a, int index) { return part<__m128i>(a, index & 3); }
WORD __m256 _mm512_extractf32x8_ps(__m512 a, int index) { return part<__m256>(a, index & 1); }
WORD __m128 _mm512_extractf32x4_ps(__m512 a, int index) { return part<__m128>(a, index & 3); }
WORD __m512i _mm512_inserti64x4(__m512i a, __m256i b, int index) { return with_part(a, b, index & 1); }
WORD __m512i _mm512_inserti32x8(__m512i a, __m256i b, int index) { return with_part(a, b, index & 1); }
WORD __m512i _mm512_inserti32x4(__m512i a, __m128i b, int index) { return with_part(a, b, index & 3); }
WORD __m512 _mm512_insertf32x8(__m512 a, __m256 b, int index) { return with_part(a, b, index & 1); }
WORD __m512i _mm512_broadcast_i32x4(__m128i a) {
    Lanes<int32_t, __m128i> x(a);
    return make<int32_t, __m512i>([&](int i) { return x.at[i & 3]; });
}
WORD __m512i _mm512_broadcast_i64x4(__m256i a) { return with_part(_mm512_castsi256_si512(a), a, 1); }
WORD __m512i _mm512_broadcast_i32x8(__m256i a) { return _mm512_broadcast_i64x4(a); }
WORD __m512 _mm512_broadcast_f32x8(__m256 a) { return with_part(_mm512_castps256_ps512(a), a, 1); }
WORD __m512i _mm512_broadcastd_epi32(__m128i a) { return _mm512_set1_epi32(part<int32_t>(a, 0)); }
WORD __m512 _mm512_broadcastss_ps(__m128 a) { return _mm512_set1_ps(part<float>(a, 0)); }
WORD __m512i _mm512_shuffle_epi8(__m512i a, __m512i index) {
    return each_quarter<uint8_t>(a, index, [](const uint8_t *x, const uint8_t *at, uint8_t *out) {
        for (int i = 0; i < 16; ++i) out[i] = at[i] & 0x80 ? 0 : x[at[i] & 15];
    });
}
WORD __m512i _mm512_shuffle_epi32(__m512i a, int how) {
    return each_quarter<uint32_t>(a, a, [=](const uint32_t *x, const uint32_t *, uint32_t *out) {
        for (int i = 0; i < 4; ++i) out[i] = x[how >> 2 * i & 3];
    });
}
WORD __m512 _mm512_permute_ps(__m512 a, int how) { return (__m512)_mm512_shuffle_epi32((__m512i)a, how); }
WORD __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int how) {
    return each_quarter<float>(a, b, [=](const float *x, const float *y, float *out) {
        for (int i = 0; i < 4; ++i) out[i] = (i < 2 ? x : y)[how >> 2 * i & 3];
    });
}
WORD __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int how) {
    __m512i out{};
    for (int i = 0; i < 4; ++i) out = with_part(out, part<__m128i>(i < 2 ? a : b, how >> 2 * i & 3), i);
    return out;
}
WORD __m512i _mm512_shuffle_i64x2(__m512i a, __m512i b, int how) { return _mm512_shuffle_i32x4(a, b, how); }
WORD __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int how) {
    return (__m512)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, how);
}
template <typename T, int START>
inline __m512i interleave(__m512i a, __m512i b) {  // of each 128 bits, from lane START on
    return each_quarter<T>(a, b, [](const T *x, const T *y, T *out) {
        for (int i = 0; i < 8 / (int)sizeof(T); ++i) out[2 * i] = x[START + i], out[2 * i + 1] = y[START + i];
    });
}
WORD __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return interleave<uint8_t, 0>(a, b); }
WORD __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return interleave<uint8_t, 8>(a, b); }
WORD __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return interleave<uint16_t, 0>(a, b); }
WORD __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return interleave<uint16_t, 4>(a, b); }
WORD __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return interleave<uint32_t, 0>(a, b); }
WORD __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return interleave<uint32_t, 2>(a, b); }
WORD __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return interleave<uint64_t, 0>(a, b); }
WORD __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return interleave<uint64_t, 1>(a, b); }
WORD __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return (__m512)interleave<uint32_t, 0>((__m512i)a, (__m512i)b); }
WORD __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return (__m512)interleave<uint32_t, 2>((__m512i)a, (__m512i)b); }
WORD __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
    Lanes<uint32_t, __m512i> at(index), x(a);
    return make<uint32_t, __m512i>([&](int i) { return x.at[at.at[i] & 15]; });
}
WORD __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
    Lanes<uint16_t, __m512i> at(index), x(a);
    return make<uint16_t, __m512i>([&](int i) { return x.at[at.at[i] & 31]; });
}
WORD __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) { return (__m512)_mm512_permutexvar_epi32(index, (__m512i)a); }
WORD __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b) {
    Lanes<uint32_t, __m512i> at(index), x(a), y(b);
    return make<uint32_t, __m512i>([&](int i) { return (at.at[i] & 16 ? y : x).at[at.at[i] & 15]; });
}
WORD __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    Lanes<uint16_t, __m512i> at(index), x(a), y(b);
    return make<uint16_t, __m512i>([&](int i) { return (at.at[i] & 32 ? y : x).at[at.at[i] & 31]; });
}
WORD __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
    return (__m512)_mm512_permutex2var_epi32((__m512i)a, index, (__m512i)b);
}

}  // namespace
}  // namespace gemcutter

#undef WORD
