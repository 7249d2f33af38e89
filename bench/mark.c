/* Ends a stretch of instructions, for guard.py: callgrind writes what it has counted since the last mark, and begins
 * again. It does not count before the first one, so that a daemon starts in seconds. */
#include <valgrind/callgrind.h>

void mark(void)
{
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_DUMP_STATS;
}
