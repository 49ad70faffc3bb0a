// The segment that ranks share, and how one waits for the others: spinning for a moment, then asleep on a futex.
//
// Owns the layout of the segment: a header of cache lines, one for each rank, then the slots. Read `ranks.h` for the protocol.
#include "ranks.h"

#include <string.h>

#include <atomic>

#include "kernels.h"
#include "parallel_region.h"
#include "signal.h"

#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace gemcutter {
namespace {

constexpr int64_t SPIN = 2'000'000;  // ns: ranks differ by what their cores were given meanwhile
constexpr int64_t NAP = 50'000'000;  // ns, after which a sleeper looks whether the group has ended
constexpr int64_t FEW = 1 << 14;     // floats that one thread sums in less time than a region takes to begin
constexpr int64_t UNIT = 16;         // floats of a cache line

// One rank's line of the header: the exchange that it has copied its part for. The first line also says whether the group has
// ended, which Python sets, and where sleepers sleep.
struct alignas(64) RankLine {
    std::atomic<uint32_t> arrived;
    std::atomic<uint32_t> has_ended, changes, sleepers;  // of line 0 alone
};
static_assert(sizeof(RankLine) == 64, "Python writes has_ended at byte 4");

RankLine *lines_of(const gc_ranks &ranks) { return static_cast<RankLine *>(ranks.segment); }

float *slot_of(const gc_ranks &ranks, uint32_t step, int64_t rank) {
    char *slots = static_cast<char *>(ranks.segment) + ranks.world * (int64_t)sizeof(RankLine);
    return reinterpret_cast<float *>(slots) + ((step & 1) * ranks.world + rank) * ranks.slot;
}

#if defined(__linux__)
void sleep_on(std::atomic<uint32_t> &word, uint32_t seen) {
    const timespec time = {0, NAP};
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAIT, seen, &time, nullptr, 0);
}
void wake_all(std::atomic<uint32_t> &word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}
#else
void sleep_on(std::atomic<uint32_t> &, uint32_t) { give_way(); }
void wake_all(std::atomic<uint32_t> &) {}
#endif

bool have_arrived(const gc_ranks &ranks, uint32_t step) {
    const RankLine *lines = lines_of(ranks);
    for (int32_t rank = 0; rank < ranks.world; ++rank)
        if ((int32_t)(lines[rank].arrived.load(std::memory_order_acquire) - step) < 0) return false;
    return true;
}

// Says that this rank's part lies in its slot, and returns when everybody's does or the group has ended.
void meet(gc_ranks &ranks, uint32_t step) {
    RankLine *lines = lines_of(ranks), &first = lines[0];
    lines[ranks.rank].arrived.store(step, std::memory_order_release);
    first.changes.fetch_add(1);
    if (first.sleepers.load()) wake_all(first.changes);
    const auto is_over = [&] { return have_arrived(ranks, step) || first.has_ended.load(std::memory_order_relaxed); };
    const int64_t started = now_ns();
    while (!is_over()) {
        if (now_ns() - started < SPIN) {
            relax();
            continue;
        }
        first.sleepers.fetch_add(1);
        const uint32_t seen = first.changes.load();
        if (!is_over()) sleep_on(first.changes, seen);
        first.sleepers.fetch_sub(1);
    }
    if (first.has_ended.load()) ranks.has_ended = 1;
}

void copy(float *to, const float *from, int64_t n) { memcpy(to, from, sizeof(float) * (size_t)n); }

// x = the sum of the ranks' slots over a range, in the order of ranks.
void sum_slots(const gc_ranks &ranks, uint32_t step, int64_t first, int64_t last, float *x) {
    copy(x + first, slot_of(ranks, step, 0) + first, last - first);
    for (int32_t rank = 1; rank < ranks.world; ++rank)
        kernels().vector_ops->add_scaled(slot_of(ranks, step, rank) + first, 1.0f, last - first, x + first);
}

}  // namespace

void sum_over_ranks(ThreadPool &pool, int index, gc_ranks &ranks, float *x, int64_t n) {
    if (ranks.sum) {  // by one thread, for which the others wait
        if (index == 0 && ranks.sum(x, n)) ranks.has_ended = 1;
        return pool.barrier();
    }
    uint32_t step = ranks.step;  // written by thread 0 once all threads have read it, which they have at the first barrier
    for (int64_t done = 0; done < n; done += ranks.slot) {
        ++step;
        float *part = x + done;
        const Range own = share(n - done < ranks.slot ? n - done : ranks.slot, UNIT, index, pool.size);
        copy(slot_of(ranks, step, ranks.rank) + own.first, part + own.first, own.last - own.first);
        pool.barrier();
        if (index == 0) ranks.step = step, meet(ranks, step);
        pool.barrier();
        sum_slots(ranks, step, own.first, own.last, part);
    }
}

}  // namespace gemcutter

// Bytes of the segment of `world` ranks with two slots of `slot` floats for each, all zero at first.
GC_EXPORT int64_t gc_ranks_bytes(int64_t world, int64_t slot) {
    return world * (int64_t)sizeof(gemcutter::RankLine) + 2 * world * slot * (int64_t)sizeof(float);
}

// x [n] = the sum of all ranks' x, taken in the order of ranks. Returns 0 or RANKS_ENDED.
GC_EXPORT int gc_sum_over_ranks(gc_ranks *ranks, float *x, int64_t n) {
    using namespace gemcutter;
    if (n <= FEW) {
        ThreadPool alone;
        alone.size = 1, alone.spin_ns = 0;
        sum_over_ranks(alone, 0, *ranks, x, n);
    } else {
        parallel_region([&](ThreadPool &pool, int index) { sum_over_ranks(pool, index, *ranks, x, n); });
    }
    return result_of(ranks);
}

// out [rows, sum of widths] = the rows [rows, widths[rank]] of all ranks side by side; no width is larger than a slot. Returns 0
// or RANKS_ENDED.
GC_EXPORT int gc_join_ranks(gc_ranks *ranks, const float *x, int64_t rows, const int64_t *widths, float *out) {
    using namespace gemcutter;
    int64_t most = 0, width = 0;
    for (int32_t rank = 0; rank < ranks->world; ++rank) {
        width += widths[rank];
        if (widths[rank] > most) most = widths[rank];
    }
    const int64_t own = widths[ranks->rank], at_once = most > 0 ? ranks->slot / most : 1;
    for (int64_t first = 0; first < rows; first += at_once) {
        const int64_t count = rows - first < at_once ? rows - first : at_once;
        const uint32_t step = ++ranks->step;
        copy(slot_of(*ranks, step, ranks->rank), x + first * own, count * own);
        meet(*ranks, step);
        for (int64_t row = 0; row < count; ++row) {
            float *to = out + (first + row) * width;
            for (int32_t rank = 0; rank < ranks->world; to += widths[rank], ++rank)
                copy(to, slot_of(*ranks, step, rank) + row * widths[rank], widths[rank]);
        }
    }
    return result_of(ranks);
}
