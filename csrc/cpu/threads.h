// The team of threads that runs every sentence: one parallel region a call, barriers inside.
//
// Workers wait by spinning for a moment, then asleep, so that a token loop meets them awake and an idle program costs nothing.
// Survives fork (a child starts its own workers). One region runs at a time; calls from several program threads queue.
#pragma once
#include <stdint.h>

#include <atomic>

namespace gemcutter {

struct Team {
    int size;
    int spins;  // turns of waiting before a thread gives its core away
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> phase{0};
    alignas(64) std::atomic<int64_t> counters[64] = {};  // for sharing work out; zero at the start of a region
    void barrier();
};

// Runs work(argument, team, index) on all threads of the team and returns when all are done. The team has as many threads as
// threads() said last to this program thread, so that memory for each can be taken before.
void run(void (*work)(void *argument, Team &team, int index), void *argument);

void set_threads(int count);
int threads();  // that the next region from this program thread will have

// Part `index` of `size` of the range 0..n-1, cut at multiples of `unit`.
struct Range {
    int64_t first, last;
};
inline Range share(int64_t n, int64_t unit, int index, int size) {
    int64_t units = (n + unit - 1) / unit, a = units * index / size * unit, b = units * (index + 1) / size * unit;
    return {a < n ? a : n, b < n ? b : n};
}

}  // namespace gemcutter
