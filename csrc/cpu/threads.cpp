#include "threads.h"

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

constexpr int SPINS = 2000;   // some 40 us; then a thread gives its core away whenever somebody wants it
constexpr int YIELDS = 2000;  // about 1 ms where nobody does, longer than the gap between two tokens; then a worker sleeps

void wait_a_turn(int spin, int spins) {
    if (spin < spins)
        relax();
    else
        std::this_thread::yield();
}

struct Pool {
    Team team;
    int owner = getpid();
    alignas(64) std::atomic<uint64_t> ticket{0};  // of the newest region
    alignas(64) std::atomic<int> running{0};
    alignas(64) std::atomic<bool> is_closing{false};
    void (*work)(void *, Team &, int) = nullptr;
    void *argument = nullptr;
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> workers;

    explicit Pool(int size) {
        team.size = size;
        // More threads than cores would wait for each other's turn on the core that they spin on.
        team.spins = size <= (int)std::thread::hardware_concurrency() ? SPINS : 0;
        for (int index = 1; index < size; ++index) workers.emplace_back([this, index] { serve(index); });
    }

    ~Pool() {
        is_closing = true;
        { std::lock_guard<std::mutex> lock(mutex); }
        wake.notify_all();
        for (auto &worker : workers) worker.join();
    }

    void serve(int index) {
        uint64_t seen = 0;
        while (wait_for(seen)) {
            work(argument, team, index);
            running.fetch_sub(1, std::memory_order_release);
        }
    }

    bool wait_for(uint64_t &seen) {
        for (int spin = 0; spin < team.spins + YIELDS; ++spin) {
            if (ticket.load(std::memory_order_acquire) != seen) break;
            if (is_closing) return false;
            wait_a_turn(spin, team.spins);
        }
        if (ticket.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, [&] { return ticket.load(std::memory_order_acquire) != seen || is_closing; });
        }
        seen = ticket.load(std::memory_order_acquire);
        return !is_closing;
    }

    void run(void (*new_work)(void *, Team &, int), void *new_argument) {
        work = new_work;
        argument = new_argument;
        for (auto &counter : team.counters) counter.store(0, std::memory_order_relaxed);
        if (team.size > 1) {
            running.store(team.size - 1, std::memory_order_relaxed);
            { std::lock_guard<std::mutex> lock(mutex); ticket.fetch_add(1, std::memory_order_release); }
            wake.notify_all();
        }
        work(argument, team, 0);
        for (int spin = 0; running.load(std::memory_order_acquire); ++spin) wait_a_turn(spin, team.spins);
    }
};

std::mutex entrance;          // one region at a time
Pool *pool = nullptr;         // made when first used; left alone at the program's end, when its threads may be anywhere
std::atomic<int> wanted{1};
thread_local int planned = 0;  // what threads() said, until the region that it was asked for

#if defined(__unix__) || defined(__APPLE__)
// A fork waits for the region that runs, so that the child does not inherit a lock that nobody opens.
void enter() { entrance.lock(); }
void leave() { entrance.unlock(); }
[[maybe_unused]] const int at_fork = pthread_atfork(enter, leave, leave);
#endif

}  // namespace

void Team::barrier() {
    if (size == 1) return;
    int now = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        arrived.store(0, std::memory_order_relaxed);
        phase.store(now + 1, std::memory_order_release);
        return;
    }
    for (int spin = 0; phase.load(std::memory_order_acquire) == now; ++spin) wait_a_turn(spin, spins);
}

void run(void (*work)(void *, Team &, int), void *argument) {
    std::lock_guard<std::mutex> lock(entrance);
    int size = threads();
    planned = 0;
    if (pool && pool->owner != getpid()) pool = nullptr;  // after a fork its threads are gone, and nothing of it can be closed
    if (pool && pool->team.size != size) {
        delete pool;
        pool = nullptr;
    }
    if (!pool) pool = new Pool(size);
    pool->run(work, argument);
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
