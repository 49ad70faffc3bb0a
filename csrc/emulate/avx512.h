// AVX-512 in plain C++, so that the kernels of wider processors are tested on any x86-64 with AVX2 (-DGC_EMULATE).
//
// Owns functions with the intrinsics' own names in namespace gemcutter: a kernel's unqualified call finds them before the
// compiler's. It has the intrinsics that kernels use; where one is missing the build fails, since its flags lack the instruction.
// Add it with the exact semantics (masks, signedness, no saturation where there is none). Refuses to be fast. Read `amx.h` for
// AMX.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

// Names that are macros in some compilers, or at some levels of optimization.
#undef _mm512_cmp_ps_mask
#undef _mm512_mask_blend_epi16
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srai_epi32
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32

#pragma GCC diagnostic ignored "-Wignored-attributes"  // vectors as template arguments lose may_alias; memcpy needs none

// Not inlined: a kernel calls thousands of intrinsics, and each is a loop over lanes.
#define INTRINSIC static __attribute__((noinline, unused))

namespace gemcutter {
namespace {

// ---- lanes ----

typedef uint16_t U16 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
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

// A vector whose lanes are computed from their numbers.
template <typename T, typename V, typename F>
inline V make(F lane) {
    Lanes<T, V> out{V{}};
    for (int i = 0; i < out.COUNT; ++i) out.at[i] = (T)lane(i);
    return out.vector();
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
template <typename V>
inline V load_any(const void *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
// As MINPS and MAXPS: the second operand where either is NaN or both are zero.
inline float lesser(float a, float b) { return a < b ? a : b; }
inline float greater(float a, float b) { return a > b ? a : b; }
// To nearest even; what does not fit becomes the smallest integer.
inline int32_t rounded(float x) { return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)rintf(x) : INT32_MIN; }
// Halves are combined, then their halves, and so on.
template <typename F>
inline float reduce(__m512 a, F f) {
    Lanes<float, __m512> x(a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x.at[i] = f(x.at[i], x.at[i + half]);
    return x.at[0];
}

// ---- load, store, set ----

INTRINSIC __m512 _mm512_loadu_ps(const void *p) { return load_any<__m512>(p); }
INTRINSIC __m512i _mm512_loadu_si512(const void *p) { return load_any<__m512i>(p); }
INTRINSIC __m512i _mm512_load_si512(const void *p) {
    if ((uintptr_t)p % 64) __builtin_trap();
    return load_any<__m512i>(p);
}
INTRINSIC void _mm512_storeu_ps(void *p, __m512 a) { memcpy(p, &a, sizeof a); }
INTRINSIC void _mm512_storeu_si512(void *p, __m512i a) { memcpy(p, &a, sizeof a); }
INTRINSIC void _mm512_store_si512(void *p, __m512i a) {
    if ((uintptr_t)p % 64) __builtin_trap();
    memcpy(p, &a, sizeof a);
}
INTRINSIC __m512i _mm512_setzero_si512() { return __m512i{}; }
INTRINSIC __m512 _mm512_set1_ps(float x) {
    return make<float, __m512>([=](int) { return x; });
}
INTRINSIC __m512i _mm512_set1_epi8(char x) {
    return make<char, __m512i>([=](int) { return x; });
}
INTRINSIC __m512i _mm512_set1_epi32(int x) {
    return make<int32_t, __m512i>([=](int) { return x; });
}

// ---- float32 ----

INTRINSIC __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    Lanes<float, __m512> x(a), y(b), z(c);
    return make<float, __m512>([&](int i) { return __builtin_fmaf(x.at[i], y.at[i], z.at[i]); });
}
INTRINSIC __m512 _mm512_max_ps(__m512 a, __m512 b) { return each<float>(a, b, greater); }
INTRINSIC __m512 _mm512_min_ps(__m512 a, __m512 b) { return each<float>(a, b, lesser); }
INTRINSIC float _mm512_reduce_add_ps(__m512 a) {
    return reduce(a, [](float x, float y) { return x + y; });
}
INTRINSIC float _mm512_reduce_max_ps(__m512 a) { return reduce(a, greater); }
INTRINSIC __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
    if (how != _CMP_LT_OQ) __builtin_trap();
    Lanes<float, __m512> x(a), y(b);
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= (uint32_t)(x.at[i] < y.at[i]) << i;
    return (__mmask16)mask;
}
INTRINSIC __m512 _mm512_mask_blend_ps(__mmask16 k, __m512 off, __m512 on) { return select<float>(k, on, off); }

// ---- conversions ----

INTRINSIC __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
INTRINSIC __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
INTRINSIC __m512 _mm512_cvtepi32_ps(__m512i a) { return convert<float, __m512, int32_t>(a); }
INTRINSIC __m512i _mm512_cvtps_epi32(__m512 a) {
    Lanes<float, __m512> x(a);
    return make<int32_t, __m512i>([&](int i) { return rounded(x.at[i]); });
}
INTRINSIC __m512i _mm512_cvtepu8_epi32(__m128i a) { return convert<int32_t, __m512i, uint8_t>(a); }
INTRINSIC __m512i _mm512_cvtepi8_epi32(__m128i a) { return convert<int32_t, __m512i, int8_t>(a); }
INTRINSIC __m512i _mm512_cvtepu16_epi32(__m256i a) { return convert<int32_t, __m512i, uint16_t>(a); }
INTRINSIC __m128i _mm512_cvtepi32_epi8(__m512i a) { return convert<uint8_t, __m128i, uint32_t>(a); }
INTRINSIC __m512 _mm512_cvtph_ps(__m256i a) {
    __m256 halves[] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
    return load_any<__m512>(halves);
}

// ---- integers ----

INTRINSIC __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
INTRINSIC __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
INTRINSIC __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
INTRINSIC __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    __m512i out = a ^ a;
    for (int i = 0; i < 8; ++i)
        if (table >> i & 1) out = out | ((i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c));
    return out;
}
INTRINSIC __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a + (U32)b); }
INTRINSIC __m512i _mm512_slli_epi16(__m512i a, unsigned n) { return n > 15 ? __m512i{} : (__m512i)((U16)a << (int)n); }
INTRINSIC __m512i _mm512_srli_epi16(__m512i a, unsigned n) { return n > 15 ? __m512i{} : (__m512i)((U16)a >> (int)n); }
INTRINSIC __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : (__m512i)((U32)a << (int)n); }
INTRINSIC __m512i _mm512_srli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : (__m512i)((U32)a >> (int)n); }
INTRINSIC __m512i _mm512_srai_epi32(__m512i a, unsigned n) { return (__m512i)((S32)a >> (n > 31 ? 31 : (int)n)); }
INTRINSIC __m512i _mm512_mask_blend_epi16(__mmask32 k, __m512i off, __m512i on) { return select<uint16_t>(k, on, off); }
INTRINSIC __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) {  // within 16 bytes each; a place above 127 gives zero
    Lanes<uint8_t, __m512i> x(a), places(b);
    return make<uint8_t, __m512i>([&](int i) { return places.at[i] & 0x80 ? 0 : x.at[i / 16 * 16 + places.at[i] % 16]; });
}
INTRINSIC __m512 _mm512_permutexvar_ps(__m512i places, __m512 a) {
    Lanes<uint32_t, __m512i> from(places);
    Lanes<float, __m512> x(a);
    return make<float, __m512>([&](int i) { return x.at[from.at[i] % 16]; });
}
INTRINSIC int _mm512_reduce_add_epi32(__m512i a) {
    uint32_t sum = 0;
    for (uint32_t lane : Lanes<uint32_t, __m512i>(a).at) sum += lane;
    return (int)sum;
}
INTRINSIC __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {  // unsigned times signed, four at a time, wrapping
    Lanes<uint32_t, __m512i> s(sum);
    Lanes<uint8_t, __m512i> x(a);
    Lanes<int8_t, __m512i> y(b);
    return make<uint32_t, __m512i>([&](int i) {
        int32_t dot = 0;
        for (int c = 4 * i; c < 4 * i + 4; ++c) dot += x.at[c] * y.at[c];
        return s.at[i] + (uint32_t)dot;
    });
}
INTRINSIC __m256i _mm512_cvtneps_pbh(__m512 a) {  // to the nearest, ties to even; NaN stays one; tiny numbers become zero
    Lanes<uint32_t, __m512> x(a);
    uint16_t out[16];
    for (int i = 0; i < 16; ++i) {
        uint32_t bits = x.at[i];
        if ((bits & 0x7fffffff) > 0x7f800000) out[i] = (uint16_t)(bits >> 16 | 0x40);
        else if (!(bits & 0x7f800000)) out[i] = (uint16_t)(bits >> 16 & 0x8000);
        else out[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    __m256i result;
    memcpy(&result, out, sizeof result);
    return result;
}
INTRINSIC __m512i _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    const __m256i halves[2] = {_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)};
    __m512i result;
    memcpy(&result, halves, sizeof result);
    return result;
}
INTRINSIC __m512 _mm512_dpbf16_ps(__m512 sum, __m512i a, __m512i b) {  // the odd pair first; operands as plain words
    auto wide = [](uint16_t half) {
        uint32_t bits = (uint32_t)half << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    };
    Lanes<float, __m512> s(sum);
    Lanes<uint16_t, __m512i> x(a), y(b);
    return make<float, __m512>([&](int i) {
        float odd = s.at[i] + wide(x.at[2 * i + 1]) * wide(y.at[2 * i + 1]);
        return odd + wide(x.at[2 * i]) * wide(y.at[2 * i]);
    });
}

}  // namespace
}  // namespace gemcutter

#undef INTRINSIC
