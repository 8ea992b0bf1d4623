#define _GNU_SOURCE
#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

#define MOST_THREADS 64
/* How long a thread without work looks for some before it sleeps: longer than the gaps within a step. */
#define SPIN_NANOSECONDS 100000
/* How often the caller looks whether the others are done before it lets another process run. */
#define PATIENCE 20000

/* The current work. ``ticket`` is (its number << 32) + the next item, so that nobody takes an item of another work. */
static struct {
    _Atomic uint64_t ticket;
    _Atomic int64_t done;
    _Atomic uint32_t number; /* what workers without work look at */
    _Atomic int32_t sleepers;
    _Atomic int64_t threads;
    _Atomic int64_t started;
    void (*_Atomic task)(void *, int64_t);
    void *_Atomic context;
    _Atomic int64_t count;
} work;

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER, sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

/* Take items of work ``number`` until none is left. */
static void take_items(uint32_t number)
{
    for (;;) {
        uint64_t ticket = atomic_load(&work.ticket);
        void (*task)(void *, int64_t) = atomic_load(&work.task);
        void *context = atomic_load(&work.context);
        const int64_t count = atomic_load(&work.count), item = (int64_t)(ticket & 0xffffffff);
        /* What was read belongs to the ticket if the ticket is still there: it is set last and cleared first. */
        if ((uint32_t)(ticket >> 32) != number || item >= count)
            return;
        if (!atomic_compare_exchange_weak(&work.ticket, &ticket, ticket + 1))
            continue;
        task(context, item);
        atomic_fetch_add(&work.done, 1);
    }
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Wait until the number is another than ``seen``; returns it. */
static uint32_t next_work(uint32_t seen)
{
    uint32_t number;
    const int64_t until = nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 64; i++) {
            number = atomic_load(&work.number);
            if (number != seen)
                return number;
            _mm_pause();
        }
    } while (nanoseconds() < until);
    pthread_mutex_lock(&sleeping);
    atomic_fetch_add(&work.sleepers, 1);
    while ((number = atomic_load(&work.number)) == seen)
        pthread_cond_wait(&wake, &sleeping);
    atomic_fetch_sub(&work.sleepers, 1);
    pthread_mutex_unlock(&sleeping);
    return number;
}

static void *worker(void *argument)
{
    const int64_t own = (int64_t)(intptr_t)argument;
    uint32_t seen = 0;
    for (;;) {
        seen = next_work(seen);
        if (own < atomic_load(&work.threads))
            take_items(seen);
    }
    return NULL;
}

/* A child of fork has none of the threads: it works alone, until it starts its own. */
static void in_child(void)
{
    pthread_mutex_init(&turn, NULL);
    pthread_mutex_init(&sleeping, NULL);
    pthread_cond_init(&wake, NULL);
    atomic_store(&work.started, 1);
    atomic_store(&work.sleepers, 0);
}

static void start_threads(int64_t wanted)
{
    static int watching;
    if (!watching) {
        pthread_atfork(NULL, NULL, in_child);
        watching = 1;
    }
    for (int64_t i = atomic_load(&work.started); i < wanted; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)i) != 0)
            return; /* fewer serve as well */
        pthread_detach(thread);
        atomic_store(&work.started, i + 1);
    }
}

void pool_set_threads(int64_t threads)
{
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    pthread_mutex_lock(&turn);
    if (atomic_load(&work.started) == 0)
        atomic_store(&work.started, 1); /* the caller */
    atomic_store(&work.threads, threads);
    pthread_mutex_unlock(&turn);
}

int64_t pool_threads(void)
{
    const int64_t threads = atomic_load(&work.threads);
    return threads < 1 ? 1 : threads;
}

void pool_run(void (*task)(void *, int64_t), void *context, int64_t count)
{
    if (count <= 0)
        return;
    const int64_t threads = pool_threads();
    if (threads == 1 || count == 1) {
        for (int64_t i = 0; i < count; i++)
            task(context, i);
        return;
    }
    pthread_mutex_lock(&turn);
    if (atomic_load(&work.started) < threads)
        start_threads(threads);
    const uint32_t number = atomic_load(&work.number) + 1;
    atomic_store(&work.task, task);
    atomic_store(&work.context, context);
    atomic_store(&work.count, count);
    atomic_store(&work.done, 0);
    atomic_store(&work.ticket, (uint64_t)number << 32);
    atomic_store(&work.number, number);
    if (atomic_load(&work.sleepers) > 0) {
        pthread_mutex_lock(&sleeping);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleeping);
    }
    take_items(number);
    for (int64_t looked = 0; atomic_load(&work.done) < count; looked++) {
        _mm_pause();
        if (looked > PATIENCE)
            sched_yield();
    }
    /* Nobody may take this ticket for the next work's, whose fields are about to be written. */
    atomic_store(&work.ticket, 0);
    pthread_mutex_unlock(&turn);
}
