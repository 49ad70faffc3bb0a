// Dot products of codes with int8 activations, in the integer instructions of each level.
//
// Owns `dot`: quads of a code block times the same columns of M rows, exact in int32. quads(h, j) loads quad vector j of part h: a
// `CodeReader` from a packed block, `load_codes` from one that was unpacked before; SHIFT is what is added to signed codes to make
// them unsigned; where codes have a table it is added to that, once for a panel. Refuses to know scales. Read `packed_int8.h`
// next.
#pragma once
#include "packed_decode.h"

namespace gemcutter {
namespace {

// DEPTH: how many products of a pair of columns, each below 2 * largest code * 127, can be added in 16 bits. SHIFT: what makes
// signed codes unsigned.
struct Code4 {
    static constexpr int KIND = GC_U4, DEPTH = 8, SHIFT = 0;
    static constexpr bool IS_SIGNED = false;
};
struct Code6 {
    static constexpr int KIND = GC_U6, DEPTH = 2, SHIFT = 0;
    static constexpr bool IS_SIGNED = false;
};
struct Code8 {
    static constexpr int KIND = GC_S8, DEPTH = 1, SHIFT = 128;
    static constexpr bool IS_SIGNED = true;
};
// Codes that stand for the bytes of a table, which lie from -BELOW to BELOW - 1. Only where products of bytes are added in 16 bits
// smaller ones gain something: there they are unsigned, once they are shifted, while any byte needs its sign.
template <int BELOW>
struct CodeT4 {
    static constexpr int KIND = GC_T4, DEPTH = BELOW <= 16 ? 4 : 1, SHIFT = BELOW;
    static constexpr bool IS_SIGNED = BELOW == 128;
};

// Each level has STREAM_ROWS, up to which rows are multiplied while codes are unpacked in registers, and ROWS_AT_ONCE, of which the
// registers hold the sums meanwhile.

inline int32_t four_bytes(const int8_t *p) {
    int32_t all;
    memcpy(&all, p, 4);
    return all;
}

// Products of four unsigned bytes with four signed ones in one instruction, each sum exact in int32.
#if defined(GC_LEVEL_AVX512)
#define GC_DOT_BYTES
inline N no_sums() { return _mm512_setzero_si512(); }
inline N load_codes(const uint8_t *p) { return _mm512_loadu_si512(p); }
inline N broadcast_columns(const int8_t *p) { return _mm512_set1_epi32(four_bytes(p)); }
inline N add_dots(N sums, N codes, N row) { return _mm512_dpbusd_epi32(sums, codes, row); }
#elif defined(GC_LEVEL_AVX_VNNI)
#define GC_DOT_BYTES
inline N no_sums() { return _mm256_setzero_si256(); }
inline N broadcast_columns(const int8_t *p) { return _mm256_set1_epi32(four_bytes(p)); }
inline N add_dots(N sums, N codes, N row) { return _mm256_dpbusd_avx_epi32(sums, codes, row); }
#endif

#if defined(GC_LEVEL_AVX2)
inline N load_codes(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
#endif

#if defined(GC_LEVEL_AVX512)

constexpr int ROWS_AT_ONCE = 8;
constexpr int64_t STREAM_ROWS = FEW_ROWS;

template <class Code>
struct CodeReader : Code {
    static constexpr int SHIFT = Code::SHIFT;

    explicit CodeReader(const gc_matrix &m) : levels_(Code::KIND == GC_T4 ? table_of(m, SHIFT) : N{}) {}

    N quad(const uint8_t *codes, int, int j) const {
        if (Code::KIND == GC_S8) {
            N all = _mm512_loadu_si512(codes + j * QUAD_BYTES);
            return Code::IS_SIGNED ? _mm512_xor_si512(all, _mm512_set1_epi8((char)0x80)) : all;
        }
        N both = _mm512_loadu_si512(codes + j % 4 * QUAD_BYTES);
        N low = _mm512_and_si512(j < 4 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
        if (Code::KIND == GC_U4) return low;
        if (Code::KIND == GC_T4) return look_up(levels_, low);
        N upper = _mm512_loadu_si512(codes + (4 + j / 4) * QUAD_BYTES), mask = _mm512_set1_epi8(0x30);
        N placed = j % 4 == 0   ? _mm512_slli_epi16(upper, 4)
                   : j % 4 == 1 ? _mm512_slli_epi16(upper, 2)
                   : j % 4 == 2 ? upper
                                : _mm512_srli_epi16(upper, 2);
        return _mm512_ternarylogic_epi32(low, placed, mask, 0xf8);  // low | (placed & mask)
    }

  private:
    N levels_;
};

#elif defined(GC_LEVEL_AVX2)

constexpr int ROWS_AT_ONCE = 4;
constexpr int64_t STREAM_ROWS = FEW_ROWS;

template <class Code>
struct CodeReader : Code {
#if defined(GC_DOT_BYTES)
    static constexpr int SHIFT = Code::SHIFT;
#else
    static constexpr int SHIFT = Code::IS_SIGNED ? 0 : Code::SHIFT;
#endif

    explicit CodeReader(const gc_matrix &m) : levels_(Code::KIND == GC_T4 ? table_of(m, SHIFT) : N{}) {}

    N quad(const uint8_t *codes, int part, int j) const {
        codes += part * 32;
        if (Code::KIND == GC_S8 && SHIFT) return _mm256_xor_si256(at(codes, j), _mm256_set1_epi8((char)0x80));
        if (Code::KIND == GC_S8) return at(codes, j);
        const N both = at(codes, j % 4);
        const N low = _mm256_and_si256(j < 4 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
        if (Code::KIND == GC_U4) return low;
        if (Code::KIND == GC_T4) return look_up(levels_, low);
        const N upper = at(codes, 4 + j / 4);
        const N placed = j % 4 == 0   ? _mm256_slli_epi16(upper, 4)
                         : j % 4 == 1 ? _mm256_slli_epi16(upper, 2)
                         : j % 4 == 2 ? upper
                                      : _mm256_srli_epi16(upper, 2);
        return _mm256_or_si256(low, _mm256_and_si256(placed, _mm256_set1_epi8(0x30)));
    }

  private:
    static N at(const uint8_t *codes, int j) { return load_codes(codes + j * QUAD_BYTES); }

    N levels_;
};

#if !defined(GC_DOT_BYTES)

// Makes the compiler add here; otherwise it postpones the sums of a block and runs out of registers for the products.
inline void keep(N &n) { __asm__("" : "+x"(n)); }

template <class Code, int COUNT, int M, int H, typename Quads>
GC_INLINE void dot(const Quads &quads, int first, const int8_t *q, int64_t stride, N (*out)[H]) {
    constexpr int DEPTH = Code::DEPTH < COUNT ? Code::DEPTH : COUNT;
    const N ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int start = first; start < first + COUNT; start += DEPTH) {
        N pairs[M][H];
#pragma GCC unroll 8
        for (int j = start; j < start + DEPTH; ++j) {
            N w[H];
#pragma GCC unroll 2
            for (int h = 0; h < H; ++h) {
                w[h] = quads(h, j);
                if (M > 1) in_register(w[h]);
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const N row = _mm256_set1_epi32(four_bytes(q + m * stride + 4 * j));
#pragma GCC unroll 2
                for (int h = 0; h < H; ++h) {
                    const N pair = Code::IS_SIGNED ? _mm256_maddubs_epi16(_mm256_abs_epi8(w[h]), _mm256_sign_epi8(row, w[h]))
                                                   : _mm256_maddubs_epi16(w[h], row);
                    pairs[m][h] = j == start ? pair : _mm256_add_epi16(pairs[m][h], pair);
                    keep(pairs[m][h]);
                }
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int h = 0; h < H; ++h) {
                const N wide = _mm256_madd_epi16(pairs[m][h], ones);
                out[m][h] = start == first ? wide : _mm256_add_epi32(out[m][h], wide);
                keep(out[m][h]);
            }
    }
}

#endif

#elif !defined(GC_LEVEL_NEON)  // which packed_dot_neon.h has

constexpr int ROWS_AT_ONCE = 2;
constexpr int64_t STREAM_ROWS = 0;

template <class Code>
struct CodeReader : Code {
    static constexpr int SHIFT = 0;

    explicit CodeReader(const gc_matrix &) {}
};

// Four codes of each of W rows, one after the other.
inline const uint8_t *load_codes(const uint8_t *p) { return p; }

template <class Code, int COUNT, int M, int H, typename Quads>
void dot(const Quads &quads, int first, const int8_t *q, int64_t stride, N (*out)[H]) {
    int32_t sums[M][H][W] = {};
    for (int j = first; j < first + COUNT; ++j)
        for (int h = 0; h < H; ++h) {
            const uint8_t *codes = quads(h, j);
            int16_t w[W * 4];
            for (int i = 0; i < W * 4; ++i) w[i] = Code::IS_SIGNED ? (int16_t)(int8_t)codes[i] : (int16_t)codes[i];
            for (int m = 0; m < M; ++m) {
                const int8_t *row = q + m * stride + 4 * j;
                for (int r = 0; r < W; ++r)
                    sums[m][h][r] += w[4 * r] * row[0] + w[4 * r + 1] * row[1] + w[4 * r + 2] * row[2] + w[4 * r + 3] * row[3];
            }
        }
    memcpy(out, sums, sizeof sums);
}

#endif

#if defined(GC_DOT_BYTES)
template <class Code, int COUNT, int M, int H, typename Quads>
GC_INLINE void dot(const Quads &quads, int first, const int8_t *q, int64_t stride, N (*out)[H]) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
        for (int h = 0; h < H; ++h) out[m][h] = no_sums();
#pragma GCC unroll 8
    for (int j = first; j < first + COUNT; ++j) {
        N codes[H];
#pragma GCC unroll 3
        for (int h = 0; h < H; ++h) codes[h] = quads(h, j);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            N row = broadcast_columns(q + m * stride + 4 * j);
            if (H > 1) in_register(row);
#pragma GCC unroll 3
            for (int h = 0; h < H; ++h) out[m][h] = add_dots(out[m][h], codes[h], row);
        }
    }
}
#endif

}  // namespace
}  // namespace gemcutter

#if defined(GC_LEVEL_NEON)
#include "packed_dot_neon.h"
#endif
