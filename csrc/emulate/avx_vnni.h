// AVX-VNNI in plain C++, as `avx512.h` does it for AVX-512.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace gemcutter {
namespace {

// Adds to each of 8 sums the products of four unsigned bytes with four signed ones, exact in int32.
static __attribute__((noinline, unused)) __m256i _mm256_dpbusd_avx_epi32(__m256i sums, __m256i codes, __m256i rows) {
    int32_t sum[8];
    uint8_t a[32];
    int8_t b[32];
    memcpy(sum, &sums, sizeof sum);
    memcpy(a, &codes, sizeof a);
    memcpy(b, &rows, sizeof b);
    for (int i = 0; i < 32; ++i) sum[i / 4] += a[i] * b[i];
    memcpy(&sums, sum, sizeof sum);
    return sums;
}

}  // namespace
}  // namespace gemcutter
