// Rows of dense matrices, and memory that is asked for before it is read. Included by level sources only.
//
// Owns prefetching line by line while something else is computed: a matrix' rows lie on many pages, where the hardware does not look
// ahead. Refuses to know what is read.
#pragma once
#include "layout.h"

#define GC_INLINE inline __attribute__((always_inline))

namespace gemcutter {
namespace {

constexpr int64_t SHORT_ROW = 8192;  // bytes: the hardware, which stops at every row's end, hardly gets going in one
constexpr int IN_L1 = 3;             // where prefetched lines wait; IN_L2 is in layout.h

// Lines that are asked for, some at a time: of runs of memory, panels or rows of a matrix.
template <int PLACE = IN_L2>
struct LinesAhead {
    const char *at;
    int64_t bytes, stride;  // of each run; from run to run
    int64_t runs;
    int64_t done = 0;

    GC_INLINE void some(int64_t lines) {
        for (; lines > 0 && runs > 0; --lines) {
            __builtin_prefetch(at + done, 0, PLACE);
            done += 64;
            if (done >= bytes) done = 0, at += stride, --runs;
        }
    }
};

inline const char *row_of(const gc_matrix &m, int64_t row) { return static_cast<const char *>(m.data) + row * m.stride; }

// The last row stands for those that are missing.
inline const char *row_or_last(const gc_matrix &m, int64_t row) { return row_of(m, row < m.rows ? row : m.rows - 1); }

// The same bytes of `count` rows, or of as many as there are.
template <int PLACE = IN_L2>
inline LinesAhead<PLACE> lines_of_rows(const gc_matrix &m, int64_t row, int64_t count, int64_t start, int64_t bytes) {
    const int64_t left = m.rows - row, some = left < count ? left : count;
    return {row_of(m, row) + start, bytes, m.stride, some < 0 ? 0 : some};
}

}  // namespace
}  // namespace gemcutter
