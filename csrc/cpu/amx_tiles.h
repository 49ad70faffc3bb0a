// AMX's tiles: their shapes, and the product of some rows of bfloat16 with one or two panels of pairs. Included by sources of the
// level amx only.
//
// Owns register blocking: up to 32 rows times up to 32 columns, whose sums fill four tiles; two more hold rows, two panels, so that
// every tile that is loaded is multiplied twice. A tile is 16 rows of 64 bytes, at any distance from each other, but each in a cache
// line of its own: a row that crosses lines costs six times as much. Read `amx.cpp`, `attention_products.h`
// and `attention_few_tiles.h`, which use it.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "vec.h"

#if defined(GC_EMULATE)
#include "../emulate/amx.h"
#endif

namespace gemcutter {
namespace {

constexpr int64_t TILE_HEIGHT = 16, TILE_LINE = 64, TILE_BYTES = TILE_HEIGHT * TILE_LINE;
constexpr int64_t TILE_STEP = 32;            // columns of one multiplication
constexpr int64_t CHUNK_OF_TILES = 1 << 19;  // elements of rows that are read again and again: half of an L2 cache of 2 MB
constexpr int64_t TILE_FLOATS = TILE_HEIGHT * 16;

// Compilers may drop or move stores that only a tile instruction reads: the clobber tells them that memory is read.
inline void memory_is_read(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t height, int64_t bytes) { rows[tile] = (uint8_t)height, row_bytes[tile] = (uint16_t)bytes; }
    void configure() const {
        memory_is_read(this);
        _tile_loadconfig(this);
    }
};

// A thread's tiles can be used from one to the other; `height` is that of the first six. (No destructor: its clean-up would be code
// that all levels share.)
inline void configure_tiles(int64_t height = TILE_HEIGHT) {
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.set(tile, tile < 6 ? height : TILE_HEIGHT, TILE_LINE);
    shapes.configure();
}
inline void release_tiles() { _tile_release(); }

// Tiles that are read one after the other: 16 rows of each `stride` bytes apart, and so far to the next 32 columns.
struct TileSource {
    const char *at;
    int64_t stride, step;
};

// Sums of M x 16 rows and N x 16 columns: tile m * 2 + n.
template <int M, int N>
inline void zero_sums() {
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1 && N > 1) _tile_zero(3);
}

// From and to memory, rows `stride` floats apart.
template <int M, int N>
inline void load_sums(const float *from, int64_t stride) {
    const float *lower = from + TILE_HEIGHT * stride;
    _tile_loadd(0, from, stride * 4);
    if (N > 1) _tile_loadd(1, from + 16, stride * 4);
    if (M > 1) _tile_loadd(2, lower, stride * 4);
    if (M > 1 && N > 1) _tile_loadd(3, lower + 16, stride * 4);
}

template <int M, int N>
inline void store_sums(float *to, int64_t stride) {
    float *lower = to + TILE_HEIGHT * stride;
    _tile_stored(0, to, stride * 4);
    if (N > 1) _tile_stored(1, to + 16, stride * 4);
    if (M > 1) _tile_stored(2, lower, stride * 4);
    if (M > 1 && N > 1) _tile_stored(3, lower + 16, stride * 4);
}

// Adds the products of `steps` times 32 columns: rows from `a` and, with M 2, from `b` (at the same distances), and panels of pairs,
// [steps][16 pairs][16 columns][2], the second one `panel_bytes` behind the first. `work` is called once a step: tiles are
// multiplied beside the vector units, which have time for something else.
template <int M, int N, typename Work>
inline void multiply_tiles(TileSource a, const char *b, const char *panel, int64_t panel_bytes, int64_t steps, Work &work) {
    for (; steps > 0; --steps, a.at += a.step, b += a.step, panel += TILE_BYTES) {
        _tile_loadd(6, panel, TILE_LINE);
        _tile_loadd(4, a.at, a.stride);
        _tile_dpbf16ps(0, 4, 6);
        if (M > 1) {
            _tile_loadd(5, b, a.stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (N > 1) {
            _tile_loadd(7, panel + panel_bytes, TILE_LINE);
            _tile_dpbf16ps(1, 4, 7);
            if (M > 1) _tile_dpbf16ps(3, 5, 7);
        }
        work();
    }
}

}  // namespace
}  // namespace gemcutter
