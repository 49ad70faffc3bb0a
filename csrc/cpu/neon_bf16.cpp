// GEMM on ARM processors with BF16: bfloat16 matrices times many rows rounded to bfloat16, sums in float32 (bfmmla).
//
// Owns the order of loops: a run of columns of a panel is brought into squares, 4 columns of two neighbouring matrix rows, which
// one instruction multiplies with 4 columns of two activation rows; 4 rows at a time meet all 16 matrix rows, and their sums wait
// in scratch memory from run to run. Few rows, rows that stay float32 and other matrices go to the level neon. Refuses to know
// threads. Read `dense.cpp` for those, `parallel_gemm.cpp` for the caller.
#include "kernels.h"
#include "matrix_rows.h"
#include "vec.h"

namespace gemcutter {
namespace {

// Up to 16 rows a row's result must not depend on the rows beside it: the level neon computes those.
constexpr int64_t LEAST_ROWS = FEW_ROWS + 1;
constexpr int TILE_M = 4, SQUARE = 4;  // SQUARE: columns of one instruction
constexpr int PAIRS = TILE_M / 2, MATRIX_PAIRS = PANEL / 2;
constexpr int64_t RUN_SQUARES = 128;  // of 4 columns: 16 KB for the panel, a part of an L1 cache
constexpr int64_t MOST_ROWS = CHUNK_ROWS + FEW_ROWS;
static_assert(TILE_M - 1 <= SPARE_ROWS, "tiles read along rows that must exist");

struct BfloatScratch {
    alignas(64) uint16_t panel[RUN_SQUARES][MATRIX_PAIRS][2 * SQUARE];
    alignas(64) float sums[MOST_ROWS / TILE_M + 1][PAIRS][MATRIX_PAIRS][4];  // of two rows with two matrix rows each
};

// 4 columns of two rows.
inline uint16x8_t square(const uint16_t *one, const uint16_t *other) { return vcombine_u16(vld1_u16(one), vld1_u16(other)); }

// Brings `count` squares from column `start` on of a panel into order; the last row stands for those that are missing.
inline void pack_squares(const gc_matrix &m, int64_t panel, int64_t start, int64_t count, BfloatScratch &scratch) {
    for (int64_t pair = 0; pair < MATRIX_PAIRS; ++pair) {
        const uint16_t *from[2];
        for (int64_t i = 0; i < 2; ++i) {
            from[i] = reinterpret_cast<const uint16_t *>(row_or_last(m, panel * PANEL + 2 * pair + i)) + start;
        }
        for (int64_t k = 0; k < count; ++k) vst1q_u16(scratch.panel[k][pair], square(from[0] + k * SQUARE, from[1] + k * SQUARE));
    }
}

// sums (itself, or 0 in the first run) + TILE_M rows, `columns` apart, times a run of the panel.
inline void multiply_tile(const uint16_t *rows, int64_t columns, const uint16_t (*panel)[MATRIX_PAIRS][2 * SQUARE], int64_t count,
                          bool is_first, float (*sums)[MATRIX_PAIRS][4]) {
    V total[PAIRS][MATRIX_PAIRS];
    for (int p = 0; p < PAIRS; ++p)
        for (int r = 0; r < MATRIX_PAIRS; ++r) total[p][r] = is_first ? set1(0.0f) : load(sums[p][r]);
    for (int64_t k = 0; k < count; ++k, rows += SQUARE) {
        bfloat16x8_t x[PAIRS];
        for (int p = 0; p < PAIRS; ++p) {
            const uint16_t *one = rows + 2 * p * columns;
            x[p] = vreinterpretq_bf16_u16(square(one, one + columns));
        }
        for (int r = 0; r < MATRIX_PAIRS; ++r) {
            const bfloat16x8_t w = vreinterpretq_bf16_u16(vld1q_u16(panel[k][r]));
            for (int p = 0; p < PAIRS; ++p) total[p][r] = vbfmmlaq_f32(total[p][r], x[p], w);
        }
    }
    for (int p = 0; p < PAIRS; ++p)
        for (int r = 0; r < MATRIX_PAIRS; ++r) store(sums[p][r], total[p][r]);
}

// One row of a tile's sums as the products with the panel's rows, of which there are `width`.
inline void store_row(const float (*sums)[4], int odd, int64_t width, float *out) {
    float row[PANEL];
    for (int r = 0; r < MATRIX_PAIRS; ++r) memcpy(row + 2 * r, sums[r] + 2 * odd, 2 * sizeof(float));
    memcpy(out, row, sizeof(float) * (size_t)width);
}

// Rows first..last-1, MOST_ROWS at most. Up to TILE_M - 1 rows beyond the last are read, and what follows from them is dropped.
void multiply_panel(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t first, int64_t last, float *out, int64_t ld,
                    BfloatScratch &scratch) {
    const int64_t all = m.columns / SQUARE, left = m.rows - panel * PANEL, width = left < PANEL ? left : PANEL;
    const uint16_t *a = rows.bf16 + first * rows.columns;
    for (int64_t start = 0; start < all; start += RUN_SQUARES) {
        const int64_t count = all - start < RUN_SQUARES ? all - start : RUN_SQUARES;
        pack_squares(m, panel, start * SQUARE, count, scratch);
        for (int64_t row = 0; row < last - first; row += TILE_M)
            multiply_tile(a + row * rows.columns + start * SQUARE, rows.columns, scratch.panel, count, start == 0,
                          scratch.sums[row / TILE_M]);
    }
    for (int64_t row = 0; row < last - first; ++row)
        store_row(scratch.sums[row / TILE_M][row % TILE_M / 2], row % 2, width, out + row * ld);
}

bool fits(const gc_matrix &m, int64_t rows, int activations) {
    return rows >= LEAST_ROWS && activations != GC_FLOAT_ROWS && m.columns % SQUARE == 0 && m.codes == GC_BF16;
}

int formats(const gc_matrix *m, int64_t rows, int activations) {
    return fits(*m, rows, activations) ? FORMAT_BF16 : dense_neon.formats(m, rows, activations);
}

void gemm_panels(const gc_matrix *m, int64_t panel, int64_t panels, const Rows *rows, int64_t first, int64_t last, float *out,
                 int64_t ld, void *scratch, const void *next) {
    if (!fits(*m, rows->count, rows->activations))
        return dense_neon.gemm_panels(m, panel, panels, rows, first, last, out, ld, scratch, next);
    for (; first < last; first += MOST_ROWS, out += MOST_ROWS * ld) {
        const int64_t end = last < first + MOST_ROWS ? last : first + MOST_ROWS;
        multiply_panel(*m, panel, *rows, first, end, out, ld, *static_cast<BfloatScratch *>(scratch));
    }
}

size_t scratch_bytes(const gc_matrix *m) {
    const size_t other = dense_neon.scratch_bytes(m);
    return sizeof(BfloatScratch) > other ? sizeof(BfloatScratch) : other;
}

void gather(const gc_matrix *m, int64_t row, float *out) { dense_neon.gather(m, row, out); }

Blocking blocking(const gc_matrix *m) { return {1, most_rows(CHUNK_ELEMENTS, m->columns, CHUNK_ROWS)}; }

}  // namespace

extern const MatmulKernels dense_neon_i8mm = {formats, gemm_panels, scratch_bytes, gather, blocking};

}  // namespace gemcutter
