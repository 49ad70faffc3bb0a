// Calls functions of a library on behalf of another process, as if pointers into that process' memory were its own.
//
// `tests/kernels/remote.py` starts it under an emulator of another processor, so that the tests of kernels run over a library for
// that processor while Python itself does not. A call's pointers mean memory of the caller: the first touch of a page raises
// SIGSEGV, and the handler fetches the page to the same address; behind the call, bytes that changed are written back, and all
// pages are let go. So nothing here knows the functions. Owns that memory and the messages; refuses to know kernels.
//
// Arguments: the library, and the number of an open file: /proc/PID/mem of the caller. A request on the standard input is a
// Request, an answer on the standard output the function's integer result. A function that is in no library, or memory that the
// caller has not got either, ends the program with a message.
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

namespace {

constexpr size_t PAGE = 4096, MOST_PAGES = 1 << 17;

struct Request {
    char name[64];
    int64_t integers[16];  // pointers and integers in their order
    float floats[8];       // and float32 in theirs: processors pass both kinds in registers of their own
};
typedef int64_t (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t, int64_t, float, float, float, float, float, float, float, float);

struct Page {
    char *at;
    char original[PAGE];
};

int caller;   // its memory
Page *pages;  // of which most are never touched
size_t num_pages = 0;
std::atomic_flag busy = ATOMIC_FLAG_INIT;

[[noreturn]] void fail(const char *what, const void *where) {
    char text[160];
    const int size = snprintf(text, sizeof text, "remote_calls: %s at %p\n", what, where);
    (void)!write(2, text, (size_t)size);
    _exit(3);
}

bool is_fetched(const char *at) {
    for (size_t i = num_pages; i > 0; --i)
        if (pages[i - 1].at == at) return true;
    return false;
}

// A page appears at its address all at once: other threads that touch it meanwhile wait for `busy`.
void fetch(char *at) {
    constexpr int KIND = MAP_PRIVATE | MAP_ANONYMOUS;
    void *held = mmap(at, PAGE, PROT_NONE, KIND | MAP_FIXED_NOREPLACE, -1, 0);
    if (held != at) {  // of which emulators know the hint alone, and map another place
        if (held != MAP_FAILED) munmap(held, PAGE);
        if (is_fetched(at)) return;
        fail("this process has memory of its own", at);
    }
    if (num_pages == MOST_PAGES) fail("a call touches too many pages, the last", at);
    Page &page = pages[num_pages];
    if (pread(caller, page.original, PAGE, (off_t)at) != (ssize_t)PAGE) fail("the caller has no memory", at);
    void *copy = mmap(nullptr, PAGE, PROT_READ | PROT_WRITE, KIND, -1, 0);
    memcpy(copy, page.original, PAGE);
    if (mremap(copy, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) != at) fail("a page can't be moved", at);
    page.at = at;
    ++num_pages;
}

void on_fault(int, siginfo_t *info, void *) {
    const int before = errno;
    while (busy.test_and_set(std::memory_order_acquire)) {}
    fetch(reinterpret_cast<char *>(reinterpret_cast<uintptr_t>(info->si_addr) & ~(PAGE - 1)));
    busy.clear(std::memory_order_release);
    errno = before;
}

// Writes runs of changed bytes, and nothing beside them: the caller's other threads may use those.
void give_back(const Page &page) {
    for (size_t i = 0; i < PAGE;) {
        size_t end = i;
        while (end < PAGE && page.at[end] != page.original[end]) ++end;
        if (end > i && pwrite(caller, page.at + i, end - i, (off_t)(page.at + i)) != (ssize_t)(end - i))
            fail("the caller's memory can't be written", page.at + i);
        i = end + 1;
    }
}

void give_back_all() {
    for (size_t i = 0; i < num_pages; ++i) {
        if (memcmp(pages[i].at, pages[i].original, PAGE)) give_back(pages[i]);
        munmap(pages[i].at, PAGE);
    }
    num_pages = 0;
}

int64_t call(void *library, const Request &request) {
    void *found = dlsym(library, request.name);
    if (!found) found = dlsym(RTLD_DEFAULT, request.name);
    if (!found) fail(request.name, nullptr);
    const int64_t *n = request.integers;
    const float *f = request.floats;
    return reinterpret_cast<Function>(found)(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12],
                                             n[13], n[14], n[15], f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]);
}

}  // namespace

// The library's, in place of the C library's, which zeroes by whole cache lines (dc zva): QEMU 7.2 does not restart that instruction
// with the registers that it had where its fault was mended, so that bytes stay unset, or the loop never ends.
extern "C" void *memset(void *to, int value, size_t count) {
    char *at = static_cast<char *>(to);
    for (; count > 0; --count) {
        *at++ = static_cast<char>(value);
        __asm__ volatile("" : : : "memory");  // or the compiler would call memset
    }
    return to;
}

int main(int argc, char **argv) {
    void *library = argc == 3 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (!library) return fprintf(stderr, "usage: remote_calls LIBRARY MEMORY; %s\n", argc == 3 ? dlerror() : ""), 2;
    caller = atoi(argv[2]);
    constexpr int KIND = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    pages = static_cast<Page *>(mmap(nullptr, sizeof(Page) * MOST_PAGES, PROT_READ | PROT_WRITE, KIND, -1, 0));
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
    for (Request request; fread(&request, sizeof request, 1, stdin) == 1;) {
        const int64_t answer = call(library, request);
        give_back_all();
        fwrite(&answer, sizeof answer, 1, stdout);
        fflush(stdout);
    }
    return 0;
}
