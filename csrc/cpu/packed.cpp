// Kernels for packed matrices: products with activation rows, and gathering of single rows. Compiled once per processor level.
//
// Owns the level's table `packed` and the choice of kernel: int8 activations where there are any, float32 otherwise. Refuses to
// know threads (`parallel_gemm.cpp` shares panels among them). Read `layout.h` for the bytes, then `packed_decode.h`,
// `packed_dot.h` and `packed_int8.h`.
#include "packed_float.h"

namespace gemcutter {
namespace {

int formats(const gc_matrix *m, int64_t, int activations) {
    if (activations != GC_INT8) return FORMAT_FLOAT;
    return pieces_of(*m) == 2 ? FORMAT_INT8 | FORMAT_HALVES : FORMAT_INT8;
}

template <int PIECES>
void panel_in_pieces(const gc_matrix &m, int64_t panel, const Rows &rows, int64_t first, int64_t last, float *out, int64_t ld,
                     void *scratch, const void *next) {
    if (!rows.q || rows.activations != GC_INT8) return float_panel<PIECES>(m, panel, rows, first, last, out, ld, scratch);
    if (m.codes == GC_U4) return int8_panel<Code4, PIECES>(m, panel, rows, first, last, out, ld, scratch, next);
    if (m.codes == GC_U6) return int8_panel<Code6, PIECES>(m, panel, rows, first, last, out, ld, scratch, next);
    int8_panel<Code8, PIECES>(m, panel, rows, first, last, out, ld, scratch, next);
}

void gemm_panel(const gc_matrix *m, int64_t panel, const Rows *rows, int64_t first, int64_t last, float *out, int64_t ld,
                void *scratch, const void *next) {
    if (pieces_of(*m) == 2) return panel_in_pieces<2>(*m, panel, *rows, first, last, out, ld, scratch, next);
    panel_in_pieces<1>(*m, panel, *rows, first, last, out, ld, scratch, next);
}

size_t scratch_bytes(const gc_matrix *) {
    size_t most = sizeof(FloatRun);
    if (sizeof(Run<1>) > most) most = sizeof(Run<1>);
    if (sizeof(Run<2>) > most) most = sizeof(Run<2>);
    return most;
}

template <int PIECES>
void gather_in_pieces(const gc_matrix &m, int64_t row, float *out) {
    PanelDecoder<PIECES> decoder(m, row / PANEL);
    alignas(64) float values[BLOCK][PANEL];
    for (int64_t block = 0; block < m.columns / BLOCK; ++block) {
        dequantize(m, decoder, 1, values[0]);
        for (int c = 0; c < BLOCK; ++c) *out++ = values[c][row % PANEL];
    }
}

void gather(const gc_matrix *m, int64_t row, float *out) {
    if (pieces_of(*m) == 2) return gather_in_pieces<2>(*m, row, out);
    gather_in_pieces<1>(*m, row, out);
}

}  // namespace

extern const MatmulKernels GC_NAME(packed) = {formats, gemm_panel, scratch_bytes, gather, CHUNK_ELEMENTS, CHUNK_ROWS};

}  // namespace gemcutter
