// Dot products of codes with int8 activations on ARM: the instructions sdot and, where the level has it, smmla.
//
// Owns `CodeReader` and `dot` of the levels neon and neon_i8mm. Codes of 4 and 6 bits are small enough to be signed bytes, so that
// one signed instruction serves all formats. A quad of 4 matrix rows is a register; sdot multiplies it with 4 columns of one
// activation row, smmla two quads of 2 matrix rows with 8 columns of two activation rows. Both are exact in int32, so a row's
// result is the same with either. Refuses to know scales; included by `packed_dot.h` alone. Read `packed_int8.h` next.
#pragma once
#include "packed_dot.h"

namespace gemcutter {
namespace {

constexpr int ROWS_AT_ONCE = 4;  // sums of 4 x 16 fill half of the registers
constexpr int64_t STREAM_ROWS = FEW_ROWS;

// A quad is 4 rows of it from `part` on: 16 signed bytes.
template <class Code>
struct CodeReader : Code {
    static constexpr int SHIFT = 0;

    explicit CodeReader(const gc_matrix &m) : levels_(Code::KIND == GC_T4 ? table_of(m, SHIFT) : N{}) {}

    GC_INLINE int8x16_t quad(const uint8_t *codes, int part, int j) const {
        codes += part * 16;
        if (Code::KIND == GC_S8) return vreinterpretq_s8_u8(at(codes, j));
        const uint8x16_t both = at(codes, j % 4);
        const uint8x16_t low = j < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
        if (Code::KIND == GC_U4) return vreinterpretq_s8_u8(low);
        if (Code::KIND == GC_T4) return vreinterpretq_s8_s32(look_up(levels_, vreinterpretq_s32_u8(low)));
        const uint8x16_t upper = at(codes, 4 + j / 4);
        const uint8x16_t placed = j % 4 == 0   ? vshlq_n_u8(upper, 4)
                                  : j % 4 == 1 ? vshlq_n_u8(upper, 2)
                                  : j % 4 == 2 ? upper
                                               : vshrq_n_u8(upper, 2);
        return vreinterpretq_s8_u8(vorrq_u8(low, vandq_u8(placed, vdupq_n_u8(0x30))));
    }

  private:
    static GC_INLINE uint8x16_t at(const uint8_t *codes, int j) { return vld1q_u8(codes + j * QUAD_BYTES); }

    N levels_;
};

inline int8x16_t load_codes(const uint8_t *p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }

// One row after the other: 16 of its columns are loaded at once and meet 4 quads.
template <int COUNT, int M, int H, typename Quads>
GC_INLINE void dot_of_rows(const Quads &quads, int first, const int8_t *q, int64_t stride, N (*out)[H]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) out[m][h] = vdupq_n_s32(0);
#pragma GCC unroll 2
    for (int j = first; j < first + COUNT; j += 4) {
        int8x16_t row[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) row[m] = vld1q_s8(q + m * stride + 4 * j);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const int8x16_t w0 = quads(h, j), w1 = quads(h, j + 1);
            const int8x16_t w2 = quads(h, j + 2), w3 = quads(h, j + 3);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                N &sum = out[m][h];
                sum = vdotq_laneq_s32(sum, w0, row[m], 0);
                sum = vdotq_laneq_s32(sum, w1, row[m], 1);
                sum = vdotq_laneq_s32(sum, w2, row[m], 2);
                sum = vdotq_laneq_s32(sum, w3, row[m], 3);
            }
        }
    }
}

#if defined(GC_LEVEL_NEON_I8MM)

inline int8x16_t zip_low(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
inline int8x16_t zip_high(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
inline N low_halves(N a, N b) { return vcombine_s32(vget_low_s32(a), vget_low_s32(b)); }
inline N high_halves(N a, N b) { return vcombine_s32(vget_high_s32(a), vget_high_s32(b)); }

// Rows two by two, 8 columns at once; an odd last row is its own partner.
template <int COUNT, int M, int H, typename Quads>
GC_INLINE void dot_of_pairs(const Quads &quads, int first, const int8_t *q, int64_t stride, N (*out)[H]) {
    constexpr int PAIRS = (M + 1) / 2;
    N sums[PAIRS][H][2];  // of both rows with the first two and the last two matrix rows of a quad
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; ++p)
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) sums[p][h][0] = sums[p][h][1] = vdupq_n_s32(0);
#pragma GCC unroll 4
    for (int j = first; j < first + COUNT; j += 2) {
        int8x16_t rows[PAIRS];
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; ++p) {
            const int8_t *one = q + 2 * p * stride + 4 * j, *other = 2 * p + 1 < M ? one + stride : one;
            rows[p] = vcombine_s8(vld1_s8(one), vld1_s8(other));
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const int8x16_t a = quads(h, j), b = quads(h, j + 1);
            const int8x16_t low = zip_low(a, b), high = zip_high(a, b);
#pragma GCC unroll 4
            for (int p = 0; p < PAIRS; ++p) {
                sums[p][h][0] = vmmlaq_s32(sums[p][h][0], rows[p], low);
                sums[p][h][1] = vmmlaq_s32(sums[p][h][1], rows[p], high);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const N *both = sums[m / 2][h];
            out[m][h] = m % 2 ? high_halves(both[0], both[1]) : low_halves(both[0], both[1]);
        }
}

#endif

template <class, int COUNT, int M, int H, typename Quads>
GC_INLINE void dot(const Quads &quads, int first, const int8_t *q, int64_t stride, N (*out)[H]) {
#if defined(GC_LEVEL_NEON_I8MM)
    if constexpr (M > 1) return dot_of_pairs<COUNT, M, H>(quads, first, q, stride, out);
#endif
    dot_of_rows<COUNT, M, H>(quads, first, q, stride, out);
}

}  // namespace
}  // namespace gemcutter
