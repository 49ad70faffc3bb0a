// Products of dense matrices with one or two tiles of rows by AMX: some tokens of many sequences, a short prompt, an expert's rows.
// Included by sources of the level amx only.
//
// Owns the order of loops: a panel's 32 columns become pairs in one of some buffers of a kilobyte and are multiplied right away, so
// that all that moves is the matrix, once, whatever the number of rows. A row is a row of a tile, which no other row touches, and is
// summed in the order of columns as `amx.cpp` sums it: its result is the same beside any others. Read `amx_pairs.h` for the pairs,
// `amx.cpp` for more rows.
#pragma once
#include "amx_pairs.h"
#include "amx_tiles.h"

namespace gemcutter {
namespace {

constexpr int64_t MOST_FEW_ROWS = 2 * TILE_HEIGHT;
constexpr int64_t PANELS_AHEAD = 2;  // from the one that is multiplied to the one whose memory is fetched
constexpr int64_t PAIR_BUFFERS = 4;  // stores into one are done before it is read as a tile, while the others are filled

// The blocks of a panel, one after the other. Memory of a later one is asked for row after row: each row lies on a page of its own,
// where the hardware does not look ahead.
class DenseBlocks {
  public:
    DenseBlocks(const gc_matrix &m, int64_t panel) {
        for (int64_t r = 0; r < PANEL; ++r) rows_[r] = reinterpret_cast<const float *>(row_or_last(m, panel * PANEL + r));
        const int64_t later = (panel + PANELS_AHEAD) * PANEL, left = m.rows - later;
        ahead_ = {row_or_last(m, later), m.columns * 2, m.stride, left < PANEL ? left : PANEL};
    }
    GC_INLINE void make(uint16_t *pairs) {
        pack_panel<F32>(rows_, BLOCK / 2, reinterpret_cast<float *>(pairs));
        for (int64_t r = 0; r < PANEL; ++r) rows_[r] += BLOCK / 2;
        ahead_.some(PANEL);
    }

  private:
    const float *rows_[PANEL];  // two columns as one element
    LinesAhead ahead_;
};

// Where 16 rows begin at a column that is a multiple of 32; of those that lie in tiles, `row` is a multiple of 16.
inline TileSource tile_of_rows(const Rows &rows, int64_t row, int64_t column) {
    const int64_t columns = rows.columns;
    if (rows.tiles) return {(const char *)(rows.tiles + row * columns + column * TILE_HEIGHT), TILE_LINE, TILE_BYTES};
    return {(const char *)(rows.bf16 + row * columns + column), columns * 2, TILE_LINE};
}

// Up to 32 rows: one tile of them, or two, which overlap where rows do not lie in tiles.
struct RowTiles {
    TileSource tiles[2];
    int64_t count, second;  // second: the row that the second tile begins with

    RowTiles(const Rows &rows, int64_t first, int64_t last) : count(last - first) {
        second = rows.tiles || count <= TILE_HEIGHT ? TILE_HEIGHT : count - TILE_HEIGHT;
        for (int64_t i = 0; i < 2; ++i) tiles[i] = tile_of_rows(rows, first + i * second, 0);
    }
    // Where row i of the sums of both tiles is.
    int64_t place(int64_t i) const { return i < TILE_HEIGHT ? i : TILE_HEIGHT + i - second; }
};

// out [count, panels * 16], rows `ld` floats apart; T tiles of rows.
template <int T>
void multiply_few(const gc_matrix &m, int64_t panel, int64_t panels, const RowTiles &rows, float *out, int64_t ld) {
    alignas(64) uint16_t pairs[PAIR_BUFFERS][BLOCK * PANEL];
    alignas(64) float sums[T * TILE_FLOATS];
    configure_tiles(T == 1 ? rows.count : TILE_HEIGHT);
    for (; panels > 0; --panels, ++panel, out += PANEL) {
        DenseBlocks blocks(m, panel);
        TileSource a = rows.tiles[0], b = rows.tiles[1];
        zero_sums<T, 1>();
        for (int64_t step = 0; step < m.columns / TILE_STEP; ++step, a.at += a.step, b.at += b.step) {
            uint16_t *block = pairs[step % PAIR_BUFFERS];
            blocks.make(block);
            memory_is_read(block);
            _tile_loadd(6, block, TILE_LINE);
            _tile_loadd(4, a.at, a.stride);
            _tile_dpbf16ps(0, 4, 6);
            if (T == 1) continue;
            _tile_loadd(5, b.at, b.stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        const int64_t left = m.rows - panel * PANEL, width = left < PANEL ? left : PANEL;
        if (T == 1 && width == PANEL) {
            store_sums<1, 1>(out, ld);
            continue;
        }
        store_sums<T, 1>(sums, PANEL);
        for (int64_t i = 0; i < rows.count; ++i)
            memcpy(out + i * ld, sums + rows.place(i) * PANEL, sizeof(float) * (size_t)width);
    }
    release_tiles();
}

}  // namespace
}  // namespace gemcutter
