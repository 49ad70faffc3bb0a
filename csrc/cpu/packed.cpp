// Kernels for packed matrices: products with activation rows, and gathering of single rows. Compiled once per processor level.
//
// Owns the level's table `packed` and the choice of kernel: int8 activations where there are any, float32 otherwise. Refuses to
// know threads (`parallel_gemm.cpp` shares panels among them). Read `layout.h` for the bytes, then `packed_decode.h`,
// `packed_dot.h`, `packed_int8.h` and `packed_tiles.h`.
#include "packed_float.h"

namespace gemcutter {
namespace {

int formats(const gc_matrix *m, int64_t, int activations) {
    if (activations != GC_INT8 || m->codes == GC_E4M3) return FORMAT_FLOAT;
    return pieces_of(*m) == 2 ? FORMAT_INT8 | FORMAT_HALVES : FORMAT_INT8;
}

template <class Code, int PIECES>
void int8_panels(const gc_matrix &m, int64_t panel, int64_t panels, const Rows &rows, int64_t first, int64_t last, float *out,
                 int64_t ld, void *scratch, const void *next) {
    if (last - first > STREAM_ROWS) return int8_tiles<Code, PIECES>(m, panel, panels, rows, first, last, out, ld, scratch, next);
    if constexpr (STREAM_ROWS > 0)
        for (; panels > 0; --panels, ++panel, out += PANEL)
            int8_stream<Code, PIECES>(m, panel, rows, first, last, out, ld, panels > 1 ? nullptr : next);
}

// Whether the table of a matrix of GC_T4 lies from -below to below - 1.
[[maybe_unused]] bool lies_within(const gc_matrix &m, int below) {
    bool is_inside = true;
    for (int8_t level : m.levels) is_inside = is_inside && level >= -below && level < below;
    return is_inside;
}

template <int PIECES>
auto *int8_panels_of(const gc_matrix &m) {
    if (m.codes == GC_U4) return int8_panels<Code4, PIECES>;
    if (m.codes == GC_U6) return int8_panels<Code6, PIECES>;
    if (m.codes == GC_S8) return int8_panels<Code8, PIECES>;
#if defined(GC_LEVEL_AVX2) && !defined(GC_DOT_BYTES)
    if (lies_within(m, 16)) return int8_panels<CodeT4<16>, PIECES>;
    if (lies_within(m, 64)) return int8_panels<CodeT4<64>, PIECES>;
#endif
    return int8_panels<CodeT4<128>, PIECES>;
}

template <int PIECES>
void panels_in_pieces(const gc_matrix &m, int64_t panel, int64_t panels, const Rows &rows, int64_t first, int64_t last,
                      float *out, int64_t ld, void *scratch, const void *next) {
    if (rows.q && rows.activations == GC_INT8 && m.codes != GC_E4M3)
        return int8_panels_of<PIECES>(m)(m, panel, panels, rows, first, last, out, ld, scratch, next);
    for (; panels > 0; --panels, ++panel, out += PANEL) float_panel<PIECES>(m, panel, rows, first, last, out, ld, scratch);
}

void gemm_panels(const gc_matrix *m, int64_t panel, int64_t panels, const Rows *rows, int64_t first, int64_t last, float *out,
                 int64_t ld, void *scratch, const void *next) {
    auto *run = pieces_of(*m) == 2 ? panels_in_pieces<2> : panels_in_pieces<1>;
    run(*m, panel, panels, *rows, first, last, out, ld, scratch, next);
}

template <class Needed>
constexpr size_t larger(size_t bytes) {
    return sizeof(Needed) > bytes ? sizeof(Needed) : bytes;
}

size_t scratch_bytes(const gc_matrix *) { return larger<FloatRun>(larger<TileScratch<1>>(sizeof(TileScratch<2>))); }

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

Blocking blocking(const gc_matrix *) { return {PANELS_AT_ONCE, CHUNK_ROWS}; }

}  // namespace

extern const MatmulKernels GC_NAME(packed) = {formats, gemm_panels, scratch_bytes, gather, blocking};

}  // namespace gemcutter
