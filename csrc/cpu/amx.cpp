// GEMM on processors with AMX: packed and bfloat16 matrices times many bfloat16 rows, 32 x 32 float32 sums in tiles.
//
// Owns the order of loops. A panel's values become bfloat16 pairs of columns once for a chunk of rows, and activations are
// bfloat16: that is nearer to the reference than int8 activations are, so callers that asked for int8 get it too. (Sums of integer
// tiles have to be converted, scaled and added in vector registers behind every 32 columns, which takes longer than a bfloat16
// product of them; it pays for up to 16 rows, where nothing else is nearly as fast as the memory: `amx_int8.h`.) Tiles are read
// from the L2 cache: where a chunk of whole rows fits it, two panels at a time meet all of its rows; where rows are longer, runs of
// columns of many panels do, and sums wait in memory from run to run. Steps of few rows, float32 rows and other matrices go to the
// AVX-512 kernels, up to 96 rows with a dense matrix to `amx_few.h`. Refuses to know threads: a call configures its thread's tiles
// and releases them before it returns. Read `amx_tiles.h` for the products, `amx_pairs.h` for the panels, `parallel_gemm.cpp` for
// the caller.
#include "amx_few.h"
#include "amx_int8.h"
#include "amx_pairs.h"
#include "amx_tiles.h"

namespace gemcutter {
namespace {

// Of packed matrices: making pairs takes as long as what int8 rows take up to here, and a row's result must not depend on the rows
// beside it.
constexpr int64_t LEAST_ROWS = FEW_ROWS + 1;
constexpr int64_t MOST_CHUNK = 2 * CHUNK_ROWS, MOST_ROWS = MOST_CHUNK + FEW_ROWS;
// Longer rows are multiplied in runs: whole ones would leave a chunk too few rows to pay for its pairs.
constexpr int64_t WHOLE_COLUMNS = 3072, RUN_COLUMNS = 256;
constexpr int64_t PAIR = 2, PANELS_AT_ONCE = 8;  // panels of one product, and of one call
constexpr int64_t BLOCKS_AHEAD = 3;              // whose memory is fetched before they are written
constexpr int64_t SUMS_LD = PAIR * PANEL, SUM_ROWS = MOST_ROWS + 2 * TILE_HEIGHT;

bool is_whole(const gc_matrix &m) { return m.columns <= WHOLE_COLUMNS; }
int64_t run_columns(const gc_matrix &m) { return is_whole(m) ? m.columns : RUN_COLUMNS; }

// Sums of 32 rows, or, where rows are long, [MOST_ROWS, 32] of each pair of panels; the pairs of columns of a run, twice: those that
// are multiplied, and those that are made meanwhile.
struct Scratch {
    float *sums;
    uint16_t *pairs[2];

    Scratch(const gc_matrix &m, void *memory) : sums(static_cast<float *>(memory)) {
        pairs[0] = reinterpret_cast<uint16_t *>(sums + sum_floats(m));
        pairs[1] = pairs[0] + pair_elements(m);
    }
    static int64_t sum_floats(const gc_matrix &m) {
        return (is_whole(m) ? 2 * TILE_HEIGHT : PANELS_AT_ONCE / PAIR * SUM_ROWS) * SUMS_LD;
    }
    static int64_t pair_elements(const gc_matrix &m) { return PAIR * PANEL * run_columns(m); }
    static size_t bytes(const gc_matrix &m) {
        return sizeof(float) * (size_t)sum_floats(m) + sizeof(uint16_t) * (size_t)(2 * pair_elements(m));
    }
};

// Where 16 rows from `row` on begin, at a column that is a multiple of 32. Rows that do not lie in tiles end with the last one: its
// tile begins early enough to be whole.
struct TileRowsOf {
    const Rows &rows;

    int64_t first_of(int64_t row) const { return rows.tiles || row + TILE_HEIGHT <= rows.count ? row : rows.count - TILE_HEIGHT; }
    TileSource at(int64_t row, int64_t column) const {
        const int64_t columns = rows.columns, first = first_of(row);
        if (rows.tiles) return {(const char *)(rows.tiles + first * columns + column * TILE_HEIGHT), TILE_LINE, TILE_BYTES};
        return {(const char *)(rows.bf16 + first * columns + column), columns * 2, TILE_LINE};
    }
};

// A run of columns: the first of them, how many, and whether it is the first and the last one.
struct Run {
    int64_t start, columns;
    bool is_first, is_last;

