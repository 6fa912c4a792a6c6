/* What torch's CPU allocator holds, in all threads: put in front of the C library with LD_PRELOAD.

   That allocator takes every tensor's memory from posix_memalign and gives it back with free. Other memory of the
   process (Python's, gloo's) comes from malloc and is not counted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define SLOTS (1u << 20)
#define GONE ((void *)1)

extern void __libc_free(void *);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *addresses[SLOTS];
static size_t sizes[SLOTS];
static long long held, peak;

static unsigned slot_of(void *address) { return (unsigned)(((uintptr_t)address >> 6) * 2654435761u) & (SLOTS - 1); }

int posix_memalign(void **out, size_t alignment, size_t size) {
    static int (*next)(void **, size_t, size_t);
    if (!next) next = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    int failed = next(out, alignment, size);
    if (failed || alignment < 64) return failed;
    pthread_mutex_lock(&lock);
    unsigned slot = slot_of(*out);
    while (addresses[slot] && addresses[slot] != GONE) slot = (slot + 1) & (SLOTS - 1);
    addresses[slot] = *out;
    sizes[slot] = size;
    held += (long long)size;
    if (held > peak) peak = held;
    pthread_mutex_unlock(&lock);
    return 0;
}

void free(void *address) {
    if (address && !((uintptr_t)address & 63)) {
        pthread_mutex_lock(&lock);
        unsigned slot = slot_of(address);
        while (addresses[slot] && addresses[slot] != address) slot = (slot + 1) & (SLOTS - 1);
        if (addresses[slot] == address) {
            held -= (long long)sizes[slot];
            addresses[slot] = GONE;
        }
        pthread_mutex_unlock(&lock);
    }
    __libc_free(address);
}

long long tensors_held(void) { return held; }
long long tensors_peak(void) { return peak; }
void tensors_rest_peak(void) { peak = held; }
