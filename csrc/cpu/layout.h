// The memory layout of packed matrices: panels of 16 rows whose codes are interleaved, so that a vector lane is a row.
//
// A matrix is ceil(rows / 16) panels of `stride` bytes (a multiple of 64; rows beyond the last have scale and bias 0). Columns are
// a multiple of 32. A panel is a sequence of groups in column order, each: scales, biases, codes.
//
//   GC_SCALE_F16/BF16/F32, group G >= 32 (a multiple of 32 that divides the columns):
//       scale[16], bias[16] iff has_bias, then G/32 code blocks
//   the same with G == 16, per 32 columns: scale[2][16], bias[2][16] iff has_bias, one code block
//   GC_SUPER32, per 256 columns: d f16[16], dmin f16[16], then 8 times: sc u8[16], m u8[16], one code block;
//       scale = d * sc, bias = -(dmin * m), for 32 columns each
//   GC_SUPER16, per 256 columns: d f16[16], then 8 times: sc s8[2][16], one code block; scale = d * sc for 16 columns each
//       (d and dmin count in units of 2^exponent: what a format multiplies its scales with would not fit into small float16)
//
// value = scale * (code + offset) + bias, scale and bias in float32.
//
// A code block is 32 columns of 16 rows. A *quad* is 4 neighbouring columns; quad j (0..7) holds columns 4j..4j+3. A quad vector
// has 64 codes; that of row r and column c of the quad is at r * 4 + c.
//   GC_S8: 8 quad vectors of signed bytes, 512 bytes
//   GC_U4: 4 vectors of 64 bytes; vector j has quad j in the low and quad j + 4 in the high nibbles, 256 bytes
//   GC_T4: as GC_U4, where a code is a place in the matrix' table of signed bytes, and counts as the byte there
//   GC_U6: as GC_U4 for the low four bits, then 2 vectors of 64 bytes: vector h has the upper two bits of quad 4h + k at bits
//          2k and 2k + 1, 384 bytes
//   GC_E4M3: no quads, but the 16 rows of each column side by side, 512 bytes; the codes are 8-bit floats (e4m3: 4 bits of exponent,
//            3 of mantissa, no infinity), which stand for themselves, without offset and bias
#pragma once
#include <stdint.h>

#include "api.h"

namespace gemcutter {

constexpr int PANEL = 16;      // rows of a panel
constexpr int BLOCK = 32;      // columns of a code block, and of one activation scale
constexpr int SPARE_ROWS = 7;  // of activations behind the last one, which kernels may read along and drop
constexpr int SUPER = 256;     // columns of a super-block
// Prefetch distance: without it a core does not use its share of memory bandwidth.
constexpr int64_t PREFETCH_BYTES = 6144;
// Where prefetched codes wait: in the L1 cache they would take its few misses at a time from the rows' own loads.
constexpr int IN_L2 = 2;

inline bool is_dense(const gc_matrix &m) { return m.codes >= GC_BF16 && m.codes <= GC_F32; }

inline bool is_signed(const gc_matrix &m) { return m.codes == GC_S8 || m.codes == GC_T4; }

constexpr int64_t code_block_bytes(int codes) { return codes == GC_U4 || codes == GC_T4 ? 256 : codes == GC_U6 ? 384 : 512; }

inline int64_t scale_bytes(int scales) { return scales == GC_SCALE_F32 ? 4 : 2; }

// Bytes of one panel before rounding up to the stride.
inline int64_t panel_bytes(int codes, int scales, int group, bool has_bias, int64_t columns) {
    int64_t blocks = columns / BLOCK, coded = blocks * code_block_bytes(codes);
    if (scales == GC_SUPER32) return columns / SUPER * 64 + blocks * 32 + coded;
    if (scales == GC_SUPER16) return columns / SUPER * 32 + blocks * 32 + coded;
    return columns / group * PANEL * scale_bytes(scales) * (has_bias ? 2 : 1) + coded;
}

}  // namespace gemcutter
