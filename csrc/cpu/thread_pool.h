// The thread pool that runs every op: one parallel region for each call, with barriers inside.
//
// Owns threads, barriers and shared counters. Workers wait by spinning for a moment, then asleep, so that they are awake in a
// token loop and an idle program costs nothing. A region gets fewer threads while other programs take cores (`team_size.h`).
// Survives fork (a child starts its own workers). One region runs at a time; calls from several program threads queue. Refuses
// to know what runs. Read `parallel_region.h` for the usual way in, `signal.h` for how threads wait.
#pragma once
#include <stdint.h>

#include <atomic>

#include "signal.h"

namespace gemcutter {

// What the code inside a parallel region sees of the pool.
struct ThreadPool {
    int size;
    int64_t spin_ns;  // before a waiting thread sleeps
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) Signal phase;
    alignas(64) std::atomic<bool> is_memory_bound{false};  // set by a region that streams weights for few rows
    alignas(64) std::atomic<int64_t> counters[64] = {};    // for dynamic work sharing; zero at the start of a region
    void barrier();
};

// Runs work(argument, pool, index) on all threads of the pool and returns when all are done. The pool has as many threads as
// threads() returned last to this program thread, so that memory for each can be allocated before.
void run_parallel(void (*work)(void *argument, ThreadPool &pool, int index), void *argument);

void set_threads(int count);
int threads();  // of the next region from this program thread: as many as were set, or fewer on a busy machine

// Part `index` of `size` of the range 0..n-1, split at multiples of `unit`.
struct Range {
    int64_t first, last;
};
inline Range share(int64_t n, int64_t unit, int index, int size) {
    int64_t units = (n + unit - 1) / unit, a = units * index / size * unit, b = units * (index + 1) / size * unit;
    return {a < n ? a : n, b < n ? b : n};
}

}  // namespace gemcutter
