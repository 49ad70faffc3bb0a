// Attention of few query rows by AMX: the two products of `attend_few` in tiles. Included by attention_few_bf16.h only, for the level
// amx.
//
// Owns the shapes: tiles of 16 keys times the pairs of 16 query vectors make scores; tiles of 16 (or 8) vectors' weights for 32 keys
// times pairs of their values make sums. Keys are read where they lie; copied are those that do not follow each other, codes of int8,
// and, in place of keys that nobody sees, others. Blocks of keys begin at multiples of their size, so that a row's sums do not depend
// on the rows beside it: a key that a row does not see has the weight 0 there.
#pragma once
#include "amx_tiles.h"
#include "attention_few.h"

namespace gemcutter {
namespace {

constexpr int64_t SCORED_KEYS = TILE_HEIGHT, WEIGHED_KEYS = TILE_STEP;

// 16 keys from position t on as bfloat16: the first one, and elements from one to the next. Beyond the keys that rows see, the nearest
// of them stands.
template <typename Element>
TileSource keys_at(const FewRows &few, const Keys &keys, int64_t t) {
    const bool all_seen = t >= few.first && t + SCORED_KEYS <= few.last;
    bool is_direct = sizeof(Element) == sizeof(uint16_t) && all_seen;
    for (int64_t i = 1; is_direct && keys.first_slot < 0 && i < SCORED_KEYS; ++i)
        is_direct = slot_of(keys, t + i) == slot_of(keys, t) + i;
    if (is_direct) return {(const char *)elements_of<Element>(keys.k, keys, t), keys.stride * 2, TILE_LINE};
    for (int64_t i = 0; i < SCORED_KEYS; ++i) {
        const Element *from = elements_of<Element>(keys.k, keys, nearest_seen(few, t + i));
        for (int64_t e = 0; e < few.dim; e += COLUMNS)
            _mm512_storeu_si512(few.copies + i * few.dim + e, load_bf16_codes(from + e));
    }
    memory_is_read(few.copies);
    return {(const char *)few.copies, few.dim * 2, TILE_LINE};
}

// Fetches a line of 32 dims of some keys from position t on, or, behind the last one, of values from the first one on.
template <typename Element>
void fetch_line(const FewRows &few, const Keys &keys, const void *from, int64_t t, int64_t count, int64_t e) {
    for (int64_t i = 0; i < count; ++i)
        if (t + i >= few.first && t + i < few.last) __builtin_prefetch(elements_of<Element>(from, keys, t + i) + e, 0, IN_L2);
}

// Adds scores of 16 keys with T times 16 query vectors: tile n.
template <int T>
inline void score_tile(const char *key, int64_t stride, const char *queries, int64_t distance) {
    _tile_loadd(6, key, stride);
    _tile_loadd(7, queries, TILE_LINE);
    _tile_dpbf16ps(0, 6, 7);
    if (T > 1) _tile_loadd(7, queries + distance, TILE_LINE);
    if (T > 1) _tile_dpbf16ps(1, 6, 7);
    if (T > 2) _tile_loadd(7, queries + 2 * distance, TILE_LINE);
    if (T > 2) _tile_dpbf16ps(2, 6, 7);
    if (T > 3) _tile_loadd(7, queries + 3 * distance, TILE_LINE);
    if (T > 3) _tile_dpbf16ps(3, 6, 7);
}

// Two rows of scores, of neighbouring keys, side by side.
inline void store_pair(const float *even, const float *odd, bool is_half, float *to) {
    const V a = load(even), b = load(odd);
    store(to, __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    if (!is_half) store(to + W, __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

// Scores of all keys with T tiles of query vectors from `first` on.
template <int T, typename Element>
void score_keys(const FewRows &few, const Keys &keys, int64_t first) {
    alignas(64) float tile[T][TILE_FLOATS];
    const int64_t distance = few.dim / TILE_STEP * TILE_BYTES, end = 2 * (few.first_pair + few.pairs);
    for (int64_t t = 2 * few.first_pair; t < end; t += SCORED_KEYS) {
        const TileSource rows = keys_at<Element>(few, keys, t);
        const int64_t later = t + SCORED_KEYS, value = later < few.last ? later : few.first;
        const void *next = later < few.last ? keys.k : keys.v;
        const char *key = rows.at, *queries = (const char *)few.q_pairs + first * distance;
        zero_sums<2, 2>();  // those of T tiles, and others that are not used
        for (int64_t e = 0; e < few.dim; e += TILE_STEP, key += TILE_LINE, queries += TILE_BYTES) {
            fetch_line<Element>(few, keys, next, value, SCORED_KEYS, e);
            score_tile<T>(key, rows.stride, queries, distance);
        }
        _tile_stored(0, tile[0], TILE_LINE);
        if (T > 1) _tile_stored(1, tile[1 % T], TILE_LINE);
        if (T > 2) _tile_stored(2, tile[2 % T], TILE_LINE);
        if (T > 3) _tile_stored(3, tile[3 % T], TILE_LINE);
        memory_is_read(tile);
        float *to = few.scores + (t / 2 - few.first_pair) * few.vectors * 2 + first * 2 * TILE_HEIGHT;
        for (int64_t pair = 0; pair < SCORED_KEYS / 2; ++pair, to += few.vectors * 2)
            for (int n = 0; n < T; ++n)
                store_pair(tile[n] + pair * 32, tile[n] + pair * 32 + 16, few.vectors < TILE_HEIGHT, to + n * 32);
    }
}

// Adds the values of 32 keys by a tile of weights to sums of 32 columns. (Numbers of tiles are part of instructions.)
#define GC_ADD_VALUES(weights, to, ld) \
    {                                  \
        _tile_loadd(0, to, ld);        \
        _tile_loadd(1, (to) + W, ld);  \
        _tile_dpbf16ps(0, weights, 6); \
        _tile_dpbf16ps(1, weights, 7); \
        _tile_stored(0, to, ld);       \
        _tile_stored(1, (to) + W, ld); \
    }

// The same with the weights of T tiles of vectors; `sums` [T * 16, dim].
template <int T>
inline void value_tiles(const uint16_t *near, const uint16_t *far, float *sums, int64_t dim) {
    const int64_t ld = dim * 4, next = TILE_HEIGHT * dim;
    _tile_loadd(6, near, TILE_LINE);
    _tile_loadd(7, far, TILE_LINE);
    GC_ADD_VALUES(2, sums, ld)
    if (T > 1) GC_ADD_VALUES(3, sums + next, ld)
    if (T > 2) GC_ADD_VALUES(4, sums + 2 * next, ld)
    if (T > 3) GC_ADD_VALUES(5, sums + 3 * next, ld)
}

// Values of a block: of a key that is not to be read, zeros.
template <typename Element>
struct ValueRows {
    const Element *at[WEIGHED_KEYS];
};

inline bool are_finite(const int8_t *, int64_t) { return true; }
inline bool are_finite(const uint16_t *row, int64_t dim) {
    int found = 0;
    for (int64_t i = 0; i < dim; ++i) found |= (row[i] & 0x7f80) == 0x7f80;
    return !found;
}

// Adds a block's values by weights [T, 16 vectors, 16 pairs], and fetches those of the next one.
template <int T, typename Element>
void add_block(const FewRows &few, const ValueRows<Element> &rows, const uint32_t (&weights)[T][TILE_FLOATS], float *sums,
               const Keys &keys, int64_t next) {
    alignas(64) uint16_t near[2 * TILE_FLOATS], far[2 * TILE_FLOATS];
    memory_is_read(weights);
    _tile_loadd(2, weights[0], TILE_LINE);
    if (T > 1) _tile_loadd(3, weights[1 % T], TILE_LINE);
    if (T > 2) _tile_loadd(4, weights[2 % T], TILE_LINE);
    if (T > 3) _tile_loadd(5, weights[3 % T], TILE_LINE);
    for (int64_t e = 0; e < few.dim; e += COLUMNS) {
        fetch_line<Element>(few, keys, keys.v, next, WEIGHED_KEYS, e);
        for (int64_t i = 0; i < WEIGHED_KEYS; i += 2) {
            const Halves even = (Halves)load_bf16_codes(rows.at[i] + e), odd = (Halves)load_bf16_codes(rows.at[i + 1] + e);
            _mm512_storeu_si512(near + i * W, (__m512i)near_columns(even, odd));
            _mm512_storeu_si512(far + i * W, (__m512i)far_columns(even, odd));
        }
        memory_is_read(near), memory_is_read(far);
        value_tiles<T>(near, far, sums + e, few.dim);
    }
}

// A block in which rows see different keys, one row after the other: a value that a row does not see may be no number, of which not
// even nothing may be added to its sums.
template <int T, typename Element>
void add_row_by_row(const FewRows &few, const ValueRows<Element> &rows, const uint32_t (&weights)[T][TILE_FLOATS], float *sums,
                    const Keys &keys, int64_t t, int64_t first, const DecodeRow *queries, int64_t num) {
    const auto *zeros = reinterpret_cast<const Element *>(few.zeros);
    for (int64_t m = 0; m < num; ++m) {
        const int64_t begin = m * few.heads - first * TILE_HEIGHT, end = begin + few.heads;
        if (end <= 0 || begin >= T * TILE_HEIGHT) continue;
        ValueRows<Element> seen;
        for (int64_t i = 0; i < WEIGHED_KEYS; ++i)
            seen.at[i] = queries[m].first <= t + i && t + i < queries[m].last ? rows.at[i] : zeros;
        const int64_t low = begin > 0 ? begin : 0, high = end < T * TILE_HEIGHT ? end : T * TILE_HEIGHT;
        const size_t bytes = sizeof(float) * (size_t)((high - low) * few.dim);
        memcpy(few.spare + low * few.dim, sums + low * few.dim, bytes);
        add_block<T>(few, seen, weights, few.spare, keys, few.last);
        memory_is_read(few.spare);
        memcpy(sums + low * few.dim, few.spare + low * few.dim, bytes);
    }
}

// Sums of all keys' values by T tiles of vectors from `first` on.
template <int T, typename Element>
void value_keys(const FewRows &few, const Keys &keys, int64_t first, const DecodeRow *queries, int64_t num) {
    alignas(64) uint32_t weights[T][TILE_FLOATS] = {};
    float *sums = few.sums + first * TILE_HEIGHT * few.dim;
    const int64_t begin = 2 * few.first_pair, end = begin + 2 * few.pairs;
    int64_t row = 0;
    for (int64_t t = begin; t < end; t += WEIGHED_KEYS) {
        ValueRows<Element> rows;
        bool is_alike = true;
        for (int64_t i = 0; i < WEIGHED_KEYS; ++i) {
            const int64_t key = t + i;
            while (row < num - 1 && queries[row].last <= key) ++row;
            const bool is_seen = queries[row].first <= key && key < queries[row].last;
            const bool by_all = queries[num - 1].first <= key && key < queries[0].last;
            rows.at[i] = is_seen ? elements_of<Element>(keys.v, keys, key) : reinterpret_cast<const Element *>(few.zeros);
            is_alike = is_alike && (is_seen == by_all || are_finite(rows.at[i], few.dim));
        }
        const float *pairs[PANEL];
        for (int64_t i = 0; i < PANEL; ++i)
            pairs[i] = reinterpret_cast<const float *>(few.weights + ((t - begin) / 2 + i) * few.vectors + first * TILE_HEIGHT);
        pack_panel<F32>(pairs, few.vectors < TILE_HEIGHT ? few.vectors : T * TILE_HEIGHT, reinterpret_cast<float *>(weights[0]));
        if (is_alike) add_block<T>(few, rows, weights, sums, keys, t + WEIGHED_KEYS);
        else add_row_by_row<T>(few, rows, weights, sums, keys, t, first, queries, num);
    }
}

constexpr int64_t MOST_VECTOR_TILES = 4;

// Calls call(first, count) for all tiles of vectors, some at a time.
template <typename Call>
void for_each_vector_tiles(const FewRows &few, Call call) {
    const int64_t tiles = (few.vectors + TILE_HEIGHT - 1) / TILE_HEIGHT;
    for (int64_t first = 0; first < tiles; first += MOST_VECTOR_TILES)
        call(first, tiles - first < MOST_VECTOR_TILES ? tiles - first : MOST_VECTOR_TILES);
}

template <typename Element>
void score_all(const FewRows &few, const Keys &keys) {
    for (int64_t vector = 0; vector < few.vectors; vector += TILE_HEIGHT) {
        const float *rows[PANEL];
        for (int64_t i = 0; i < PANEL; ++i)
            rows[i] = reinterpret_cast<const float *>(vector + i < few.vectors ? few.q + (vector + i) * few.dim : few.zeros);
        pack_panel<F32>(rows, few.dim / 2, reinterpret_cast<float *>(few.q_pairs + vector * few.dim / 2));
    }
    memory_is_read(few.q_pairs);
    configure_tiles();
    for_each_vector_tiles(few, [&](int64_t first, int64_t count) {
        auto *run = count == 1   ? score_keys<1, Element>
                    : count == 2 ? score_keys<2, Element>
                    : count == 3 ? score_keys<3, Element>
                                 : score_keys<4, Element>;
        run(few, keys, first);
    });
    release_tiles();
}

template <typename Element>
void value_all(const FewRows &few, const Keys &keys, const DecodeRow *rows, int64_t num) {
    configure_tiles(few.vectors < TILE_HEIGHT ? few.vectors : TILE_HEIGHT);
    for_each_vector_tiles(few, [&](int64_t first, int64_t count) {
        auto *run = count == 1   ? value_keys<1, Element>
                    : count == 2 ? value_keys<2, Element>
                    : count == 3 ? value_keys<3, Element>
                                 : value_keys<4, Element>;
        run(few, keys, first, rows, num);
    });
    release_tiles();
    memory_is_read(few.sums);
}

}  // namespace
}  // namespace gemcutter
