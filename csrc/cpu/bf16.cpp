// GEMM on processors with AVX512_BF16: bfloat16 matrices times many rows rounded to bfloat16, sums in float32.
//
// Owns the order of loops: a run of columns of three panels is brought into pairs, 16 matrix rows side by side, two neighbouring
// columns in each lane as one instruction multiplies them; 8 rows at a time meet all three, and their sums wait in scratch memory
// from run to run. Few rows go to `bf16_few.h`, rows that stay float32 and other matrices to the AVX-512 kernels. Refuses to know
// threads. Read `matmul_f32.h` for how panels are transposed, `parallel_gemm.cpp` for the caller.
#include "bf16_few.h"

namespace gemcutter {
namespace {

constexpr int PANELS_AT_ONCE = 3, TILE_M = 8;
constexpr int64_t RUN_PAIRS = 128;  // of columns: 24 KB for three panels, half of an L1 cache
constexpr int64_t MOST_ROWS = 2 * CHUNK_ROWS + FEW_ROWS;
static_assert(TILE_M - 1 <= SPARE_ROWS, "tiles read along rows that must exist");

struct BfloatScratch {
    alignas(64) uint32_t pairs[PANELS_AT_ONCE][RUN_PAIRS * PANEL];
    alignas(64) float sums[(MOST_ROWS + TILE_M) * PANELS_AT_ONCE * PANEL];
};

// Rows first..last-1, MOST_ROWS at most, times H panels. Up to TILE_M - 1 rows beyond the last are read, and what follows from
// them is dropped.
template <int H>
void multiply_panels(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t first, int64_t last, float *out, int64_t ld,
                     BfloatScratch &scratch) {
    const int64_t all = m.columns / 2, left = m.rows - panel * PANEL, width = left < H * PANEL ? left : H * PANEL;
    const int64_t tiles = (last - first + TILE_M - 1) / TILE_M;
    const uint32_t *a = reinterpret_cast<const uint32_t *>(rows.bf16 + first * rows.columns);
    for (int64_t start = 0; start < all; start += RUN_PAIRS) {
        const int64_t count = all - start < RUN_PAIRS ? all - start : RUN_PAIRS;
        for (int h = 0; h < H; ++h) {
            const float *some[PANEL];
            for (int r = 0; r < PANEL; ++r)
                some[r] = reinterpret_cast<const float *>(row_or_last(m, (panel + h) * PANEL + r)) + start;  // two columns each
            pack_panel<F32>(some, count, reinterpret_cast<float *>(scratch.pairs[h]));
        }
        const bool is_last = start + count == all;
        const int64_t then = is_last ? 0 : start + count, pairs = all - then < RUN_PAIRS ? all - then : RUN_PAIRS;
        LinesAhead<> ahead = lines_of_rows(m, (is_last ? panel + H : panel) * PANEL, H * PANEL, then * 4, pairs * 4);
        const int64_t lines = (H * PANEL / tiles + 1) * ((pairs * 4 + 63) / 64);
        for (int64_t tile = 0, row = 0; tile < tiles; ++tile, row += TILE_M) {
            ahead.some(lines);
            float *sums = scratch.sums + row * H * PANEL;
            const bool is_whole = is_last && first + row + TILE_M <= last && width == H * PANEL;
            pair_tiles<TILE_M, H>(a + row * all + start, all, scratch.pairs[0], RUN_PAIRS * PANEL, count, start ? sums : nullptr,
                                  H * PANEL, is_whole ? out + row * ld : sums, is_whole ? ld : H * PANEL);
            if (!is_last || is_whole) continue;
            for (int64_t i = row; i < row + TILE_M && first + i < last; ++i)
                memcpy(out + i * ld, sums + (i - row) * H * PANEL, sizeof(float) * (size_t)width);
        }
    }
}

bool fits(const gc_matrix &m, int activations) {
    return activations != GC_FLOAT_ROWS && m.columns % 2 == 0 && m.stride % 4 == 0 && m.codes == GC_BF16;
}

int formats(const gc_matrix *m, int64_t rows, int activations) {
    return fits(*m, activations) ? FORMAT_BF16 : dense_avx512.formats(m, rows, activations);
}

void gemm_panels(const gc_matrix *m, int64_t panel, int64_t panels, const Rows *rows, int64_t first, int64_t last, float *out,
                 int64_t ld, void *scratch, const void *next) {
    if (!fits(*m, rows->activations)) {
        for (; panels > 0; --panels, ++panel, out += PANEL)
            dense_avx512.gemm_panels(m, panel, 1, rows, first, last, out, ld, scratch, next);
        return;
    }
    if (last - first <= FEW_ROWS) {
        const uint16_t *x = rows->bf16 + first * rows->columns;
        for (; panels > 0; --panels, ++panel, out += PANEL) multiply_few(*m, panel, x, last - first, out, ld);
        return;
    }
    auto *run = panels == 3 ? multiply_panels<3> : panels == 2 ? multiply_panels<2> : multiply_panels<1>;
    for (; first < last; first += MOST_ROWS, out += MOST_ROWS * ld) {
        int64_t end = last < first + MOST_ROWS ? last : first + MOST_ROWS;
        run(*m, panel, *rows, first, end, out, ld, *static_cast<BfloatScratch *>(scratch));
    }
}

size_t scratch_bytes(const gc_matrix *m) {
    size_t other = dense_avx512.scratch_bytes(m);
    return sizeof(BfloatScratch) > other ? sizeof(BfloatScratch) : other;
}

void gather(const gc_matrix *m, int64_t row, float *out) { dense_avx512.gather(m, row, out); }

Blocking blocking(const gc_matrix *) { return {PANELS_AT_ONCE, 2 * CHUNK_ROWS}; }

}  // namespace

extern const MatmulKernels dense_avx512_bf16 = {formats, gemm_panels, scratch_bytes, gather, blocking};

}  // namespace gemcutter
