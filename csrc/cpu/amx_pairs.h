// Panels of a matrix as AMX reads them: pairs of neighbouring columns in bfloat16, 16 rows side by side. Included by sources of the
// level amx only.
//
// Owns the rounding of weights: a value is computed in float32 and rounded once, by at most 2^-9 of itself. Codes of 4 bits become
// values by a table in a register. Refuses to know products. Read `packed_decode.h` for how panels are decoded.
#pragma once
#include "matmul_f32.h"
#include "packed_decode.h"

namespace gemcutter {
namespace {

constexpr int64_t PAIR_ELEMENTS = 2 * PANEL;  // of two columns

// Rounds to nearest, ties away from zero.
GC_INLINE __m512i pair(V even, V odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_add_epi32(_mm512_castps_si512(odd), half));
}

// Four columns of 16 rows.
GC_INLINE void store_quad(const V (&values)[4], uint16_t *pairs) {
    _mm512_storeu_si512(pairs, pair(values[0], values[1]));
    _mm512_storeu_si512(pairs + PAIR_ELEMENTS, pair(values[2], values[3]));
}

// What the 16 codes of 4 bits stand for, but for scale and bias.
inline V values_of_codes(const gc_matrix &m) {
    float values[16];
    for (int code = 0; code < 16; ++code)
        values[code] = (float)(m.offset + (m.codes == GC_T4 ? (int)(int8_t)m.levels[code] : code));
    return load(values);
}

// The column of a quad that begins at a bit: only the lowest four bits of a place in a table count.
template <int BIT>
GC_INLINE V looked_up(V table, __m512i quad) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(quad, BIT), table);
}

template <int UPPER, bool IS_BIASED>
GC_INLINE void quad_of_nibbles(V table, __m512i raw, V scale, V bias, uint16_t *pairs) {
    V values[4] = {looked_up<4 * UPPER>(table, raw), looked_up<4 * UPPER + 8>(table, raw), looked_up<4 * UPPER + 16>(table, raw),
                   looked_up<4 * UPPER + 24>(table, raw)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) values[i] = IS_BIASED ? fma(values[i], scale, bias) : values[i] * scale;
    store_quad(values, pairs);
}

// A block of a panel of 4-bit codes.
template <int PIECES, bool IS_BIASED>
GC_INLINE void pairs_of_nibbles(V table, const uint8_t *codes, const Scales<PIECES> &scales, uint16_t *pairs) {
#pragma GCC unroll 4
    for (int j = 0; j < QUADS / 2; ++j) {
        const __m512i raw = _mm512_loadu_si512(codes + j * QUAD_BYTES);
        uint16_t *low = pairs + j * 2 * PAIR_ELEMENTS, *high = low + QUADS / 2 * 2 * PAIR_ELEMENTS;
        quad_of_nibbles<0, IS_BIASED>(table, raw, scales.scale[0][0], scales.bias[0][0], low);
        quad_of_nibbles<1, IS_BIASED>(table, raw, scales.scale[PIECES - 1][0], scales.bias[PIECES - 1][0], high);
    }
}

// A block of bytes.
template <int PIECES, bool IS_SIGNED>
GC_INLINE void pairs_of_bytes(V offset, const uint8_t *bytes, const Scales<PIECES> &scales, uint16_t *pairs) {
#pragma GCC unroll 8
    for (int j = 0; j < QUADS; ++j, pairs += 2 * PAIR_ELEMENTS) {
        const int piece = j * PIECES / QUADS;
        const V scale = scales.scale[piece][0], base = fma(scale, offset, scales.bias[piece][0]);
        const uint8_t *quad = bytes + j * QUAD_BYTES;
        const V values[4] = {
            fma(scale, column_of<0>(quad, 0, IS_SIGNED), base), fma(scale, column_of<1>(quad, 0, IS_SIGNED), base),
            fma(scale, column_of<2>(quad, 0, IS_SIGNED), base), fma(scale, column_of<3>(quad, 0, IS_SIGNED), base)};
        store_quad(values, pairs);
    }
}

// The next block of a panel. `values` are those of its codes, if they have 4 bits; biases of a decoder without them are 0.
template <int PIECES>
void pairs_of_packed(const gc_matrix &m, V values, PanelDecoder<PIECES> &decoder, uint16_t *pairs) {
    const uint8_t *codes = decoder.next();
    if (m.codes == GC_U4 || m.codes == GC_T4) {
        if (decoder.is_biased) return pairs_of_nibbles<PIECES, true>(values, codes, decoder.scales, pairs);
        return pairs_of_nibbles<PIECES, false>(values, codes, decoder.scales, pairs);
    }
    const V offset = set1((float)m.offset);
    if (m.codes == GC_S8) return pairs_of_bytes<PIECES, true>(offset, codes, decoder.scales, pairs);
    alignas(64) uint8_t unpacked[QUADS * QUAD_BYTES];
    unpack_block(m, codes, unpacked);
    pairs_of_bytes<PIECES, false>(offset, unpacked, decoder.scales, pairs);
}

// Columns start.. of a panel of bfloat16. Two columns of a row are 32 bits, so making pairs is a 32-bit transpose. The last row stands
// for those that are missing.
inline void pairs_of_dense(const gc_matrix &m, int64_t panel, int64_t start, int64_t columns, uint16_t *pairs) {
    const float *rows[PANEL];
    for (int64_t r = 0; r < PANEL; ++r) {
        rows[r] = reinterpret_cast<const float *>(row_or_last(m, panel * PANEL + r)) + start / 2;
    }
    pack_panel<F32>(rows, columns / 2, reinterpret_cast<float *>(pairs));
}

}  // namespace
}  // namespace gemcutter
