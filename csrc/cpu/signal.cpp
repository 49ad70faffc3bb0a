// Sleeping and waking: a futex on Linux; elsewhere a thread that waits for long yields its core again and again.
#include "signal.h"

#include <time.h>

#include <thread>

#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gemcutter {

WaitTimes &wait_times() {
    static thread_local WaitTimes times;
    return times;
}

int64_t core_ns() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec time;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return (int64_t)time.tv_sec * 1'000'000'000 + time.tv_nsec;
#endif
    return 0;
}

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

void give_way() { std::this_thread::yield(); }

#if defined(__linux__)
void Signal::sleep(uint32_t seen) {
    sleepers_.fetch_add(1);
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&value_), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    sleepers_.fetch_sub(1);
}

void Signal::wake() {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&value_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
void Signal::sleep(uint32_t) { give_way(); }
void Signal::wake() {}
#endif

}  // namespace gemcutter
