// The most products that a level's instructions can make: loops of nothing else, on registers alone.
//
// Owns one loop for each kind of product that a level has; what kernels reach is told as a share of it. No memory is read, so
// nothing but the instruction's own rate counts. Refuses to know time and threads: read `peak_rate.cpp` for those.
#include "kernels.h"
#include "vec.h"

#if defined(GC_LEVEL_AVX512_BF16)
#include "matmul_bf16.h"
#endif
#if defined(GC_LEVEL_AMX)
#include "amx_tiles.h"
#endif

namespace gemcutter {
namespace {

// Independent sums: enough for the latency of every instruction here, few enough for the registers.
#if defined(GC_LEVEL_AVX512) || defined(GC_LEVEL_NEON)
constexpr int SUMS = 24;
#else
constexpr int SUMS = 12;
#endif

// Makes the compiler forget what it knows of a register, so that nothing is moved out of a loop.
#if defined(GC_LEVEL_AVX512) && defined(GC_EMULATE)
#define GC_IN_REGISTER "+m"
#elif defined(__aarch64__)
#define GC_IN_REGISTER "+w"
#elif !defined(__x86_64__)
#define GC_IN_REGISTER "+m"
#elif defined(GC_LEVEL_AVX512)
#define GC_IN_REGISTER "+v"
#else
#define GC_IN_REGISTER "+x"
#endif
template <typename T>
inline void forget(T &value) {
    __asm__ volatile("" : GC_IN_REGISTER(value));
}

// Calls multiply(a, b, sum) for all sums, `rounds` times over.
template <typename T, typename S, typename Multiply>
inline void repeat(int64_t rounds, T a, T b, S zero, const Multiply &multiply) {
    S sums[SUMS];
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; ++i) sums[i] = zero;
    for (int64_t round = 0; round < rounds; ++round) {
        forget(a);
        forget(b);
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; ++i) {
            multiply(a, b, sums[i]);
            forget(sums[i]);
        }
    }
}

#if defined(GC_LEVEL_AVX512) || defined(GC_LEVEL_AVX2) || defined(GC_LEVEL_NEON)
constexpr int LANES = W;
void float32(int64_t rounds) {
    repeat(rounds, set1(1.0f), set1(1e-9f), set1(0.0f), [](V &a, V &b, V &sum) { sum = fma(a, b, sum); });
}
#else
typedef float F __attribute__((vector_size(16)));  // V would take two registers
constexpr int LANES = 4;
void float32(int64_t rounds) {
    repeat(rounds, F{1, 1, 1, 1}, F{1e-9f, 1e-9f, 1e-9f, 1e-9f}, F{}, [](F &a, F &b, F &sum) {
        F product = a * b;
        forget(product);
        sum = sum + product;
    });
}
#endif

#if defined(GC_LEVEL_AVX512)
void int8(int64_t rounds) {
    const __m512i ones = _mm512_set1_epi8(1);
    repeat(rounds, ones, ones, _mm512_setzero_si512(),
           [](__m512i &a, __m512i &b, __m512i &sum) { sum = _mm512_dpbusd_epi32(sum, a, b); });
}
#elif defined(GC_LEVEL_AVX_VNNI)
void int8(int64_t rounds) {
    const __m256i ones = _mm256_set1_epi8(1);
    repeat(rounds, ones, ones, _mm256_setzero_si256(),
           [](__m256i &a, __m256i &b, __m256i &sum) { sum = _mm256_dpbusd_avx_epi32(sum, a, b); });
}
#elif defined(GC_LEVEL_AVX2)
void int8(int64_t rounds) {  // pairs of products, which are added in 16 bits
    const __m256i ones = _mm256_set1_epi8(1);
    repeat(rounds, ones, ones, _mm256_setzero_si256(), [](__m256i &a, __m256i &b, __m256i &sum) {
        __m256i pairs = _mm256_maddubs_epi16(a, b);
        forget(pairs);
        sum = _mm256_add_epi16(sum, pairs);
    });
}
#elif defined(GC_LEVEL_NEON)
void int8(int64_t rounds) {
    const int8x16_t ones = vdupq_n_s8(1);
    repeat(rounds, ones, ones, vdupq_n_s32(0), [](int8x16_t &a, int8x16_t &b, int32x4_t &sum) {
#if defined(GC_LEVEL_NEON_I8MM)
        sum = vmmlaq_s32(sum, a, b);
#else
        sum = vdotq_s32(sum, a, b);
#endif
    });
}
#endif
#if defined(GC_LEVEL_NEON_I8MM)
constexpr double INT8_OPERATIONS = SUMS * W * 16.0;  // a lane is a product of 8 columns
#else
constexpr double INT8_OPERATIONS = SUMS * W * 8.0;
#endif

#if defined(GC_LEVEL_AVX512_BF16)
void bfloat16(int64_t rounds) {
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    repeat(rounds, ones, ones, set1(0.0f), [](__m512i &a, __m512i &b, V &sum) { sum = dot_pairs(sum, a, b); });
}
constexpr double BF16_OPERATIONS = SUMS * W * 4.0;
#elif defined(GC_LEVEL_AMX)
void bfloat16(int64_t rounds) {  // four tiles of sums, of two tiles of rows and two of columns
    alignas(64) uint16_t values[16 * 32] = {};
    configure_tiles();
    zero_sums<2, 2>();
    _tile_loadd(4, values, 64);
    _tile_loadd(5, values, 64);
    _tile_loadd(6, values, 64);
    _tile_loadd(7, values, 64);
    for (int64_t round = 0; round < rounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    release_tiles();
}
constexpr double BF16_OPERATIONS = 4.0 * 16 * 16 * 32 * 2;
#elif defined(GC_LEVEL_NEON_I8MM)
void bfloat16(int64_t rounds) {
    uint16x8_t bits = vdupq_n_u16(0x3f80);
    forget(bits);  // GCC 12 makes a float16 of a bfloat16 that it knows
    const bfloat16x8_t ones = vreinterpretq_bf16_u16(bits);
    repeat(rounds, ones, ones, set1(0.0f), [](bfloat16x8_t &a, bfloat16x8_t &b, V &sum) { sum = vbfmmlaq_f32(sum, a, b); });
}
constexpr double BF16_OPERATIONS = SUMS * W * 8.0;
#endif

}  // namespace

extern const PeakLoop GC_NAME(peaks)[] = {
    {"float32", SUMS * LANES * 2.0, float32},
#if defined(GC_LEVEL_AVX2) || defined(GC_LEVEL_AVX512) || defined(GC_LEVEL_NEON)
    {"int8", INT8_OPERATIONS, int8},
#endif
#if defined(GC_LEVEL_AVX512_BF16) || defined(GC_LEVEL_AMX) || defined(GC_LEVEL_NEON_I8MM)
    {"bfloat16", BF16_OPERATIONS, bfloat16},
#endif
    {nullptr, 0, nullptr},
};

}  // namespace gemcutter
