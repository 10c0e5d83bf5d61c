/* A disk that fails, or a power cut, at a chosen moment: loaded before a process (LD_PRELOAD), it counts what the process
 * does to files under one folder, and the n-th time kills the process, or fails with an error number from then on.
 * A write that is hit is half done first.
 *
 *   fault_arm(folder, at, error, times)   error 0 kills; times < 0 fails for ever; at 0 only counts
 *   fault_count()                         what was counted since
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[PATH_MAX];
static long at, count;
static int fails, times;

void fault_arm(const char *folder, long n, int error, int how_often) {
    snprintf(under, sizeof under, "%s", folder);
    at = n, fails = error, times = how_often, count = 0;
}
long fault_count(void) { return count; }

static int mine(const char *path) {
    char whole[PATH_MAX];
    if (!under[0] || !path) return 0;
    if (path[0] == '/') return !strncmp(path, under, strlen(under));
    if (!getcwd(whole, sizeof whole)) return 0;
    size_t used = strlen(whole);
    snprintf(whole + used, sizeof whole - used, "/%s", path);
    return !strncmp(whole, under, strlen(under));
}
static int mine_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!under[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return mine(path);
}
/* Whether this operation is hit: then with errno set, or with no return at all. */
static int hit(void) {
    count++;
    if (!at || count < at) return 0;
    if (!fails) { kill(getpid(), SIGKILL); for (;;) pause(); }
    if (times >= 0 && count >= at + times) return 0;
    errno = fails;
    return 1;
}
static int now(void) { return at && count + 1 == at; }

#define REAL(name, type, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write, ssize_t, int, const void *, size_t);
    if (!mine_fd(fd)) return real(fd, data, size);
    if (now() && size > 1) real(fd, data, size / 2);
    return hit() ? -1 : real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev, ssize_t, int, const struct iovec *, int);
    if (mine_fd(fd) && hit()) return -1;
    return real(fd, parts, n);
}
#define SYNC(name) int name(int fd) { REAL(name, int, int); return mine_fd(fd) && hit() ? -1 : real(fd); }
SYNC(fsync)
SYNC(fdatasync)
#define RENAME(name) int name(const char *a, const char *b) { REAL(name, int, const char *, const char *); return (mine(a) || mine(b)) && hit() ? -1 : real(a, b); }
RENAME(rename)
#define ONE(name) int name(const char *a) { REAL(name, int, const char *); return mine(a) && hit() ? -1 : real(a); }
ONE(unlink)
ONE(rmdir)
int unlinkat(int dir, const char *a, int flags) {
    REAL(unlinkat, int, int, const char *, int);
    return (a[0] == '/' ? mine(a) : mine_fd(dir)) && hit() ? -1 : real(dir, a, flags);
}
int mkdir(const char *a, mode_t mode) {
    REAL(mkdir, int, const char *, mode_t);
    return mine(a) && hit() ? -1 : real(a, mode);
}
#define CUT(name, type) int name(int fd, type size) { REAL(name, int, int, type); return mine_fd(fd) && hit() ? -1 : real(fd, size); }
CUT(ftruncate, off_t)
CUT(ftruncate64, off64_t)
#define CUT_AT(name, type) int name(const char *a, type size) { REAL(name, int, const char *, type); return mine(a) && hit() ? -1 : real(a, size); }
CUT_AT(truncate, off_t)
CUT_AT(truncate64, off64_t)
#define OPEN(name) int name(const char *a, int flags, ...) { \
    REAL(name, int, const char *, int, ...); \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && mine(a) && hit() ? -1 : real(a, flags, mode); }
OPEN(open)
OPEN(open64)
