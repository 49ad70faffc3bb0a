// Attention of a whole step, split across the thread pool: query rows of any number of sequences over the keys that each may see.
//
// Owns the split into work items, each for one key head: a sequence with few rows is split along its keys (flash-decoding), and
// the partial softmaxes are merged; one with many rows is split into blocks of rows. How keys are split depends on a row's own
// keys alone, never on the number of threads or on the rows beside it, which share a piece's keys with it. Refuses to know vector instructions; read `attention.cpp` for the two kernels.
#pragma once
#include "parallel_gemm.h"

namespace gemcutter {

struct AttentionItem;
struct AttentionMerge;

// The work items of one step and the memory that they need; shared by all threads of a parallel region.
struct AttentionPlan {
    const gc_step *step;
    gc_attention layer;
    gc_kv kv;
    AttentionItem *items;
    AttentionMerge *merges;
    int64_t num_items, num_merges;
    float *partial;      // [pieces, G, E], not normalised yet
    float *top, *total;  // [pieces, G]
    char *scratch;       // one part for each thread
    size_t scratch_stride;
};

// Splits the work and allocates its memory: called before the parallel region, for as many threads as the region will have.
// `step` must outlive the plan.
AttentionPlan plan_attention(Arena &arena, const gc_step &step, const gc_attention &layer, const gc_kv &kv);

// out [N, H, E] = attention of q [N, H, E], which may not overlap. Called by all threads; q must be complete (a barrier before),
// and out is complete only after the caller's next barrier. `counter` is the index of a pool counter that nothing else in the
// region uses.
void attention(ThreadPool &pool, int index, const AttentionPlan &plan, const float *q, float *out, int counter);

}  // namespace gemcutter
