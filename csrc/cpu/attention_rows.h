// What both kernels for blocks of query rows share: which keys a row sees, and where a key's elements and scales lie. Included by
// level sources only; read `attention.cpp` and `attention_bf16.cpp`, which use it.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace gemcutter {
namespace {

inline int64_t slot_of(const Keys &keys, int64_t position) {
    int64_t at = position - keys.start;
    return keys.first_slot >= 0 ? keys.first_slot + at : keys.slots[at];
}

template <typename Element>
inline const Element *elements_of(const void *base, const Keys &keys, int64_t position) {
    return static_cast<const Element *>(base) + slot_of(keys, position) * keys.stride;
}

// Query rows at ascending positions.
struct QueryRows {
    int64_t rows;
    const int64_t *positions, *last_visible;
    int64_t window;

    int64_t newest(int64_t row) const {  // the last position that a row sees
        return last_visible && last_visible[row] > positions[row] ? last_visible[row] : positions[row];
    }
    int64_t oldest(int64_t row) const { return window ? positions[row] - window + 1 : 0; }
    bool sees(int64_t row, int64_t first, int64_t last) const {  // any of the positions first..last-1
        return newest(row) >= first && (!window || positions[row] - window < last - 1);
    }
};

// The positions low..high-1 that a cache holds and some row may see.
struct SeenKeys {
    int64_t low, high;
    SeenKeys(const QueryRows &rows, const Keys &keys)
        : low(rows.oldest(0) > keys.start ? rows.oldest(0) : keys.start), high(rows.newest(rows.rows - 1) + 1) {}
};

// Takes the keys out that a row does not see: only from..to-1 of `count` stay.
inline void hide_unseen(float *scores, int64_t from, int64_t to, int64_t count) {
    for (int64_t t = 0; t < from; ++t) scores[t] = -INFINITY;
    for (int64_t t = to; t < count; ++t) scores[t] = -INFINITY;
}

// The rows first..last-1 that see any of the positions low..high-1.
struct SeeingRows {
    int64_t first = 0, last;
    SeeingRows(const QueryRows &rows, int64_t low, int64_t high) : last(rows.rows) {
        while (first < last && !rows.sees(first, low, high)) ++first;
        while (last > first && !rows.sees(last - 1, low, high)) --last;
    }
};

// Scales of the keys and values at positions low..high-1, and zeros behind them, `count` in all. Those that no row from
// `row` on sees are 0, whatever memory holds.
inline void gather_scales(const QueryRows &rows, int64_t row, const Keys &keys, int64_t low, int64_t high, int64_t count,
                          float *k, float *v) {
    for (int64_t t = low; t < high; ++t) {
        while (rows.newest(row) < t && row < rows.rows - 1) ++row;
        const bool is_seen = rows.sees(row, t, t + 1);
        const int64_t at = is_seen ? slot_of(keys, t) * keys.scale_stride : 0;
        k[t - low] = is_seen ? keys.k_scale[at] : 0.0f;
        v[t - low] = is_seen ? keys.v_scale[at] : 0.0f;
    }
    for (int64_t t = high - low; t < count; ++t) k[t] = v[t] = 0.0f;
}

// x *= y over `count` elements, and those that fill the last vector.
inline void multiply(float *x, const float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += W) store(x + i, load(x + i) * load(y + i));
}

}  // namespace
}  // namespace gemcutter
