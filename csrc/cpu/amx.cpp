// GEMM on processors with AMX: packed and bfloat16 matrices times many bfloat16 rows, 32 x 32 float32 sums in tiles.
//
// Owns the order of loops. A panel's values become bfloat16 pairs of columns once for a chunk of rows, and activations are
// bfloat16: that is nearer to the reference than int8 activations are, so callers that asked for int8 get it too. (Integer tiles
// would have to be converted, scaled and added in vector registers behind every 32 columns, which takes longer than a bfloat16
// product of them.) Tiles are read from the L2 cache: where a chunk of whole rows fits it, two panels at a time meet all of its
// rows; where rows are longer, runs of columns of many panels do, and sums wait in memory from run to run. Few rows, float32 rows
// and other matrices go to the AVX-512 kernels. Refuses to know threads: a call configures its thread's tiles and releases them
// before it returns. Read `amx_tiles.h` for the products, `amx_pairs.h` for the panels, `parallel_gemm.cpp` for the caller.
#include "amx_pairs.h"
#include "amx_tiles.h"

namespace gemcutter {
namespace {

// Up to 16 rows, which would fill one tile, a row's result must not depend on the rows beside it: AVX-512 computes those.
constexpr int64_t LEAST_ROWS = FEW_ROWS + 1;
constexpr int64_t CHUNK_OF_TILES = 1 << 19;  // elements of rows that are read again and again: half of an L2 cache of 2 MB
constexpr int64_t MOST_CHUNK = 2 * CHUNK_ROWS, MOST_ROWS = MOST_CHUNK + FEW_ROWS;
constexpr int64_t WHOLE_COLUMNS =
    3072;  // longer rows are multiplied in runs: whole ones would leave a chunk too few to pay for pairs
constexpr int64_t RUN_COLUMNS = 512;
constexpr int64_t PAIR = 2;  // panels of one product
constexpr int64_t PANELS_OF_WHOLE = 2, PANELS_OF_RUNS = 8;
constexpr int64_t SUMS_LD = PAIR * PANEL;

bool is_whole(const gc_matrix &m) { return m.columns <= WHOLE_COLUMNS; }

// [MOST_ROWS, 32] sums of every pair of panels where there are several runs, and of 32 rows where there is one; two panels' pairs.
struct Scratch {
    float *sums;
    uint16_t *pairs;

    Scratch(const gc_matrix &m, void *memory)
        : sums(static_cast<float *>(memory)), pairs(reinterpret_cast<uint16_t *>(sums + sum_floats(m))) {}
    static int64_t sum_floats(const gc_matrix &m) {
        return (is_whole(m) ? PAIR * TILE_HEIGHT : PANELS_OF_RUNS / PAIR * (MOST_ROWS + 2 * TILE_HEIGHT)) * SUMS_LD;
    }
    static size_t bytes(const gc_matrix &m) {
        const int64_t columns = is_whole(m) ? m.columns : RUN_COLUMNS;
        return sizeof(float) * (size_t)sum_floats(m) + sizeof(uint16_t) * (size_t)(PAIR * PANEL * columns);
    }
};

// Lines of the panels that are made pairs of next, asked for some at a time.
struct AheadOfPairs {
    const char *at;
    int64_t lines;

    GC_INLINE void some(int64_t count) {
        for (; count > 0 && lines > 0; --count, --lines, at += TILE_LINE) __builtin_prefetch(at, 0, IN_L2);
    }
};

// Where 16 rows from `row` on begin, at a column that is a multiple of 32. Rows that do not lie in tiles end with the last one: its
// tile begins early enough to be whole.
struct TileRowsOf {
    const Rows &rows;

