// Sums and concatenations over the tensor-parallel ranks of one host: processes that share a segment of memory.
//
// Owns the protocol. Each rank copies its part into a slot of its own, says so, waits until all have, and reads all slots in the
// order of ranks: every rank computes the same sum, bit for bit, whoever came last. Slots come in two sets, used in turns, so that
// nobody writes what another still reads. A wait ends early once somebody, who has seen a rank die, says that the group has ended;
// then results are anything, and entry points return RANKS_ENDED. Refuses to start processes. Read `api.h` for gc_ranks,
// `layer_ops.cpp` for where layers sum, `gemcutter/parallel/` for who starts ranks.
#pragma once
#include "api.h"
#include "thread_pool.h"

namespace gemcutter {

constexpr int RANKS_ENDED = 3;  // what an entry point returns when a rank is gone

// x [n] = the sum of all ranks' x. Called by all threads with x complete (a barrier before); x is complete after the next barrier.
void sum_over_ranks(ThreadPool &pool, int index, gc_ranks &ranks, float *x, int64_t n);

// What an entry point returns after a region in which ranks may have been waited for.
inline int result_of(const gc_ranks *ranks) { return ranks && ranks->has_ended ? RANKS_ENDED : 0; }

}  // namespace gemcutter
