// Vector kernels over one row: norms, GELU, RoPE, soft cap, rounding, quantization. Compiled once per processor level.
//
// Owns float32 arithmetic on rows of any length; the elements beyond the last whole vector go through a padded one, so that equal
// elements have equal results at any position. Refuses to know matrices and threads. Read `kernels.h` for the contract of each
// op, `exp.h` for the exponential in GELU and soft cap.
#include <math.h>

#include "exp.h"
#include "kernels.h"

namespace gemcutter {
namespace {

// The elements of a row beyond its last whole vector, padded with zeros to one.
struct Tail {
    float x[W] = {}, y[W] = {}, out[W];
    int64_t first, count;
    explicit Tail(int64_t n) : first(n / W * W), count(n % W) {}
    const float *in(const float *from) { return part(x, from); }
    const float *other(const float *from) { return part(y, from); }
    void give(float *to) { memcpy(to + first, out, sizeof(float) * (size_t)count); }

  private:
    const float *part(float *into, const float *from) {
        memcpy(into, from + first, sizeof(float) * (size_t)count);
        return into;
    }
};

float square_sum(const float *x, int64_t n) {
    V a = set1(0.0f), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        V v0 = load(x + i), v1 = load(x + i + W), v2 = load(x + i + 2 * W), v3 = load(x + i + 3 * W);
        a = fma(v0, v0, a), b = fma(v1, v1, b), c = fma(v2, v2, c), d = fma(v3, v3, d);
    }
    for (; i + W <= n; i += W) {
        V v = load(x + i);
        a = fma(v, v, a);
    }
    if (i < n) {
        Tail tail(n);
        V v = load(tail.in(x));
        b = fma(v, v, b);
    }
    return sum((a + b) + (c + d));
}

float inverse_rms(const float *x, float eps, int64_t n) { return 1.0f / sqrtf(square_sum(x, n) / (float)n + eps); }

void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *out) {
    float scale = inverse_rms(x, eps, n);
    V by = set1(scale);
    int64_t i = 0;
    if (weight)
        for (; i + W <= n; i += W) store(out + i, load(x + i) * by * load(weight + i));
    else
        for (; i + W <= n; i += W) store(out + i, load(x + i) * by);
    for (; i < n; ++i) out[i] = x[i] * scale * (weight ? weight[i] : 1.0f);
}

void add_norm(const float *x, const float *y, const float *weight, float eps, float scale, int64_t n, float *out) {
    float inverse = inverse_rms(y, eps, n);
    V by = set1(inverse), whole = set1(scale);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, (load(x + i) + load(y + i) * by * load(weight + i)) * whole);
    for (; i < n; ++i) out[i] = (x[i] + y[i] * inverse * weight[i]) * scale;
}

// z * tanh-GELU'(z) written with one exponential: 0.5 * (1 + tanh u) = 1 / (1 + exp(-2u)), accurate for large |z| of either sign.
inline V gelu(V z) {
    const V twice_root = set1(-1.59576912f), cubic = set1(-0.0713548163f);  // -2 * sqrt(2 / pi), and that times 0.044715
    V u = z * fma(z * z, cubic, twice_root);
    return z / (set1(1.0f) + exp(u));
}

void gelu_mul(const float *gate, const float *up, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, gelu(load(gate + i)) * load(up + i));
    if (i < n) {
        Tail tail(n);
        store(tail.out, gelu(load(tail.in(gate))) * load(tail.other(up)));
        tail.give(out);
    }
}

inline V open(V x, V gate) { return x / (set1(1.0f) + exp(-gate)); }

void gate(const float *x, const float *by, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, open(load(x + i), load(by + i)));
    if (i < n) {
        Tail tail(n);
        store(tail.out, open(load(tail.in(x)), load(tail.other(by))));
        tail.give(out);
    }
}

void rope(float *x, const float *cos, const float *sin, int64_t head_dim) {
    int64_t half = head_dim / 2, i = 0;
    float *high = x + half;
    for (; i + W <= half; i += W) {
        V a = load(x + i), b = load(high + i), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(high + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        float a = x[i], b = high[i];
        x[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i] + a * sin[i];
    }
}

// tanh y: its series near 0, where 1 - exp would cancel; else (1 - e) / (1 + e) with e = exp(-2 |y|).
inline V tanh_of(V y) {
    V size = vmax(y, -y), square = y * y;
    V e = exp(size * set1(-2.0f)), one = set1(1.0f);
    V far = (one - e) / (one + e);
    far = where_less(y, set1(0.0f), -far, far);
    V near = fma(square, fma(square, fma(square, set1(-0.0539682540f), set1(0.133333333f)), set1(-0.333333333f)), one) * y;
    return where_less(size, set1(0.15f), near, far);
}

void softcap(float *x, float cap, int64_t n) {
    V by = set1(cap), over = set1(1.0f / cap);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(x + i, tanh_of(load(x + i) * over) * by);
    if (i < n) {
        Tail tail(n);
        store(tail.out, tanh_of(load(tail.in(x)) * over) * by);
        tail.give(x);
    }
}

inline uint16_t round_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);  // NaN stays one
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void to_bf16(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; ++i) out[i] = round_bf16(x[i]);  // branch-free after if-conversion: the compiler vectorises it
}