    bool is_only() const { return is_first && is_last; }
};

// The panels of a product, block by block of 32 columns: dense ones.
struct DensePanels {
    const gc_matrix &m;
    int64_t panel;

    DensePanels(const gc_matrix &matrix, int64_t first, int64_t) : m(matrix), panel(first) {}
    void make_block(int64_t index, int64_t column, uint16_t *pairs) { pairs_of_dense(m, panel + index, column, BLOCK, pairs); }
    void look_ahead(int64_t) const {}  // rows of a matrix lie on as many pages
};

template <int PIECES>
struct PackedPanels {
    const gc_matrix &m;
    const V values;
    const int64_t block_bytes;
    PanelDecoder<PIECES> decoders[PANELS_AT_ONCE];

    PackedPanels(const gc_matrix &matrix, int64_t first, int64_t count)
        : m(matrix), values(values_of_codes(matrix)), block_bytes(matrix.stride * BLOCK / matrix.columns) {
        for (int64_t i = 0; i < count; ++i) decoders[i] = PanelDecoder<PIECES>(matrix, first + i);
    }
    void make_block(int64_t index, int64_t, uint16_t *pairs) { pairs_of_packed(m, values, decoders[index], pairs); }
    // Asks for the same block of the panels that are made pairs of next.
    void look_ahead(int64_t index) const {
        const uint8_t *at = decoders[index].at + PAIR * m.stride;
        for (int64_t line = 0; line < block_bytes; line += TILE_LINE) __builtin_prefetch(at + line, 0, IN_L2);
    }
};

// Fetches what is written soon into the L1 cache: `rows` of some bytes. A store that misses it waits, and keeps all later ones
// waiting, for longer than tiles of 32 columns take to be multiplied.
inline void will_write(const void *to, int64_t bytes, int64_t stride, int64_t rows) {
    const char *row = static_cast<const char *>(to);
    for (; rows > 0; --rows, row += stride)
        for (int64_t line = 0; line < bytes; line += TILE_LINE) __builtin_prefetch(row + line, 1, 3);
}

// The next pair's pairs of columns, made block by block while the tiles of another one are multiplied.
template <class MatrixPanels>
struct PairMaker {
    MatrixPanels *panels = nullptr;
    int64_t index = 0, count = 0, start = 0, blocks = 0, done = 0;  // panels index.. of a run from column `start` on
    uint16_t *pairs = nullptr;
    int64_t credit = 0, rate = 0;  // blocks a step, times ONE

    static constexpr int64_t ONE = 1 << 16;

    int64_t left() const { return count * blocks - done; }
    void make() {
        const int64_t panel = done / blocks, block = done % blocks;
        uint16_t *to = pairs + done * BLOCK * PANEL;
        will_write(to + BLOCKS_AHEAD * BLOCK * PANEL, BLOCK * PANEL * 2, 0, 1);
        panels->make_block(index + panel, start + block * BLOCK, to);
        panels->look_ahead(index + panel);
        ++done;
    }
    GC_INLINE void operator()() {
        for (credit += rate; credit >= ONE; credit -= ONE)
            if (left() > 0) make();
    }
    void finish() {
        while (left() > 0) make();
        memory_is_read(pairs);
    }
};

// What one pair of panels adds to rows first..last-1, and where the finished sums go.
struct PairProduct {
    const uint16_t *pairs;
    int64_t width;  // columns of `out`
    float *sums, *out;
    int64_t ld;
};

// 16 * M rows from `row` on, of which those before `last` count, times N panels.
template <int M, int N, typename Work>
void multiply_rows(const PairProduct &p, const TileRowsOf &rows, int64_t row, int64_t first, int64_t last, const Run &run,
                   Work &work) {
    float *sums = p.sums + (run.is_only() ? 0 : (row - first) * SUMS_LD);
    const TileSource a = rows.at(row, run.start);
    const char *b = M > 1 ? rows.at(row + TILE_HEIGHT, run.start).at : nullptr;
    if (run.is_first) zero_sums<M, N>();
    else load_sums<M, N>(sums, SUMS_LD);
    const int64_t final_tile = row + (M - 1) * TILE_HEIGHT;
    const bool is_direct = run.is_last && p.width == N * PANEL && final_tile + TILE_HEIGHT <= last && rows.first_of(row) == row &&
                           rows.first_of(final_tile) == final_tile;
    float *out = p.out + (row - first) * p.ld;
    if (is_direct) will_write(out, N * PANEL * 4, p.ld * 4, M * TILE_HEIGHT);
    else if (run.is_first) will_write(sums, SUMS_LD * 4, SUMS_LD * 4, M * TILE_HEIGHT);
    multiply_tiles<M, N>(a, b, (const char *)p.pairs, run.columns * PANEL * 2, run.columns / TILE_STEP, work);
    if (is_direct) return store_sums<M, N>(out, p.ld);
    store_sums<M, N>(sums, SUMS_LD);
    if (!run.is_last) return;
    for (int64_t m = row; m < last && m < row + M * TILE_HEIGHT; ++m, out += p.ld) {
        const int64_t tile = row + (m - row) / TILE_HEIGHT * TILE_HEIGHT, at = tile - row + m - rows.first_of(tile);
        memcpy(out, sums + at * SUMS_LD, sizeof(float) * (size_t)p.width);
    }
}

template <int N, typename Work>
void multiply_pair(const PairProduct &p, const TileRowsOf &rows, int64_t first, int64_t last, const Run &run, Work &work) {
    for (int64_t row = first; row < last; row += 2 * TILE_HEIGHT) {
        if (last - row > TILE_HEIGHT) multiply_rows<2, N>(p, rows, row, first, last, run, work);
        else multiply_rows<1, N>(p, rows, row, first, last, run, work);
    }
}

// The pairs of `count` panels, one run of columns after the other.
struct PairOrder {
    int64_t columns, most, count;  // `most` columns of a run
    int64_t start = 0, index = 0;

