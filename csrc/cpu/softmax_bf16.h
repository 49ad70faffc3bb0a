// The softmax of attention whose weights become bfloat16. Included by sources of the level avx512_bf16 only; read
// `attention_bf16.cpp` and `vision_bf16.cpp`, which use it.
#pragma once
#include "exp.h"
#include "matmul_bf16.h"

namespace gemcutter {
namespace {

// The largest of `count` scores, a multiple of W.
inline float highest(const float *scores, int64_t count) {
    V best = load(scores);
    for (int64_t t = W; t < count; t += W) best = vmax(best, load(scores + t));
    return top(best);
}

inline void store_bf16(uint16_t *to, V x) {
#if defined(GC_EMULATE)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtneps_pbh(x));
#else
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
#endif
}

// Weights of scores: their exponentials relative to `anchor`, times `scales` where they are given, in bfloat16; returns the sum
// of the exponentials before they are rounded.
inline float exponentiate(const float *scores, int64_t count, float anchor, uint16_t *weights, const float *scales = nullptr) {
    V shift = set1(anchor), total = set1(0.0f);
    for (int64_t t = 0; t < count; t += W) {
        V weight = exp(load(scores + t) - shift);
        store_bf16(weights + t, scales ? weight * load(scales + t) : weight);
        total = total + weight;
    }
    return sum(total);
}

}  // namespace
}  // namespace gemcutter
