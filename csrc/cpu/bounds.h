// The checks of everything that kernels use as an index: ids of table rows, slots of the cache, row numbers.
//
// Every entry point that gathers or scatters calls one of these before its parallel region, so that no loop has to check an
// element. Refuses to know what the indices are for. Read `api.h` for the structs.
#pragma once
#include "api.h"

namespace gemcutter {

constexpr int OUT_OF_BOUNDS = 2;  // what an entry point returns instead of reading or writing outside its tables

// The last position that a row of a step sees.
inline int64_t newest_of(const gc_step &step, int64_t row) {
    int64_t own = step.positions[row];
    return step.last_visible && step.last_visible[row] > own ? step.last_visible[row] : own;
}

// Whether each of `count` indices names one of `size` rows.
bool are_inside(const int64_t *indices, int64_t count, int64_t size);

// Whether all slots that a step reads and writes are among those of `kv`, and no row sees a position that the cache does not
// hold. The answer is noted in the step, so that the other layers of the group cost one comparison.
bool fits(const gc_step &step, const gc_kv &kv);

}  // namespace gemcutter
