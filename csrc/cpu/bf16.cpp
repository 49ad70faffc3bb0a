// GEMM on processors with AVX512_BF16: bfloat16 matrices times many bfloat16 rows, sums in float32.
//
// Owns the order of a panel's values: 16 matrix rows side by side, two neighbouring columns in each lane, as one instruction
// multiplies them. Serves rows that are asked for in bfloat16: a decoder's prompts would else depend on how many rows a step has.
// Few rows and other matrices go to the AVX-512 kernels. Refuses to know threads. Read `matmul_bf16.h` for the micro-kernel,
// `matmul_f32.h` for how panels are transposed, `parallel_gemm.cpp` for the caller.
#include "kernels.h"
#include "matmul_bf16.h"
#include "matmul_f32.h"

namespace gemcutter {
namespace {

// Up to 16 rows a row's result must not depend on the rows beside it: AVX-512 computes those.
constexpr int64_t LEAST_ROWS = 17;
constexpr int64_t PAIR_CHUNK = 256;  // pairs of columns of one transposed chunk: 16 KB, half of an L1 cache
constexpr int64_t SPARE_ROWS = 64;   // activation rows at a time of a panel that lacks rows
void gemm(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t begin, int64_t count, float *out, int64_t ld,
          float *transposed) {
    const float *starts[PANEL], *some[PANEL];  // pairs of columns as one element
    for (int64_t r = 0; r < PANEL; ++r) {
        int64_t row = panel * PANEL + r < m.rows ? panel * PANEL + r : m.rows - 1;
        starts[r] = reinterpret_cast<const float *>(static_cast<const char *>(m.data) + row * m.stride);
    }
    const uint32_t *a = reinterpret_cast<const uint32_t *>(rows.bf16 + begin * rows.columns);
    int64_t pairs = m.columns / 2;
    for (int64_t i = 0; i < pairs; i += PAIR_CHUNK) {
        int64_t some_pairs = pairs - i < PAIR_CHUNK ? pairs - i : PAIR_CHUNK;
        for (int r = 0; r < PANEL; ++r) some[r] = starts[r] + i;
        pack_panel<F32>(some, some_pairs, transposed);
        pair_panel(a + i, pairs, count, reinterpret_cast<uint32_t *>(transposed), PANEL, some_pairs, out, ld, i > 0);
    }
}

bool fits(const gc_matrix &m, int64_t rows, int activations) {
    return rows >= LEAST_ROWS && activations == GC_BF16_ROWS && m.columns % 2 == 0 && m.stride % 4 == 0 && m.codes == GC_BF16;
}

int formats(const gc_matrix *m, int64_t rows, int activations) {
    return fits(*m, rows, activations) ? FORMAT_BF16 : dense_avx512.formats(m, rows, activations);
}

void gemm_panels(const gc_matrix *m, int64_t panel, int64_t panels, const Rows *rows, int64_t first, int64_t last, float *out,
                 int64_t ld, void *scratch, const void *next) {
    if (!fits(*m, rows->count, rows->activations))
        return dense_avx512.gemm_panels(m, panel, panels, rows, first, last, out, ld, scratch, next);
    float *transposed = static_cast<float *>(scratch), *spare = transposed + PAIR_CHUNK * PANEL;
    int64_t left = m->rows - panel * PANEL;
    if (left >= PANEL) return gemm(*m, panel, *rows, first, last - first, out, ld, transposed);
    for (; first < last; first += SPARE_ROWS, out += SPARE_ROWS * ld) {
        int64_t count = last - first < SPARE_ROWS ? last - first : SPARE_ROWS;
        gemm(*m, panel, *rows, first, count, spare, PANEL, transposed);
        for (int64_t i = 0; i < count; ++i) memcpy(out + i * ld, spare + i * PANEL, sizeof(float) * (size_t)left);
    }
}

size_t scratch_bytes(const gc_matrix *m) {
    size_t own = sizeof(float) * (PAIR_CHUNK + SPARE_ROWS) * PANEL, other = dense_avx512.scratch_bytes(m);
    return own > other ? own : other;
}

void gather(const gc_matrix *m, int64_t row, float *out) { dense_avx512.gather(m, row, out); }

}  // namespace

extern const MatmulKernels dense_avx512_bf16 = {formats, gemm_panels, scratch_bytes, gather, 1, 2 * CHUNK_ELEMENTS, CHUNK_ROWS};

}  // namespace gemcutter
