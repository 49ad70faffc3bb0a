// Times the loops of `peak.cpp` on all threads, in the time that each thread had a core.
#include <string.h>

#include "parallel_region.h"

// The operations and the seconds of each thread [threads], in `rounds` of the level's loop for a kind of product ("float32",
// "int8", "bfloat16"). Returns 1 where the level has none.
GC_EXPORT int gc_peak(const char *kind, int64_t rounds, double *operations, double *seconds) {
    using namespace gemcutter;
    const PeakLoop *loop = kernels().peaks;
    while (loop->name && strcmp(loop->name, kind)) ++loop;
    if (!loop->name) return 1;
    parallel_region([&](ThreadPool &pool, int index) {
        pool.barrier();
        const int64_t started = core_ns();
        loop->run(rounds);
        seconds[index] = (double)(core_ns() - started) * 1e-9;
        operations[index] = loop->operations * (double)rounds;
    });
    return 0;
}