    Run run() const {
        const int64_t here = columns - start < most ? columns - start : most;
        return {start, here, start == 0, start + here == columns};
    }
    int64_t panels() const { return count - index < PAIR ? count - index : PAIR; }
    bool is_over() const { return start >= columns; }
    void next() {
        if ((index += PAIR) < count) return;
        index = 0, start += most;
    }
};

// Rows first..last-1, MOST_ROWS at most, times `count` panels.
template <class MatrixPanels>
void multiply_panels(const gc_matrix &m, int64_t panel, int64_t count, const Rows &rows, int64_t first, int64_t last, float *out,
                     int64_t ld, const Scratch &scratch) {
    MatrixPanels panels(m, panel, count);
    const int64_t row_blocks = (last - first + 2 * TILE_HEIGHT - 1) / (2 * TILE_HEIGHT);
    const auto maker_of = [&](const PairOrder &order, int buffer, int64_t steps) {
        PairMaker<MatrixPanels> maker;
        if (order.is_over()) return maker;
        const Run run = order.run();
        maker.panels = &panels, maker.index = order.index, maker.count = order.panels(), maker.start = run.start;
        maker.blocks = run.columns / BLOCK, maker.pairs = scratch.pairs[buffer];
        maker.rate = maker.left() * PairMaker<MatrixPanels>::ONE / steps + 1;
        return maker;
    };
    PairOrder order = {m.columns, run_columns(m), count};
    maker_of(order, 0, 1).finish();
    for (int buffer = 0; !order.is_over(); buffer ^= 1) {
        const Run run = order.run();
        const int64_t index = order.index, here = order.panels(), left = m.rows - (panel + index) * PANEL;
        float *sums = scratch.sums + (run.is_only() ? 0 : index / PAIR * SUM_ROWS * SUMS_LD);
        const PairProduct product = {scratch.pairs[buffer], left < here * PANEL ? left : here * PANEL, sums, out + index * PANEL,
                                     ld};
        order.next();
        PairMaker<MatrixPanels> maker = maker_of(order, buffer ^ 1, row_blocks * (run.columns / TILE_STEP));
        if (here == PAIR) multiply_pair<2>(product, {rows}, first, last, run, maker);
        else multiply_pair<1>(product, {rows}, first, last, run, maker);
        maker.finish();
    }
}

// ---- the kernel tables ----

bool fits(const gc_matrix &m, int64_t rows, int activations) {
    if (is_dense(m) ? m.codes != GC_BF16 : m.codes == GC_E4M3 || rows < LEAST_ROWS) return false;
    return activations != GC_FLOAT_ROWS && m.columns % TILE_STEP == 0;
}

bool takes_integer_tiles(const gc_matrix &m, const Rows &rows, int64_t count) {
    if (is_dense(m) || m.codes == GC_E4M3 || !rows.q || rows.activations != GC_INT8) return false;
    return count >= least_int8_rows(pieces_of(m)) && count <= FEW_ROWS;
}

template <const MatmulKernels &FALLBACK>
int formats(const gc_matrix *m, int64_t rows, int activations) {
    if (!fits(*m, rows, activations)) return FALLBACK.formats(m, rows, activations);
    return is_dense(*m) && rows <= most_few_rows(m->columns) ? FORMAT_BF16 | FORMAT_PAIRS : FORMAT_TILES;
}

// Rows first..last-1 as pairs; those that nobody has laid out go through scratch memory.
RowPairs pairs_of_rows(const Rows &rows, int64_t first, int64_t last, void *scratch) {
    RowPairs pairs = {(const char *)(rows.bf16 + first * rows.columns), last - first, rows.columns};
    if (pairs.is_one()) return pairs;
    if (!rows.pairs) pair_rows_amx(rows.bf16 + first * rows.columns, pairs.count, rows.columns, static_cast<uint32_t *>(scratch));
    pairs.at = rows.pairs ? (const char *)rows.pairs + first / TILE_HEIGHT * pairs.block() : static_cast<const char *>(scratch);
    return pairs;
}

template <const MatmulKernels &FALLBACK>
void gemm_panels(const gc_matrix *m, int64_t panel, int64_t panels, const Rows *rows, int64_t first, int64_t last, float *out,
                 int64_t ld, void *scratch, const void *next) {
    if (!fits(*m, rows->count, rows->activations)) {
        if (takes_integer_tiles(*m, *rows, last - first)) {
            auto *few = pieces_of(*m) == 2 ? multiply_int8_rows<2> : multiply_int8_rows<1>;
            return few(*m, panel, panels, *rows, first, last, out, ld, next);
        }
        const int64_t most = FALLBACK.blocking(m).panels;
        for (; panels > 0; panels -= most, panel += most, out += most * PANEL)
            FALLBACK.gemm_panels(m, panel, panels < most ? panels : most, rows, first, last, out, ld, scratch, next);
        return;
    }
    if (is_dense(*m) && !rows->tiles && last - first <= most_few_rows(m->columns))
        return multiply_few_rows(*m, panel, panels, pairs_of_rows(*rows, first, last, scratch), out, ld, next);
    auto *run = is_dense(*m)         ? multiply_panels<DensePanels>
                : pieces_of(*m) == 2 ? multiply_panels<PackedPanels<2>>
                                     : multiply_panels<PackedPanels<1>>;
    configure_tiles();
    for (int64_t end; first < last; out += (end - first) * ld, first = end) {
        end = last - first <= MOST_ROWS ? last : first + MOST_CHUNK;
        run(*m, panel, panels, *rows, first, end, out, ld, {*m, scratch});
    }
    release_tiles();
}

template <const MatmulKernels &FALLBACK>
size_t scratch_bytes(const gc_matrix *m) {
    const size_t many = Scratch::bytes(*m), few = sizeof(uint16_t) * (size_t)(most_few_rows(m->columns) * m->columns);
    const size_t own = many > few ? many : few, other = FALLBACK.scratch_bytes(m);
    return own > other ? own : other;
}

template <const MatmulKernels &FALLBACK>
void gather(const gc_matrix *m, int64_t row, float *out) {
    FALLBACK.gather(m, row, out);
}

Blocking blocking(const gc_matrix *m) {
    return {PANELS_AT_ONCE, is_whole(*m) ? most_rows(CHUNK_OF_TILES, m->columns, MOST_CHUNK) : MOST_CHUNK};
}

template <const MatmulKernels &FALLBACK>
constexpr MatmulKernels TABLE = {formats<FALLBACK>, gemm_panels<FALLBACK>, scratch_bytes<FALLBACK>, gather<FALLBACK>, blocking};

}  // namespace

extern const MatmulKernels packed_amx = TABLE<packed_avx512>;
extern const MatmulKernels dense_amx = TABLE<dense_avx512_bf16>;

void pair_rows_amx(const uint16_t *x, int64_t rows, int64_t columns, uint32_t *out) {
    gc_matrix all = {};
    all.data = x, all.rows = rows, all.columns = columns, all.stride = columns * (int64_t)sizeof *x;
    for (int64_t block = 0; block * PANEL < rows; ++block, out += PANEL * columns / 2)
        pairs_of_dense(all, block, 0, columns, reinterpret_cast<uint16_t *>(out));
}

}  // namespace gemcutter
