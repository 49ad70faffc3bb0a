// Attention of a whole step, shared out over the team: rows of any number of sequences over the keys that each may see.
//
// Owns the cutting of the work: a sequence with few rows has its keys cut into pieces whose partial softmaxes are merged, one
// with many rows is cut into blocks of rows; each key head apart. How keys are cut into pieces depends on a row's own keys alone,
// never on the threads. Refuses to know vectors; read `attention.cpp` for the two kernels.
#pragma once
#include "products.h"

namespace gemcutter {

struct AttendItem;
struct AttendMerge;

// The cut work of one step and the memory that it needs; shared by all threads of a region.
struct AttendWork {
    const gc_step *step;
    gc_attention layer;
    AttendItem *items;
    AttendMerge *merges;
    int64_t num_items, num_merges;
    float *partial;      // [pieces, G, E], not yet normalised
    float *top, *total;  // [pieces, G]
    char *scratch;       // of every thread
    size_t scratch_stride;
};

// Cut the work and take its memory: before the region, with the thread count that the region will have. `step` must outlive it.
AttendWork take_attend(Arena &arena, const gc_step &step, const gc_attention &layer);

// out [N, H, E] = attention of q [N, H, E], which may not overlap. Called by all threads; q must be complete (a barrier before),
// and out is complete only after the caller's next barrier. `counter` numbers a team counter that nobody else uses in the region.
void attend(Team &team, int index, const AttendWork &work, const float *q, float *out, int counter);

}  // namespace gemcutter
