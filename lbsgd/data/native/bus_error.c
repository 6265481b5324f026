/* Ends the process with a line of text if a mapped file can no longer be read: it has shrunk, or its disk fails.
 *
 * The kernel sends SIGBUS, which by default ends the process silently; Python's own handlers cannot run then. Only faults
 * inside a watched mapping are handled here. Any other SIGBUS acts as it did before the first mapping was watched.
 */
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Never freed, because another thread may be in the handler. `end` is 0 while nothing is watched. */
struct mapping { uintptr_t begin, end; char *line; long exit_code; struct mapping *next; };

static struct mapping *mappings;
static struct sigaction before;
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER;

static void cannot_read(int number, siginfo_t *about, void *context)
{
    (void)context;
    uintptr_t place = (uintptr_t)about->si_addr;
    struct mapping *each = about->si_code == BUS_ADRERR ? __atomic_load_n(&mappings, __ATOMIC_ACQUIRE) : NULL;
    for (; each; each = each->next)
        if (place < __atomic_load_n(&each->end, __ATOMIC_ACQUIRE) && each->begin <= place) {
            static int told;
            while (__atomic_exchange_n(&told, 1, __ATOMIC_RELAXED))
                pause(); /* another thread ends the process */
            ssize_t written = write(STDERR_FILENO, each->line, strlen(each->line)); /* the console may be gone */
            (void)written;
            _exit(each->exit_code);
        }
    sigaction(SIGBUS, &before, NULL);
    if (about->si_code <= 0 || about->si_code == BUS_MCEERR_AO) /* sent; otherwise the read fails again on return */
        raise(number);
}

static void install(void)
{
    struct sigaction ours = {.sa_sigaction = cannot_read, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGBUS, &ours, &before);
}

/* Makes a fault at begin ... begin + num_bytes print the line and end the process. Returns the argument for lbsgd_forget, or
 * NULL if no memory is left. */
void *lbsgd_watch(const void *begin, long num_bytes, const char *line, long exit_code)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install);
    pthread_mutex_lock(&changing);
    struct mapping *mapping = mappings;
    while (mapping && __atomic_load_n(&mapping->end, __ATOMIC_ACQUIRE)) /* lbsgd_forget takes no lock */
        mapping = mapping->next;
    char *copy = strdup(line);
    int is_new = !mapping;
    if (copy && is_new && (mapping = calloc(1, sizeof *mapping)))
        mapping->next = mappings;
    if (copy && mapping) {
        free(mapping->line);
        mapping->line = copy;
        mapping->exit_code = exit_code;
        mapping->begin = (uintptr_t)begin;
        __atomic_store_n(&mapping->end, (uintptr_t)begin + num_bytes, __ATOMIC_RELEASE);
        if (is_new)
            __atomic_store_n(&mappings, mapping, __ATOMIC_RELEASE);
    } else {
        free(copy);
        mapping = NULL;
    }
    pthread_mutex_unlock(&changing);
    return mapping;
}

/* Call this when the mapping ends, because another mapping may get its place. */
void lbsgd_forget(void *mapping)
{
    if (mapping)
        __atomic_store_n(&((struct mapping *)mapping)->end, 0, __ATOMIC_RELEASE);
}
