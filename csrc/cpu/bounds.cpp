// See bounds.h.
#include "bounds.h"

namespace gemcutter {
namespace {

bool holds_sequence(const gc_step &step, const gc_kv &kv, int64_t s) {
    int64_t first = step.query_start[s], end = step.query_start[s + 1], held = step.kv_length[s];
    if (first < 0 || end < first || end > step.rows || held < 0) return false;
    for (int64_t row = first; row < end; ++row)  // not the last alone: what ascends by contract may not do so in fact
        if (step.positions[row] < 0 || newest_of(step, row) - step.kv_start[s] >= held) return false;
    if (step.kv_first_slot[s] >= 0) return step.kv_first_slot[s] <= kv.slots && held <= kv.slots - step.kv_first_slot[s];
    return are_inside(step.kv_slots[s], held, kv.slots);
}

}  // namespace

bool are_inside(const int64_t *indices, int64_t count, int64_t size) {
    uint64_t outside = 0;  // without branches, and negative indices are huge
    for (int64_t i = 0; i < count; ++i) outside |= (uint64_t)((uint64_t)indices[i] >= (uint64_t)size);
    return !outside;
}

bool fits(const gc_step &step, const gc_kv &kv) {
    if (step.checked_slots == kv.slots) return true;
    for (int64_t s = 0; s < step.sequences; ++s)
        if (!holds_sequence(step, kv, s)) return false;
    if (step.slot_mapping && !are_inside(step.slot_mapping, step.rows, kv.slots)) return false;
    step.checked_slots = kv.slots;
    return true;
}

}  // namespace gemcutter
