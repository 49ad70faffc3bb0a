// Products of dense matrices with up to 96 rows by AMX: replies, tokens of many sequences, a short prompt, an expert's rows.
// Included by sources of the level amx only.
//
// Owns the order of loops: 16 rows of the matrix are a tile where they lie, and the activation rows are the pairs of columns that
// such a tile is multiplied with, so all that moves is the matrix, once and as it is, whatever the number of rows. An activation
// row is a column of tiles, which no other row touches: its result is the same beside any others. Tile rows that cross cache lines
// (files begin a matrix anywhere) do not matter here, where memory takes ten times as long as a tile. Read `amx.cpp` for more rows.
#pragma once
#include "amx_pairs.h"
#include "amx_tiles.h"

namespace gemcutter {
namespace {

constexpr int64_t STEPS_AHEAD = 8;
constexpr int MOST_BLOCKS = 6;  // of 16 rows, whose sums fill as many tiles

// As many rows as are multiplied here no slower than in `amx.cpp`, whose sums of long rows come and go; and no more than the L2 cache
// holds, since every thread has them for itself.
inline int64_t most_few_rows(int64_t columns) {
    const int64_t most = columns * 2 > SHORT_ROW ? MOST_BLOCKS : 3, fit = CHUNK_OF_TILES / columns / TILE_HEIGHT;
    return TILE_HEIGHT * (fit < 1 ? 1 : fit < most ? fit : most);
}

// Activation rows as pairs: blocks of 16 rows, [columns / 2, 16, 2] each, or a single row as it is.
struct RowPairs {
    const char *at;
    int64_t count, columns;

    bool is_one() const { return count == 1; }
    int64_t line() const { return is_one() ? 4 : TILE_LINE; }  // bytes of a pair of columns
    int64_t block() const { return columns / 2 * TILE_LINE; }
};

// Asks for what is read next, a tile's worth at a time.
class MatrixAhead {
  public:
    MatrixAhead(const gc_matrix &m, int64_t panel, const void *next)
        : here_(row_of(m, panel * PANEL)),
          steps_(m.columns / TILE_STEP),
          lines_(lines_of_rows(m, (panel + 1) * PANEL, PANEL, 0, m.columns * 2)) {
        if (next) lines_.at = static_cast<const char *>(next), lines_.runs = PANEL;
    }
    GC_INLINE void look(int64_t step) {
        if (lines_.bytes <= SHORT_ROW) return lines_.some(TILE_HEIGHT);
        const int64_t ahead = step + STEPS_AHEAD;
        const char *at = ahead < steps_ ? here_ + ahead * TILE_LINE : lines_.at + (ahead - steps_) * TILE_LINE;
        const int64_t rows = ahead < steps_ ? TILE_HEIGHT : lines_.runs;
        for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(at + r * lines_.stride, 0, IN_L2);
    }

