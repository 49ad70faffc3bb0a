// Stress of the thread pool: two callers at once, thousands of tiny regions, the number of threads changed between them.
//
// A program of its own, because the thread sanitizer wants every object that runs to be built with it, which Python's are not.
// `tools/sanitize.sh` builds and runs it. Returns 0 if every region saw what its barriers promise.
#include <stdio.h>

#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/cpu/thread_pool.h"

namespace {

constexpr int REGIONS = 1500, MOST_THREADS = 256;

struct Work {
    int64_t items, written[MOST_THREADS] = {}, taken[MOST_THREADS] = {}, failures[MOST_THREADS] = {};
};

// Each thread writes without locks, and after a barrier reads what all others wrote; then all share out a count.
void body(void *argument, gemcutter::ThreadPool &pool, int index) {
    Work &work = *static_cast<Work *>(argument);
    work.written[index] = work.items + index;
    pool.barrier();
    for (int i = 0; i < pool.size; ++i) work.failures[index] += work.written[i] != work.items + i;
    while (pool.counters[3].fetch_add(1) < work.items) ++work.taken[index];
    pool.barrier();
    int64_t taken = 0;
    for (int i = 0; i < pool.size; ++i) taken += work.taken[i];
    work.failures[index] += taken != work.items;
}

int64_t call_often(unsigned seed) {
    const int counts[] = {1, 2, 7, 3};
    int64_t failures = 0;
    for (int region = 0; region < REGIONS; ++region) {
        seed = seed * 1664525u + 1013904223u;
        if ((seed >> 24) % 8 == 0) gemcutter::set_threads(counts[seed >> 16 & 3]);
        auto work = std::make_unique<Work>();
        work->items = seed >> 20 & 31;
        gemcutter::run_parallel(body, work.get());
        for (int64_t failed : work->failures) failures += failed;
    }
    return failures;
}

}  // namespace

int main() {
    int64_t failures[2] = {};
    std::vector<std::thread> callers;
    for (unsigned i = 0; i < 2; ++i) callers.emplace_back([&failures, i] { failures[i] = call_often(i + 1); });
    for (auto &caller : callers) caller.join();
    printf("%d regions, %lld failures\n", 2 * REGIONS, (long long)(failures[0] + failures[1]));
    return failures[0] + failures[1] != 0;
}
