// Reading packed panels: scales as float vectors, codes as bytes, values as floats.
//
// Owns the iteration over a panel (layout.h) for every kind of scales, and the unpacking of 4-bit and 6-bit codes to the layout
// of an 8-bit code block, codes that have a table to what it has for them. Included by level sources only. Refuses to know
// activations and products. Read `packed_dot.h` next.
#pragma once
#include "kernels.h"
#include "matrix_rows.h"
#include "vec.h"

namespace gemcutter {
namespace {

constexpr int PARTS = PANEL / W;  // vectors that hold one value for each row of a panel
constexpr int QUADS = BLOCK / 4;  // quads of a code block
constexpr int QUAD_BYTES = PANEL * 4;

// W bytes as floats; integer vectors N of W lanes.
#if defined(GC_LEVEL_AVX512)
typedef __m512i N;
inline V to_float(N n) { return _mm512_cvtepi32_ps(n); }
inline V load_u8(const uint8_t *p) { return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))); }
inline V load_s8(const uint8_t *p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
#elif defined(GC_LEVEL_AVX2)
typedef __m256i N;
inline V to_float(N n) { return _mm256_cvtepi32_ps(n); }
inline V load_u8(const uint8_t *p) { return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
inline V load_s8(const uint8_t *p) { return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
#elif defined(GC_LEVEL_NEON)
typedef int32x4_t N;
inline V to_float(N n) { return vcvtq_f32_s32(n); }
inline uint8x8_t load_four(const uint8_t *p) {
    uint32_t all;
    memcpy(&all, p, 4);
    return vcreate_u8(all);
}
inline V load_u8(const uint8_t *p) { return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load_four(p))))); }
inline V load_s8(const uint8_t *p) { return to_float(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_four(p)))))); }
#else
typedef int32_t N __attribute__((vector_size(4 * W)));
inline V to_float(N n) { return __builtin_convertvector(n, V); }
inline V load_u8(const uint8_t *p) {
    V v;
    for (int i = 0; i < W; ++i) v[i] = (float)p[i];
    return v;
}
inline V load_s8(const uint8_t *p) {
    V v;
    for (int i = 0; i < W; ++i) v[i] = (float)(int8_t)p[i];
    return v;
}
#endif
inline V zero() { return set1(0.0f); }

inline V power_of_two(int exponent) {
    const uint32_t bits = (uint32_t)(127 + exponent) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return set1(power);
}

// The table of a matrix of GC_T4 in every 16 bytes of a vector; with `shift`, added to each, as unsigned bytes.
inline N table_of(const gc_matrix &m, int shift) {
    uint8_t all[sizeof(N)];
    for (size_t i = 0; i < sizeof all; ++i) all[i] = (uint8_t)(m.levels[i % sizeof m.levels] + shift);
    N table;
    memcpy(&table, all, sizeof table);
    return table;
}

// Replaces bytes below 16 by what a table has for them.
#if defined(GC_LEVEL_AVX512)
inline N look_up(N table, N codes) { return _mm512_shuffle_epi8(table, codes); }
#elif defined(GC_LEVEL_AVX2)
inline N look_up(N table, N codes) { return _mm256_shuffle_epi8(table, codes); }
#elif defined(GC_LEVEL_NEON)
inline N look_up(N table, N codes) {
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(codes)));
}
#else
inline N look_up(N table, N codes) {
    uint8_t values[sizeof table], found[sizeof codes];
    memcpy(values, &table, sizeof table);
    memcpy(found, &codes, sizeof codes);
    for (uint8_t &each : found) each = values[each];
    memcpy(&codes, found, sizeof codes);
    return codes;
}
#endif

// The scales of one code block, a vector lane for each row: with PIECES 2, one for each 16 columns.
template <int PIECES>
struct Scales {
    V scale[PIECES][PARTS], bias[PIECES][PARTS];
};

inline int pieces_of(const gc_matrix &m) { return m.group == 16 ? 2 : 1; }
inline bool has_bias(const gc_matrix &m) { return m.has_bias || m.scales == GC_SUPER32; }

inline const uint8_t *panel_of(const gc_matrix &m, int64_t panel) {
    return static_cast<const uint8_t *>(m.data) + panel * m.stride;
}

// Decodes a panel block by block.
template <int PIECES>
struct PanelDecoder {
    const uint8_t *at;
    int64_t code_bytes;
    int kind, blocks_of_scale, until_scale = 0;
    bool is_biased;
    V unit, super[2][PARTS];  // unit: of super-blocks' float16 scales
    Scales<PIECES> scales = {};

    PanelDecoder() = default;  // one that must be replaced
    GC_INLINE PanelDecoder(const gc_matrix &m, int64_t panel)
        : at(panel_of(m, panel)),
          code_bytes(code_block_bytes(m.codes)),
          kind(m.scales),
          blocks_of_scale(kind >= GC_SUPER32 ? SUPER / BLOCK
                          : m.group > BLOCK  ? m.group / BLOCK
                                             : 1),
          is_biased(has_bias(m)),
          unit(power_of_two(m.exponent)) {}