    int64_t first_of(int64_t row) const { return rows.tiles || row + TILE_HEIGHT <= rows.count ? row : rows.count - TILE_HEIGHT; }
    TileSource at(int64_t row, int64_t column) const {
        const int64_t columns = rows.columns;
        if (rows.tiles) return {(const char *)rows.tiles + (row * columns + column * TILE_HEIGHT) * 2, TILE_LINE, TILE_BYTES};
        return {(const char *)(rows.bf16 + first_of(row) * columns + column), columns * 2, TILE_LINE};
    }
};

// A run of columns: the first of them, how many, and whether it is the first and the last one.
struct Run {
    int64_t start, columns;
    bool is_first, is_last;
};

// What one pair of panels adds to rows first..last-1, and where the finished sums go.
struct PairProduct {
    const uint16_t *pairs;
    int64_t width;  // columns of `out`
    float *sums, *out;
    int64_t ld;
};

// 16 * M rows from `row` on, of which those before `last` count, times N panels.
template <int M, int N>
void multiply_rows(const PairProduct &p, const TileRowsOf &rows, int64_t row, int64_t first, int64_t last, const Run &run) {
    float *sums = p.sums + (run.is_first && run.is_last ? 0 : (row - first) * SUMS_LD);
    const TileSource a = rows.at(row, run.start);
    const char *b = M > 1 ? rows.at(row + TILE_HEIGHT, run.start).at : nullptr;
    if (run.is_first) zero_sums<M, N>();
    else load_sums<M, N>(sums, SUMS_LD);
    multiply_tiles<M, N>(a, b, (const char *)p.pairs, run.columns * PANEL * 2, run.columns / TILE_STEP);
    const int64_t final_tile = row + (M - 1) * TILE_HEIGHT;
    const bool is_direct = run.is_last && p.width == N * PANEL && final_tile + TILE_HEIGHT <= last && rows.first_of(row) == row &&
                           rows.first_of(final_tile) == final_tile;
    float *out = p.out + (row - first) * p.ld;
    if (is_direct) return store_sums<M, N>(out, p.ld);
    store_sums<M, N>(sums, SUMS_LD);
    if (!run.is_last) return;
    for (int64_t m = row; m < last && m < row + M * TILE_HEIGHT; ++m, out += p.ld) {
        const int64_t tile = row + (m - row) / TILE_HEIGHT * TILE_HEIGHT, at = tile - row + m - rows.first_of(tile);
        memcpy(out, sums + at * SUMS_LD, sizeof(float) * (size_t)p.width);
    }
}

template <int N>
void multiply_pair(const PairProduct &p, const TileRowsOf &rows, int64_t first, int64_t last, const Run &run,
                   AheadOfPairs ahead) {
    const int64_t each = ahead.lines * PAIR * TILE_HEIGHT / (last - first) + 1;
    memory_is_read(p.pairs);
    for (int64_t row = first; row < last; row += PAIR * TILE_HEIGHT) {
        ahead.some(each);
        if (last - row > TILE_HEIGHT) multiply_rows<2, N>(p, rows, row, first, last, run);
        else multiply_rows<1, N>(p, rows, row, first, last, run);
    }
}

// The panels of a product, run by run: dense ones.
struct DensePanels {
    const gc_matrix &m;
    int64_t panel;

    DensePanels(const gc_matrix &matrix, int64_t first, int64_t) : m(matrix), panel(first) {}
    void make_pairs(int64_t index, const Run &run, uint16_t *pairs) {
        pairs_of_dense(m, panel + index, run.start, run.columns, pairs);
    }
    // 32 rows of a matrix lie on as many pages: nothing is asked for in one go.
    AheadOfPairs ahead_of(int64_t, const Run &) const { return {nullptr, 0}; }
};

template <int PIECES>
struct PackedPanels {
    const gc_matrix &m;
    PanelDecoder<PIECES> decoders[PANELS_OF_RUNS];

