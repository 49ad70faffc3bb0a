// How one thread waits for another: it spins for a moment, then sleeps until it is woken.
//
// Owns the word that threads sleep on, and the count of what waiting took. A sleeping thread gives its core to any program that
// wants it and, on Linux, is soon given one again when it is woken; one that yields its core instead would lose it for whole time
// slices on a busy machine. Read `thread_pool.cpp` for who waits for whom.
#pragma once
#include <stdint.h>

#include <atomic>
#include <chrono>

namespace gemcutter {

inline int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

// Time that this thread has had a core, in ns; 0 where that can't be told.
int64_t core_ns();

// What this thread's waits have taken since it began, in ns, but for those that were over at once.
struct WaitTimes {
    int64_t spun = 0, slept = 0;
};
WaitTimes &wait_times();

// Lets a few cycles pass, and gives them to the other thread of the core.
void relax();

// Lets another thread have the core if one wants it.
void give_way();

class Signal {
  public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    // Wakes all that sleep until the value changes.
    void advance() {
        value_.fetch_add(1);
        if (sleepers_.load()) wake();
    }

    // Sleeps until the value is no longer `seen`, or for no reason: ask again what you waited for.
    void sleep(uint32_t seen);

    // Returns when done() holds, which must become true before advance() is called. Spins for `spin_ns` at most.
    template <typename Done>
    void wait(int64_t spin_ns, const Done &done) {
        for (int i = 0; i < SHORT; ++i, relax())
            if (done()) return;
        const int64_t started = now_ns();
        int64_t now = started;
        while (now - started < spin_ns) {
            for (int i = 0; i < SHORT; ++i, now - started < PAUSED ? relax() : give_way())
                if (done()) return note(started, now_ns(), 0);
            now = now_ns();
        }
        for (;;) {
            const uint32_t seen = value_.load();
            if (done()) return note(started, now, now_ns() - now);
            sleep(seen);
        }
    }

  private:
    static constexpr int SHORT = 32;           // about a microsecond, which is not worth two looks at the clock
    static constexpr int64_t PAUSED = 40'000;  // ns; a hypervisor may take the core from a thread that pauses for longer
    static void note(int64_t started, int64_t ended, int64_t slept) {
        wait_times().spun += ended - started;
        wait_times().slept += slept;
    }
    void wake();

    std::atomic<uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
};

}  // namespace gemcutter
