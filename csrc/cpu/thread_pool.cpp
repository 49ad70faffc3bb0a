// The workers behind the thread pool: spinning, sleeping, barriers and survival of fork.
//
// Owns the one pool of the process. Read `thread_pool.h` for the contract.
#include "thread_pool.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#else
static int getpid() { return 0; }
#endif
#if defined(__x86_64__)
#include <immintrin.h>
static void relax() { _mm_pause(); }
#else
static void relax() {}
#endif

namespace gemcutter {
namespace {

constexpr int SPINS = 2000;   // about 40 us; then a thread yields its core to any other that wants it
constexpr int YIELDS = 2000;  // about 1 ms if no other does, longer than the gap between two tokens; then a worker sleeps

void spin_or_yield(int spin, int spins) {
    if (spin < spins) relax();
    else std::this_thread::yield();
}

struct Workers {
    ThreadPool pool;
    int owner = getpid();
    alignas(64) std::atomic<uint64_t> ticket{0};  // of the newest region
    alignas(64) std::atomic<int> running{0};
    alignas(64) std::atomic<bool> is_closing{false};
    void (*work)(void *, ThreadPool &, int) = nullptr;
    void *argument = nullptr;
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> started;

    explicit Workers(int size) {
        pool.size = size;
        // More threads than cores would spin on the core that the thread they wait for needs.
        pool.spins = size <= (int)std::thread::hardware_concurrency() ? SPINS : 0;
        for (int index = 1; index < size; ++index) started.emplace_back([this, index] { serve(index); });
    }

    ~Workers() {
        is_closing = true;
        { std::lock_guard<std::mutex> lock(mutex); }
        wake.notify_all();
        for (auto &worker : started) worker.join();
    }

    void serve(int index) {
        uint64_t seen = 0;
        while (wait_for(seen)) {
            work(argument, pool, index);
            running.fetch_sub(1, std::memory_order_release);
        }
    }

    bool wait_for(uint64_t &seen) {
        for (int spin = 0; spin < pool.spins + YIELDS; ++spin) {
            if (ticket.load(std::memory_order_acquire) != seen) break;
            if (is_closing) return false;
            spin_or_yield(spin, pool.spins);
        }
        if (ticket.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, [&] { return ticket.load(std::memory_order_acquire) != seen || is_closing; });
        }
        seen = ticket.load(std::memory_order_acquire);
        return !is_closing;
    }

    void run(void (*new_work)(void *, ThreadPool &, int), void *new_argument) {
        work = new_work;
        argument = new_argument;
        for (auto &counter : pool.counters) counter.store(0, std::memory_order_relaxed);
        if (pool.size > 1) {
            running.store(pool.size - 1, std::memory_order_relaxed);
            {
                std::lock_guard<std::mutex> lock(mutex);
                ticket.fetch_add(1, std::memory_order_release);
            }
            wake.notify_all();
        }
        work(argument, pool, 0);
        for (int spin = 0; running.load(std::memory_order_acquire); ++spin) spin_or_yield(spin, pool.spins);
    }
};

std::mutex region_lock;      // one region at a time
Workers *current = nullptr;  // created at first use; never destroyed at exit, when its threads may be at any point
std::atomic<int> wanted{1};
thread_local int planned = 0;  // what threads() returned, until the region that it was called for

#if defined(__unix__) || defined(__APPLE__)
// A fork waits for the running region, so that the child does not inherit a lock that no thread of it will release.
void enter() { region_lock.lock(); }
void leave() { region_lock.unlock(); }
[[maybe_unused]] const int at_fork = pthread_atfork(enter, leave, leave);
#endif

}  // namespace

void ThreadPool::barrier() {
    if (size == 1) return;
    int now = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        arrived.store(0, std::memory_order_relaxed);
        phase.store(now + 1, std::memory_order_release);
        return;
    }
    for (int spin = 0; phase.load(std::memory_order_acquire) == now; ++spin) spin_or_yield(spin, spins);
}

void run_parallel(void (*work)(void *, ThreadPool &, int), void *argument) {
    std::lock_guard<std::mutex> lock(region_lock);
    int size = threads();
    planned = 0;
    if (current && current->owner != getpid()) current = nullptr;  // after a fork it has no threads and can't be destroyed
    if (current && current->pool.size != size) {
        delete current;
        current = nullptr;
    }
    if (!current) current = new Workers(size);
    current->run(work, argument);
}

void set_threads(int count) {
    wanted = count < 1 ? 1 : count > 256 ? 256 : count;
    planned = 0;
}
int threads() {
    if (!planned) planned = wanted.load(std::memory_order_relaxed);
    return planned;
}

}  // namespace gemcutter
