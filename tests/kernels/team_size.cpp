// How the size of a team follows what other programs take, on a machine that is simulated: a program of its own, since the class
// is not part of the library's interface. `test_thread_pool.py` builds and runs it. Returns 0 if every scene went as it should.
#include "../../csrc/cpu/team_size.h"

#include <math.h>
#include <stdio.h>

#include <initializer_list>

namespace {

constexpr int64_t SECOND = 1'000'000'000;

struct Machine {
    int cores, busy;           // busy: other programs, each with one thread that never rests
    bool is_memory_bound;      // threads wait for each other at barriers a few times a region, and share the memory
    int64_t region = 300'000;  // ns of one thread without others

    // Regions of a team, in which all that are ready to run get equal shares of the cores.
    gemcutter::RegionTimes run(int size) const {
        const double share = size + busy <= cores ? 1.0 : (double)cores / (size + busy);
        const double together = 0.95 * (is_memory_bound ? pow(share, size) : share);  // of the time, all threads have cores
        const double gain = is_memory_bound ? pow(size, 0.6) : size;
        const auto wall = (int64_t)((double)region / (gain * together));
        const double all = (double)wall * size;
        return {size, wall, (int64_t)(all * together), (int64_t)(all * (1 - share)), is_memory_bound};
    }
};

struct Lived {
    double size, speed;  // means over time; speed relative to one thread on an idle machine
    int last;
};

Lived live(gemcutter::TeamSize &team, const Machine &machine, int wanted, int64_t ns) {
    int64_t passed = 0, regions = 0;
    double sizes = 0;
    while (passed < ns) {
        const auto times = machine.run(team.next(wanted));
        team.note(times);
        passed += times.wall;
        sizes += (double)times.size * (double)times.wall;
        ++regions;
    }
    return {sizes / (double)passed, (double)(regions * machine.region) / (double)passed, team.next(wanted)};
}

int failures = 0;
void expect(bool is_true, const char *what, const Lived &lived) {
    if (is_true) return;
    ++failures;
    printf("%s: size %.2f, speed %.2f, last %d\n", what, lived.size, lived.speed, lived.last);
}

double speed_of(const Machine &machine, int size) { return (double)machine.region / (double)machine.run(size).wall; }

}  // namespace

int main() {
    gemcutter::TeamSize team;
    Machine decode = {2, 0, true}, prompt = {2, 0, false};
    Lived lived = live(team, decode, 2, 2 * SECOND);
    expect(lived.size == 2 && !team.is_contended(), "an idle machine: all threads", lived);
    decode.busy = 1;
    lived = live(team, decode, 2, 3 * SECOND);
    expect(lived.size < 1.2 && lived.speed > 0.9 * speed_of(decode, 1), "one core taken: one thread is faster", lived);
    decode.busy = 0;
    live(team, decode, 2, 4 * SECOND);
    lived = live(team, decode, 2, SECOND);
    expect(lived.size == 2 && !team.is_contended(), "idle again: all threads are back within seconds", lived);

    prompt.busy = 1;
    lived = live(team, prompt, 2, 3 * SECOND);
    expect(lived.size == 2, "work that is shared out well keeps its threads", lived);
    expect(team.is_contended(), "but they sleep while they wait", lived);

    for (int busy : {1, 4, 8}) {
        gemcutter::TeamSize many;
        Machine large = {16, busy, true};
        live(many, large, 16, 10 * SECOND);
        lived = live(many, large, 16, 10 * SECOND);
        double best = 0;
        for (int size = 1; size <= 16; ++size) best = speed_of(large, size) > best ? speed_of(large, size) : best;
        expect(lived.speed > 0.85 * best, "sixteen cores, some taken: near the best size", lived);
        expect(many.next(4) == 4, "another number of threads begins anew", lived);
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