  private:
    const char *here_;
    int64_t steps_;
    LinesAhead<> lines_;  // of the next panel
};

// Tiles 0 to 5: sums, a matrix row in each row; 6: the matrix; 7: pairs.
inline void configure_few(int64_t matrix_rows, int64_t line) {
    TileShapes shapes;
    for (int tile = 0; tile < MOST_BLOCKS; ++tile) shapes.set(tile, matrix_rows, line);
    shapes.set(6, matrix_rows, TILE_LINE);
    shapes.set(7, TILE_HEIGHT, line);
    shapes.configure();
}

template <int T>
inline void zero_blocks() {
    _tile_zero(0);
    if (T > 1) _tile_zero(1);
    if (T > 2) _tile_zero(2);
    if (T > 3) _tile_zero(3);
    if (T > 4) _tile_zero(4);
    if (T > 5) _tile_zero(5);
}

// Adds the products of tile 6 with T blocks of pairs.
#define GC_ADD_BLOCK(INDEX)                                \
    if (T > INDEX) {                                       \
        _tile_loadd(7, pairs + INDEX * block_bytes, line); \
        _tile_dpbf16ps(INDEX, 6, 7);                       \
    }
template <int T>
GC_INLINE void add_blocks(const char *pairs, int64_t line, int64_t block_bytes) {
    GC_ADD_BLOCK(0)
    GC_ADD_BLOCK(1)
    GC_ADD_BLOCK(2)
    GC_ADD_BLOCK(3)
    GC_ADD_BLOCK(4)
    GC_ADD_BLOCK(5)
}
#undef GC_ADD_BLOCK

template <int T>
inline void store_sums_of_blocks(float (*sums)[TILE_FLOATS]) {
    _tile_stored(0, sums[0], TILE_LINE);
    if (T > 1) _tile_stored(1, sums[1], TILE_LINE);
    if (T > 2) _tile_stored(2, sums[2], TILE_LINE);
    if (T > 3) _tile_stored(3, sums[3], TILE_LINE);
    if (T > 4) _tile_stored(4, sums[4], TILE_LINE);
    if (T > 5) _tile_stored(5, sums[5], TILE_LINE);
}

// Sums [matrix rows, 16 activation rows] into rows of `out`.
inline void store_turned(const float *sums, int64_t width, int64_t count, float *out, int64_t ld) {
    alignas(64) float turned[TILE_FLOATS];
    const float *rows[PANEL];
    for (int64_t r = 0; r < PANEL; ++r) rows[r] = sums + r * TILE_HEIGHT;
    pack_panel<F32>(rows, TILE_HEIGHT, turned);
    for (int64_t i = 0; i < count; ++i) memcpy(out + i * ld, turned + i * PANEL, sizeof(float) * (size_t)width);
}

template <int T>
inline void store_blocks(const RowPairs &rows, int64_t width, float *out, int64_t ld) {
    if (rows.is_one()) {
        _tile_stored(0, out, sizeof(float));
        return;
    }
    alignas(64) float sums[T][TILE_FLOATS] = {};
    store_sums_of_blocks<T>(sums);
    for (int64_t block = 0; block < T; ++block, out += TILE_HEIGHT * ld) {
        const int64_t left = rows.count - block * TILE_HEIGHT;
        store_turned(sums[block], width, left < TILE_HEIGHT ? left : TILE_HEIGHT, out, ld);
    }
}

// out [count, panels * 16], rows `ld` floats apart; T blocks of 16 rows.
template <int T>
void multiply_few(const gc_matrix &m, int64_t panel, int64_t panels, const RowPairs &rows, float *out, int64_t ld,
                  const void *next) {
    const int64_t line = rows.line(), block = rows.block();
    for (; panels > 0; --panels, ++panel, out += PANEL) {
        const int64_t left = m.rows - panel * PANEL, width = left < PANEL ? left : PANEL;
        const char *w = row_of(m, panel * PANEL), *pairs = rows.at;
        MatrixAhead ahead(m, panel, panels == 1 ? next : nullptr);
        configure_few(width, line);
        zero_blocks<T>();
        for (int64_t step = 0; step < m.columns / TILE_STEP; ++step, w += TILE_LINE, pairs += TILE_HEIGHT * line) {
            _tile_loadd(6, w, m.stride);
            add_blocks<T>(pairs, line, block);
            ahead.look(step);
        }
        store_blocks<T>(rows, width, out, ld);
    }
    release_tiles();
}

// The same for any number of rows up to `most_few_rows`.
template <int T = MOST_BLOCKS>
void multiply_few_rows(const gc_matrix &m, int64_t panel, int64_t panels, const RowPairs &rows, float *out, int64_t ld,
                       const void *next) {
    if constexpr (T > 1)
        if (rows.count <= (T - 1) * TILE_HEIGHT) return multiply_few_rows<T - 1>(m, panel, panels, rows, out, ld, next);
    multiply_few<T>(m, panel, panels, rows, out, ld, next);
}

}  // namespace
}  // namespace gemcutter