    // Reads the scales before the next block's codes into `scales`, and returns the codes.
    GC_INLINE const uint8_t *next() {
        bool is_due = until_scale == 0;
        if (is_due) until_scale = blocks_of_scale;
        --until_scale;
        if (kind >= GC_SUPER32) {
            if (is_due) read_super();
            read_fine();
        } else if (is_due) {
            for (int i = 0; i < PIECES; ++i) read_plain(scales.scale[i]);
            for (int i = 0; i < PIECES; ++i)
                if (is_biased) read_plain(scales.bias[i]);
        }
        const uint8_t *codes = at;
        at += code_bytes;
        return codes;
    }

  private:
    GC_INLINE void read_plain(V *out) {
        for (int h = 0; h < PARTS; ++h) {
            if (kind == GC_SCALE_F16) out[h] = load_f16((const uint16_t *)at + h * W);
            else if (kind == GC_SCALE_BF16) out[h] = load_bf16((const uint16_t *)at + h * W);
            else out[h] = load((const float *)at + h * W);
        }
        at += PANEL * scale_bytes(kind);
    }

    GC_INLINE void read_super() {
        for (int i = 0; i < (kind == GC_SUPER32 ? 2 : 1); ++i) {
            for (int h = 0; h < PARTS; ++h) super[i][h] = load_f16((const uint16_t *)at + h * W) * unit;
            at += PANEL * 2;
        }
    }

    // Products of a float16 and 8 bits are exact in float32.
    GC_INLINE void read_fine() {
        for (int h = 0; h < PARTS; ++h) {
            const uint8_t *p = at + h * W;
            if (PIECES == 1) {
                scales.scale[0][h] = super[0][h] * load_u8(p);
                scales.bias[0][h] = zero() - super[1][h] * load_u8(p + PANEL);
            } else {
                scales.scale[0][h] = super[0][h] * load_s8(p);
                scales.scale[PIECES - 1][h] = super[0][h] * load_s8(p + PANEL);
            }
        }
        at += 2 * PANEL;
    }
};

// Unpacks a code block to 8 quad vectors of bytes, 512 in all; signed codes stay signed.
inline void unpack_block(const gc_matrix &m, const uint8_t *from, uint8_t *to) {
    if (m.codes == GC_S8) {
        memcpy(to, from, QUADS * QUAD_BYTES);
        return;
    }
    const uint8_t *upper = from + 4 * QUAD_BYTES;
    for (int j = 0; j < QUADS / 2; ++j)
        for (int i = 0; i < QUAD_BYTES; ++i) {
            uint8_t both = from[j * QUAD_BYTES + i], low = both & 15, high = both >> 4;
            if (m.codes == GC_U6) {
                low |= (uint8_t)((upper[i] >> (2 * j) & 3) << 4);
                high |= (uint8_t)((upper[QUAD_BYTES + i] >> (2 * j) & 3) << 4);
            }
            to[j * QUAD_BYTES + i] = low;
            to[(j + 4) * QUAD_BYTES + i] = high;
        }
    if (m.codes != GC_T4) return;
    const N table = table_of(m, 0);
    for (int i = 0; i < QUADS * QUAD_BYTES; i += (int)sizeof(N)) {
        N codes;
        memcpy(&codes, to + i, sizeof codes);
        codes = look_up(table, codes);
        memcpy(to + i, &codes, sizeof codes);
    }
}

// One column of a quad vector of bytes, W rows of it from `part` on, as floats.
template <int COLUMN>
GC_INLINE V column_of(const uint8_t *quad, int part, bool is_signed) {
#if defined(GC_LEVEL_AVX512)
    const N top = _mm512_slli_epi32(_mm512_loadu_si512(quad + part * W * 4), 24 - 8 * COLUMN);
    return to_float(is_signed ? _mm512_srai_epi32(top, 24) : _mm512_srli_epi32(top, 24));
#elif defined(GC_LEVEL_AVX2)
    const N top = _mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(quad + part * W * 4)), 24 - 8 * COLUMN);
    return to_float(is_signed ? _mm256_srai_epi32(top, 24) : _mm256_srli_epi32(top, 24));
#elif defined(GC_LEVEL_NEON)
    const uint32x4_t top = vshlq_n_u32(vreinterpretq_u32_u8(vld1q_u8(quad + part * W * 4)), 24 - 8 * COLUMN);
    return is_signed ? to_float(vshrq_n_s32(vreinterpretq_s32_u32(top), 24)) : vcvtq_f32_u32(vshrq_n_u32(top, 24));
#else
    V v;
    for (int i = 0; i < W; ++i) {
        const uint8_t code = quad[(part * W + i) * 4 + COLUMN];
        v[i] = is_signed ? (float)(int8_t)code : (float)code;
    }
    return v;
#endif
}