void from_bf16(const uint16_t *x, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load_bf16(x + i));
    for (; i < n; ++i) {
        uint32_t bits = (uint32_t)x[i] << 16;
        memcpy(out + i, &bits, 4);
    }
}

// 32 quotients between -127 and 127 as bytes, rounded to nearest even; returns their sum.
#if defined(GC_LEVEL_AVX512)
inline int32_t round_block(const float *x, V by, int8_t *q) {
    __m512i a = _mm512_cvtps_epi32(load(x) * by), b = _mm512_cvtps_epi32(load(x + 16) * by);
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtepi32_epi8(b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}
#elif defined(GC_LEVEL_AVX2)
inline int32_t round_block(const float *x, V by, int8_t *q) {
    __m256i a = _mm256_cvtps_epi32(load(x) * by), b = _mm256_cvtps_epi32(load(x + 8) * by);
    __m256i c = _mm256_cvtps_epi32(load(x + 16) * by), d = _mm256_cvtps_epi32(load(x + 24) * by);
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b),
                                       _mm256_packs_epi32(c, d));  // in groups of four, interleaved by 128-bit halves
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)q, bytes);
    __m256i pairs = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
#elif defined(GC_LEVEL_NEON)
inline int32_t round_block(const float *x, V by, int8_t *q) {
    int32x4_t total = vdupq_n_s32(0);
    for (int i = 0; i < 32; i += 8) {
        const int32x4_t a = vcvtnq_s32_f32(load(x + i) * by), b = vcvtnq_s32_f32(load(x + i + 4) * by);
        vst1_s8(q + i, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
        total = vaddq_s32(total, vaddq_s32(a, b));
    }
    return vaddvq_s32(total);
}
#else
inline int32_t round_block(const float *x, V by, int8_t *q) {
    float shifted[32];
    for (int i = 0; i < 32; i += W) store(shifted + i, load(x + i) * by + set1(ROUNDER));
    int32_t total = 0;
    for (int i = 0; i < 32; ++i) {
        int32_t bits;
        memcpy(&bits, shifted + i, 4);
        int32_t code = bits - 0x4b400000;  // the bits of ROUNDER
        q[i] = (int8_t)code;
        total += code;
    }
    return total;
}
#endif

void quantize(const float *x, int64_t n, int8_t *q, float *scale, float *sum_of) {
    V poison = set1(0.0f);  // becomes NaN where anything is not finite
    float *first = scale;
    for (int64_t i = 0; i < n; i += 32, x += 32, q += 32) {
        V most = set1(0.0f);
        for (int j = 0; j < 32; j += W) {
            V v = load(x + j);
            most = vmax(most, vmax(v, -v));
            poison = fma(v, set1(0.0f), poison);
        }
        float largest = top(most),
              inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;  // the inverse of anything smaller overflows
        float step = inverse > 0 ? largest / 127.0f : 0.0f;
        *scale++ = step;
        *sum_of++ = step * (float)round_block(x, set1(inverse), q);
    }
    *first += sum(poison);  // so that NaN or infinity in a row stays visible
}

// W numbers between -127 and 127 as bytes, rounded to nearest even.
inline void round_codes(V x, int8_t *q) {
#if defined(GC_LEVEL_AVX512)
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
#elif defined(GC_LEVEL_AVX2)
    const __m256i whole = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)q, _mm_packs_epi16(words, words));
#else
    float numbers[W];
    store(numbers, x);
    for (int i = 0; i < W; ++i) q[i] = (int8_t)lrintf(numbers[i]);
#endif
}

