// GEMM on processors with AMX: packed and bfloat16 matrices times many bfloat16 rows, 16 x 16 float32 accumulators per tile.
//
// Owns the conversion of a panel to AMX tiles: its values become bfloat16 pairs of columns (each is rounded once, by at most 2^-9
// of itself), activations are bfloat16, and products are accumulated in float32 over all columns. That is nearer to the reference
// than int8 activations are, so callers that asked for int8 get it too. Few rows, float32 rows and other matrices go to the
// AVX-512 kernels. Refuses to know threads: a call configures its thread's tiles and releases them before it returns. Read
// `packed_decode.h` for how panels are decoded, `parallel_gemm.cpp` for the caller.
#include "matmul_f32.h"
#include "packed_decode.h"

#if defined(GC_EMULATE)
#include "../emulate/amx.h"
#endif

namespace gemcutter {
namespace {

// Up to 16 rows, which would fill one tile, a row's result must not depend on the rows beside it: AVX-512 computes those.
constexpr int64_t LEAST_ROWS = FEW_ROWS + 1;
constexpr int TILES = 4;      // tiles of rows that share one load of the matrix
constexpr int64_t STEP = 32;  // columns of one tile multiplication
constexpr int TILE_FLOATS = PANEL * PANEL;

struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Compilers may drop or move stores that only a tile instruction reads: the clobber tells them that memory is read.
inline void memory_is_read(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

void configure() {
    TileShapes shapes = {};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = 64, shapes.rows[tile] = 16;
    memory_is_read(&shapes);
    _tile_loadconfig(&shapes);
}

// ---- a panel as pairs: [columns / 2][16 rows][2] in bfloat16 ----

template <int COLUMN>
inline V codes_of(__m512i quad, bool is_signed) {
    __m512i top = _mm512_slli_epi32(quad, 24 - 8 * COLUMN);
    return to_float(is_signed ? _mm512_srai_epi32(top, 24) : _mm512_srli_epi32(top, 24));
}

// Rounds to nearest, ties away from zero.
inline __m512i pair(V even, V odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_add_epi32(_mm512_castps_si512(odd), half));
}

template <int PIECES>
void pairs_of_packed(const gc_matrix &m, int64_t panel, uint16_t *pairs) {
    alignas(64) uint8_t bytes[QUADS * QUAD_BYTES];
    PanelDecoder<PIECES> decoder(m, panel);
    const V offset = set1((float)m.offset);
    const bool has_signs = is_signed(m);
    for (int64_t block = 0; block < m.columns / BLOCK; ++block) {
        unpack_block(m, decoder.next(), bytes);
        for (int j = 0; j < QUADS; ++j, pairs += 2 * 2 * PANEL) {
            const int piece = PIECES == 1 ? 0 : j / (QUADS / 2);
            const V scale = decoder.scales.scale[piece][0];
            const V base = decoder.is_biased ? fma(scale, offset, decoder.scales.bias[piece][0]) : scale * offset;
            const __m512i quad = _mm512_load_si512(bytes + j * QUAD_BYTES);
            const V values[] = {fma(scale, codes_of<0>(quad, has_signs), base), fma(scale, codes_of<1>(quad, has_signs), base),
                                fma(scale, codes_of<2>(quad, has_signs), base), fma(scale, codes_of<3>(quad, has_signs), base)};
            _mm512_store_si512(pairs, pair(values[0], values[1]));
            _mm512_store_si512(pairs + 2 * PANEL, pair(values[2], values[3]));
        }
    }
}

// Two bfloat16 columns of a row are 32 bits, so making pairs is a 32-bit transpose. Missing rows repeat the last one.
void pairs_of_dense(const gc_matrix &m, int64_t panel, uint16_t *pairs) {
    const float *rows[PANEL];
    for (int64_t r = 0; r < PANEL; ++r) {
        int64_t row = panel * PANEL + r < m.rows ? panel * PANEL + r : m.rows - 1;
        rows[r] = reinterpret_cast<const float *>(static_cast<const char *>(m.data) + row * m.stride);
    }
    pack_panel<F32>(rows, m.columns / 2, reinterpret_cast<float *>(pairs));
}

// ---- multiplication ----

// sums[i] = 16 rows from rows[i] on, times the panel, for COUNT tiles of rows.
template <int COUNT>
void gemm_tiles(const uint16_t *const *rows, const uint16_t *pairs, int64_t columns, float *sums) {
    const int64_t stride = columns * (int64_t)sizeof(uint16_t);
    _tile_zero(0);
    if (COUNT > 1) _tile_zero(1);
    if (COUNT > 2) _tile_zero(2);
    if (COUNT > 3) _tile_zero(3);
    for (int64_t k = 0; k < columns; k += STEP) {
        _tile_loadd(6, pairs + k * PANEL, 64);
        _tile_loadd(4, rows[0] + k, stride);
        _tile_dpbf16ps(0, 4, 6);
        if (COUNT > 1) {
            _tile_loadd(5, rows[1] + k, stride);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (COUNT > 2) {
            _tile_loadd(4, rows[2] + k, stride);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (COUNT > 3) {
            _tile_loadd(5, rows[3] + k, stride);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    _tile_stored(0, sums, 64);
    if (COUNT > 1) _tile_stored(1, sums + TILE_FLOATS, 64);
    if (COUNT > 2) _tile_stored(2, sums + 2 * TILE_FLOATS, 64);
    if (COUNT > 3) _tile_stored(3, sums + 3 * TILE_FLOATS, 64);
}

// The last tile of rows begins early enough to be whole, so that nothing beyond the rows is read; its first rows are dropped.
void gemm_pairs(const uint16_t *pairs, int width, const Rows &rows, int64_t first, int64_t last, float *out, int64_t ld,
                float *sums) {
    void (*const kernels_by_count[])(const uint16_t *const *, const uint16_t *, int64_t, float *) = {
        gemm_tiles<1>, gemm_tiles<2>, gemm_tiles<3>, gemm_tiles<4>};
    for (int64_t row = first; row < last; row += TILES * PANEL) {
        const uint16_t *starts[TILES];
        int64_t begins[TILES], count = 0;
        for (int64_t begin = row; begin < last && count < TILES; begin += PANEL, ++count) {
            begins[count] = begin + PANEL <= rows.count ? begin : rows.count - PANEL;
            starts[count] = rows.bf16 + begins[count] * rows.columns;
        }
        kernels_by_count[count - 1](starts, pairs, rows.columns, sums);
        for (int64_t m = row; m < last && m < row + count * PANEL; ++m) {
            int64_t tile = (m - row) / PANEL;
            memcpy(out + (m - first) * ld, sums + tile * TILE_FLOATS + (m - begins[tile]) * PANEL, sizeof(float) * (size_t)width);
        }
    }
}

// ---- the kernel tables ----

bool fits(const gc_matrix &m, int64_t rows, int activations) {
    if (is_dense(m) ? m.codes != GC_BF16 : m.codes == GC_E4M3) return false;
    return rows >= LEAST_ROWS && activations != GC_FLOAT_ROWS && m.columns % STEP == 0;
}

template <const MatmulKernels &FALLBACK>
int formats(const gc_matrix *m, int64_t rows, int activations) {
    return fits(*m, rows, activations) ? FORMAT_BF16 : FALLBACK.formats(m, rows, activations);
}

template <const MatmulKernels &FALLBACK>
void gemm_panels(const gc_matrix *m, int64_t panel, int64_t panels, const Rows *rows, int64_t first, int64_t last, float *out,
                 int64_t ld, void *scratch, const void *next) {
    if (!fits(*m, rows->count, rows->activations))
        return FALLBACK.gemm_panels(m, panel, panels, rows, first, last, out, ld, scratch, next);
    float *sums = static_cast<float *>(scratch);
    uint16_t *pairs = reinterpret_cast<uint16_t *>(sums + TILES * TILE_FLOATS);
    if (is_dense(*m)) pairs_of_dense(*m, panel, pairs);
    else if (pieces_of(*m) == 2) pairs_of_packed<2>(*m, panel, pairs);
    else pairs_of_packed<1>(*m, panel, pairs);
    memory_is_read(pairs);
    int64_t left = m->rows - panel * PANEL;
    configure();
    gemm_pairs(pairs, (int)(left < PANEL ? left : PANEL), *rows, first, last, out, ld, sums);
    _tile_release();
}

template <const MatmulKernels &FALLBACK>
size_t scratch_bytes(const gc_matrix *m) {
    size_t own = sizeof(float) * TILES * TILE_FLOATS + sizeof(uint16_t) * PANEL * (size_t)m->columns;
    size_t other = FALLBACK.scratch_bytes(m);
    return own > other ? own : other;
}

template <const MatmulKernels &FALLBACK>
void gather(const gc_matrix *m, int64_t row, float *out) {
    FALLBACK.gather(m, row, out);
}

template <const MatmulKernels &FALLBACK>
constexpr MatmulKernels TABLE = {formats<FALLBACK>,  gemm_panels<FALLBACK>, scratch_bytes<FALLBACK>, gather<FALLBACK>, 1,
                                 8 * CHUNK_ELEMENTS, 2 * CHUNK_ROWS};

}  // namespace

extern const MatmulKernels packed_amx = TABLE<packed_avx512>;
extern const MatmulKernels dense_amx = TABLE<dense_avx512_bf16>;

}  // namespace gemcutter