// Calls sink(column, part, values of W rows) for the columns of a block that was unpacked, in order.
template <int PIECES, typename Sink>
GC_INLINE void each_value(const uint8_t *bytes, const Scales<PIECES> &scales, bool is_biased, float offset, bool is_signed,
                          Sink sink) {
#pragma GCC unroll 2
    for (int piece = 0; piece < PIECES; ++piece) {
        V base[PARTS];
        for (int part = 0; part < PARTS; ++part) {
            base[part] = scales.scale[piece][part] * set1(offset);
            if (is_biased) base[part] = base[part] + scales.bias[piece][part];
        }
#pragma GCC unroll 8
        for (int j = piece * QUADS / PIECES; j < (piece + 1) * QUADS / PIECES; ++j)
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; ++part) {
                const uint8_t *quad = bytes + j * QUAD_BYTES;
                const V scale = scales.scale[piece][part];
                sink(4 * j, part, fma(scale, column_of<0>(quad, part, is_signed), base[part]));
                sink(4 * j + 1, part, fma(scale, column_of<1>(quad, part, is_signed), base[part]));
                sink(4 * j + 2, part, fma(scale, column_of<2>(quad, part, is_signed), base[part]));
                sink(4 * j + 3, part, fma(scale, column_of<3>(quad, part, is_signed), base[part]));
            }
    }
}

// A column of 8-bit floats, 16 rows, as floats. Shifted into place they are half floats whose exponents are 8 too small, so that
// subnormal ones, too, are exact; those that would stand for 480 are NaN.
GC_INLINE void column_of_e4m3(const uint8_t *bytes, V (&values)[PARTS]) {
    constexpr int PLACES = 0xbf80, SIZE = 0x3f80;  // where sign and the other seven bits go, and the latter alone
#if defined(GC_LEVEL_AVX512) || defined(GC_LEVEL_AVX2)
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)bytes)), size = _mm256_set1_epi16(SIZE);
    __m256i halves = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)PLACES));
    halves = _mm256_or_si256(halves, _mm256_cmpeq_epi16(_mm256_and_si256(halves, size), size));
#if defined(GC_LEVEL_AVX512)
    values[0] = _mm512_cvtph_ps(halves);
#else
    values[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    values[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#endif
#elif defined(GC_LEVEL_NEON)
    const int8x16_t codes = vreinterpretq_s8_u8(vld1q_u8(bytes));
    const int16x8_t both[2] = {vmovl_s8(vget_low_s8(codes)), vmovl_s8(vget_high_s8(codes))}, size = vdupq_n_s16(SIZE);
    for (int i = 0; i < 2; ++i) {
        const int16x8_t half = vandq_s16(vshlq_n_s16(both[i], 7), vdupq_n_s16((int16_t)PLACES));
        const uint16x8_t found = vorrq_u16(vreinterpretq_u16_s16(half), vceqq_s16(vandq_s16(half, size), size));
        values[2 * i] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(found)));
        values[2 * i + 1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(found)));
    }
#else
    for (int row = 0; row < PANEL; ++row) {
        const int half = (int8_t)bytes[row] * 128 & PLACES;
        values[row / W][row % W] = half_to_float((uint16_t)((half & SIZE) == SIZE ? 0x7fff : half));
    }
#endif
    for (int part = 0; part < PARTS; ++part) values[part] = values[part] * set1(256.0f);
}

// Calls sink(column, part, values of W rows) for the columns of a block of 8-bit floats, in order.
template <int PIECES, typename Sink>
GC_INLINE void each_float8(const uint8_t *bytes, const Scales<PIECES> &scales, Sink sink) {
#pragma GCC unroll 8
    for (int column = 0; column < BLOCK; ++column) {
        if (column % 4 == 0) __builtin_prefetch(bytes + column * PANEL + PREFETCH_BYTES, 0, IN_L2);
        V values[PARTS];
        column_of_e4m3(bytes + column * PANEL, values);
        for (int part = 0; part < PARTS; ++part) sink(column, part, values[part] * scales.scale[column * PIECES / BLOCK][part]);
    }
}

// The same for the decoder's next block.
template <int PIECES, typename Sink>
GC_INLINE void each_value(const gc_matrix &m, PanelDecoder<PIECES> &decoder, Sink sink) {
    if (m.codes == GC_E4M3) {
        const uint8_t *codes = decoder.next();
        return each_float8(codes, decoder.scales, sink);
    }
    alignas(64) uint8_t bytes[QUADS * QUAD_BYTES];
    unpack_block(m, decoder.next(), bytes);
    if (is_signed(m)) each_value(bytes, decoder.scales, decoder.is_biased, (float)m.offset, true, sink);
    else each_value(bytes, decoder.scales, decoder.is_biased, (float)m.offset, false, sink);
}

// Writes the values of the decoder's next `blocks` blocks as [column][16 rows] floats.
template <int PIECES>
inline void dequantize(const gc_matrix &m, PanelDecoder<PIECES> &decoder, int64_t blocks, float *out) {
    for (int64_t block = 0; block < blocks; ++block, out += BLOCK * PANEL)
        each_value(m, decoder, [out](int column, int part, V value) { store(out + column * PANEL + part * W, value); });
}

}  // namespace
}  // namespace gemcutter
