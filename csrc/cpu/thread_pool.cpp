// The workers behind the thread pool: waiting, sleeping, barriers and survival of fork.
//
// Owns the one pool of the process. Read `thread_pool.h` for the contract.
#include "thread_pool.h"

#include <mutex>
#include <thread>
#include <vector>

#include "team_size.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#else
static int getpid() { return 0; }
#endif

namespace gemcutter {
namespace {

constexpr int64_t SPIN = 100'000'000;  // ns, before a thread sleeps at a barrier: on a virtual machine an idle core may be lost
constexpr int64_t TOKEN_SPIN = 1'000'000;  // ns, before a worker sleeps after a region: longer than the gap between two tokens
constexpr int64_t BUSY_SPIN = 10'000;      // ns, instead of either while other programs want the cores
constexpr int SAMPLES = 4;                 // one region in so many has its times taken, on a busy machine all

struct Workers {
    ThreadPool pool;
    const int capacity, owner = getpid();
    alignas(64) std::atomic<uint64_t> region{0};  // number of the newest, times 2^16, plus its threads
    alignas(64) std::atomic<int> running{0};
    alignas(64) std::atomic<bool> is_closing{false};
    Signal begun, ended, grown;
    std::atomic<int64_t> token_spin{0}, useful{0}, stolen{0};
    int64_t started = 0;  // of the region, in ns; 0 where its times are not taken
    uint64_t number = 0;
    int size_before = 1;
    void (*work)(void *, ThreadPool &, int) = nullptr;
    void *argument = nullptr;
    std::vector<std::thread> threads;

    explicit Workers(int threads_wanted) : capacity(threads_wanted) {
        for (int index = 1; index < capacity; ++index) threads.emplace_back([this, index] { serve(index); });
    }

    ~Workers() {
        is_closing = true;
        begun.advance();
        grown.advance();
        for (auto &thread : threads) thread.join();
    }

    void serve(int index) {
        for (uint64_t seen = 0;;) {
            const uint32_t size_seen = grown.value();
            begun.wait(token_spin.load(std::memory_order_relaxed),
                       [&] { return region.load(std::memory_order_acquire) != seen || is_closing; });
            if (is_closing) return;
            seen = region.load(std::memory_order_acquire);
            if ((int)(seen & 0xffff) <= index) {  // not in the team: sleeps until it grows
                grown.wait(0, [&] { return grown.value() != size_seen; });
                continue;
            }
            take_part(index);
            if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) ended.advance();
        }
    }

    // This thread's part of a region.
    void take_part(int index) {
        if (!started) return work(argument, pool, index);
        const WaitTimes waited = wait_times();
        const int64_t from = core_ns();
        work(argument, pool, index);
        const int64_t on_core = core_ns() - from, spun = wait_times().spun - waited.spun,
                      slept = wait_times().slept - waited.slept;
        useful.fetch_add(on_core - spun, std::memory_order_relaxed);
        stolen.fetch_add(now_ns() - started - on_core - slept, std::memory_order_relaxed);
    }

    // Runs a region with `size` threads; `team` says how patiently they wait, and is told what became of their time.
    void run(void (*new_work)(void *, ThreadPool &, int), void *new_argument, int size, TeamSize &team) {
        work = new_work;
        argument = new_argument;
        pool.size = size;
        pool.is_memory_bound.store(false, std::memory_order_relaxed);
        for (auto &counter : pool.counters) counter.store(0, std::memory_order_relaxed);
        set_patience(team.is_contended());
        ++number;
        started = capacity > 1 && (team.is_contended() || number % SAMPLES == 0) ? now_ns() : 0;
        useful.store(0, std::memory_order_relaxed);
        stolen.store(0, std::memory_order_relaxed);
        if (size > 1) begin();
        take_part(0);
        if (size > 1) ended.wait(pool.spin_ns, [&] { return running.load(std::memory_order_acquire) == 0; });
        if (started) team.note({size, now_ns() - started, useful, stolen, pool.is_memory_bound});
    }

    void begin() {
        running.store(pool.size - 1, std::memory_order_relaxed);
        region.store(number << 16 | (uint64_t)pool.size, std::memory_order_release);
        if (pool.size > size_before) grown.advance();
        size_before = pool.size;
        begun.advance();
    }

    void set_patience(bool is_contended) {
        // More threads than cores would spin on the core that the thread they wait for needs.
        const bool have_cores = pool.size <= (int)std::thread::hardware_concurrency();
        pool.spin_ns = !have_cores ? 0 : is_contended ? BUSY_SPIN : SPIN;
        token_spin.store(!have_cores ? 0 : is_contended ? BUSY_SPIN : TOKEN_SPIN, std::memory_order_relaxed);
    }
};

std::mutex region_lock;      // one region at a time
Workers *current = nullptr;  // created at first use; never destroyed at exit, when its threads may be at any point
TeamSize team;
std::atomic<int> wanted{1};
std::atomic<uint32_t> sized{0};  // the size of the team, and times 2^16 for how many wanted threads
thread_local int planned = 0;    // what threads() returned, until the region that it was called for

#if defined(__unix__) || defined(__APPLE__)
// A fork waits for the running region, so that the child does not inherit a lock that no thread of it will release.
void enter() { region_lock.lock(); }
void leave() { region_lock.unlock(); }
[[maybe_unused]] const int at_fork = pthread_atfork(enter, leave, leave);
#endif

// Threads of regions at present: no more than were set.
int team_size() {
    const int all = wanted.load(std::memory_order_relaxed);
    const uint32_t found = sized.load(std::memory_order_relaxed);
    return (int)(found >> 16) == all ? (int)(found & 0xffff) : all;
}

}  // namespace

void ThreadPool::barrier() {
    if (size == 1) return;
    const uint32_t now = phase.value();
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        arrived.store(0, std::memory_order_relaxed);
        return phase.advance();
    }
    phase.wait(spin_ns, [&] { return phase.value() != now; });
}

void run_parallel(void (*work)(void *, ThreadPool &, int), void *argument) {
    std::lock_guard<std::mutex> lock(region_lock);
    const int size = threads(), capacity = wanted > size ? wanted.load() : size;
    planned = 0;
    if (current && current->owner != getpid()) current = nullptr;  // after a fork it has no threads and can't be destroyed
    if (current && current->capacity != capacity) {
        delete current;
        current = nullptr;
    }
    if (!current) current = new Workers(capacity);
    team.next(capacity);
    current->run(work, argument, size, team);
    sized.store((uint32_t)capacity << 16 | (uint32_t)team.next(capacity), std::memory_order_relaxed);
}

void set_threads(int count) {
    wanted = count < 1 ? 1 : count > 256 ? 256 : count;
    planned = 0;
}

int threads() {
    if (!planned) planned = team_size();
    return planned;
}

}  // namespace gemcutter
