/* Threads that share out the items of one piece of work after the other. */
#ifndef SPECRAG_POOL_H
#define SPECRAG_POOL_H

#include <stdint.h>

/* Call ``task(context, i)`` for every i below ``count``, in any order, and return when all are done.
 *
 * The caller works too, and waits only for items that another thread has begun: a thread that the system does not
 * schedule delays nobody. Calls from several threads take turns.
 */
void pool_run(void (*task)(void *context, int64_t index), void *context, int64_t count);

/* How many threads work, the caller included. */
int64_t pool_threads(void);
void pool_set_threads(int64_t threads);

#endif