    PackedPanels(const gc_matrix &matrix, int64_t first, int64_t count) : m(matrix) {
        for (int64_t i = 0; i < count; ++i) decoders[i] = PanelDecoder<PIECES>(matrix, first + i);
    }
    void make_pairs(int64_t index, const Run &run, uint16_t *pairs) {
        pairs_of_packed(m, decoders[index], run.columns / BLOCK, pairs);
    }
    // The same columns of the panels behind this one, or of its own next run.
    AheadOfPairs ahead_of(int64_t index, const Run &run) const {
        const int64_t bytes = m.stride * run.columns / m.columns;
        const char *at = reinterpret_cast<const char *>(decoders[index].at);
        return run.is_first && run.is_last ? AheadOfPairs{at, PAIR * m.stride / TILE_LINE} : AheadOfPairs{at, bytes / TILE_LINE};
    }
};

// Rows first..last-1, MOST_ROWS at most, times `count` panels.
template <class MatrixPanels>
void multiply_panels(const gc_matrix &m, int64_t panel, int64_t count, const Rows &rows, int64_t first, int64_t last, float *out,
                     int64_t ld, const Scratch &scratch) {
    MatrixPanels panels(m, panel, count);
    const int64_t most = is_whole(m) ? m.columns : RUN_COLUMNS;
    for (int64_t start = 0; start < m.columns; start += most) {
        const int64_t columns = m.columns - start < most ? m.columns - start : most;
        const Run run = {start, columns, start == 0, start + columns == m.columns};
        for (int64_t i = 0; i < count; i += PAIR) {
            const bool is_pair = i + 1 < count;
            const int64_t left = m.rows - (panel + i) * PANEL, most_width = is_pair ? PAIR * PANEL : PANEL;
            for (int64_t own = i; own < i + (is_pair ? PAIR : 1); ++own)
                panels.make_pairs(own, run, scratch.pairs + (own - i) * columns * PANEL);
            float *sums = scratch.sums + (run.is_first && run.is_last ? 0 : i / PAIR * (MOST_ROWS + 2 * TILE_HEIGHT) * SUMS_LD);
            const PairProduct product = {scratch.pairs, left < most_width ? left : most_width, sums, out + i * PANEL, ld};
            const AheadOfPairs ahead = panels.ahead_of(is_pair ? i + 1 : i, run);
            if (is_pair) multiply_pair<2>(product, {rows}, first, last, run, ahead);
            else multiply_pair<1>(product, {rows}, first, last, run, ahead);
        }
    }
}

// ---- the kernel tables ----

bool fits(const gc_matrix &m, int64_t rows, int activations) {
    if (is_dense(m) ? m.codes != GC_BF16 : m.codes == GC_E4M3) return false;
    return rows >= LEAST_ROWS && activations != GC_FLOAT_ROWS && m.columns % TILE_STEP == 0;
}

template <const MatmulKernels &FALLBACK>
int formats(const gc_matrix *m, int64_t rows, int activations) {
    return fits(*m, rows, activations) ? FORMAT_TILES : FALLBACK.formats(m, rows, activations);
}

template <const MatmulKernels &FALLBACK>
void gemm_panels(const gc_matrix *m, int64_t panel, int64_t panels, const Rows *rows, int64_t first, int64_t last, float *out,
                 int64_t ld, void *scratch, const void *next) {
    if (!fits(*m, rows->count, rows->activations)) {
        const int64_t most = FALLBACK.blocking(m).panels;
        for (; panels > 0; panels -= most, panel += most, out += most * PANEL)
            FALLBACK.gemm_panels(m, panel, panels < most ? panels : most, rows, first, last, out, ld, scratch, next);
        return;
    }
    auto *run = is_dense(*m)         ? multiply_panels<DensePanels>
                : pieces_of(*m) == 2 ? multiply_panels<PackedPanels<2>>
                                     : multiply_panels<PackedPanels<1>>;
    const Tiles configured;
    for (int64_t end; first < last; out += (end - first) * ld, first = end) {
        end = last - first <= MOST_ROWS ? last : first + MOST_CHUNK;
        run(*m, panel, panels, *rows, first, end, out, ld, {*m, scratch});
    }
}

template <const MatmulKernels &FALLBACK>
size_t scratch_bytes(const gc_matrix *m) {
    size_t own = Scratch::bytes(*m), other = FALLBACK.scratch_bytes(m);
    return own > other ? own : other;
}

template <const MatmulKernels &FALLBACK>
void gather(const gc_matrix *m, int64_t row, float *out) {
    FALLBACK.gather(m, row, out);
}

Blocking blocking(const gc_matrix *m) {
    if (!is_whole(*m)) return {PANELS_OF_RUNS, MOST_CHUNK};
    return {PANELS_OF_WHOLE, most_rows(CHUNK_OF_TILES, m->columns, MOST_CHUNK)};
}

template <const MatmulKernels &FALLBACK>
constexpr MatmulKernels TABLE = {formats<FALLBACK>, gemm_panels<FALLBACK>, scratch_bytes<FALLBACK>, gather<FALLBACK>, blocking};

}  // namespace

extern const MatmulKernels packed_amx = TABLE<packed_avx512>;
extern const MatmulKernels dense_amx = TABLE<dense_avx512_bf16>;

}  // namespace gemcutter