void quantize_vector(const float *x, int64_t n, int8_t *q, float *scale) {
    const int64_t whole = n / W * W;
    Tail tail(n);
    const V rest = load(tail.in(x)), zero = set1(0.0f);
    V most = vmax(rest, -rest), poison = fma(rest, zero, zero);  // the latter becomes NaN where anything is not finite
    for (int64_t i = 0; i < whole; i += W) {
        const V v = load(x + i);
        most = vmax(most, vmax(v, -v));
        poison = fma(v, zero, poison);
    }
    if (!(sum(poison) == 0.0f)) {
        memset(q, 0, (size_t)n);
        *scale = NAN;
        return;
    }
    const float largest = top(most), inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
    *scale = inverse > 0 ? largest / 127.0f : 0.0f;
    const V by = set1(inverse);
    for (int64_t i = 0; i < whole; i += W) round_codes(load(x + i) * by, q + i);
    int8_t codes[W];
    round_codes(rest * by, codes);
    memcpy(q + whole, codes, (size_t)tail.count);
}

void sum_halves(const int8_t *q, const float *scale, int64_t n, float *out) {
    const int64_t blocks = n / BLOCK, stride = blocks;
    int64_t b = 0;
#if defined(GC_LEVEL_AVX512) || defined(GC_LEVEL_AVX2)
    const __m256i bytes = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1);
    for (; b + 4 <= blocks; b += 4) {
        __m256i sums[4];
        for (int i = 0; i < 4; ++i) {
            const __m256i block = _mm256_loadu_si256((const __m256i *)(q + (b + i) * BLOCK));
            sums[i] = _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, block), pairs);
        }
        const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
        const __m128 a = _mm_loadu_ps(scale + b);
        _mm_storeu_ps(out + b, _mm_mul_ps(a, _mm_cvtepi32_ps(_mm256_castsi256_si128(all))));
        _mm_storeu_ps(out + stride + b, _mm_mul_ps(a, _mm_cvtepi32_ps(_mm256_extracti128_si256(all, 1))));
    }
#endif
#if defined(GC_LEVEL_NEON)
    for (; b < blocks; ++b)
        for (int half = 0; half < 2; ++half)
            out[half * stride + b] = scale[b] * (float)vaddlvq_s8(vld1q_s8(q + b * BLOCK + half * 16));
#endif
    for (; b < blocks; ++b)
        for (int half = 0; half < 2; ++half) {
            int32_t total = 0;
            for (int i = 0; i < 16; ++i) total += q[b * BLOCK + half * 16 + i];
            out[half * stride + b] = scale[b] * (float)total;
        }
}

void add_scaled(const float *x, float factor, int64_t n, float *out) {
    V by = set1(factor);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, fma(load(x + i), by, load(out + i)));
    for (; i < n; ++i) out[i] += x[i] * factor;
}

void add_product(const float *x, const float *y, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, fma(load(x + i), load(y + i), load(out + i)));
    for (; i < n; ++i) out[i] += x[i] * y[i];
}

float dot(const float *x, const float *y, int64_t n) {
    V a = set1(0.0f), b = a;
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        a = fma(load(x + i), load(y + i), a);
        b = fma(load(x + i + W), load(y + i + W), b);
    }
    float total = sum(a + b);
    for (; i < n; ++i) total += x[i] * y[i];
    return total;
}

void scale_by(const float *x, float factor, int64_t n, float *out) {
    V by = set1(factor);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load(x + i) * by);
    for (; i < n; ++i) out[i] = x[i] * factor;
}

void clamp(const float *x, float low, float high, int64_t n, float *out) {
    V least = set1(low), most = set1(high);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, vmin(most, vmax(least, load(x + i))));  // NaN stays
    for (; i < n; ++i) out[i] = x[i] < low ? low : x[i] > high ? high : x[i];
}

void softmax_top(const float *x, int64_t n, float *largest, float *sum_of) {
    V most = set1(x[0]);
    int64_t i = 0;
    for (; i + W <= n; i += W) most = vmax(most, load(x + i));
    float best = top(most);
    for (; i < n; ++i) best = x[i] > best ? x[i] : best;
    V total = set1(0.0f);
    for (i = 0; i + W <= n; i += W) total = total + exp(load(x + i) - set1(best));
    alignas(64) float rest[W];  // what is missing to a whole vector becomes exp(-infinity)
    for (int j = 0; j < W; ++j) rest[j] = i + j < n ? x[i + j] - best : -1e30f;
    *largest = best;
    *sum_of = sum(total + exp(load(rest)));
}

}  // namespace

extern const VectorOps GC_NAME(vector_ops) = {rms_norm, add_norm,  gelu_mul, gate,        rope,           softcap,
                                              to_bf16,  from_bf16, quantize, sum_halves,  add_scaled,     add_product,
                                              dot,      scale_by,  clamp,    softmax_top, quantize_vector};

}  // namespace gemcutter
