/* Preloaded: once armed, counts what a process does to its disk, and ends the process before the Nth such call (a
   kill), or lets that call and every later one fail with an error (a full or broken disk). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static volatile long count, stop;
static volatile int failure;

/* The Nth call from now on, counted from 1; 0 only counts. error: errno, or 0 for a kill. */
void shim_arm(long nth, int error) { count = 0; stop = nth; failure = error; }
long shim_count(void) { return count; }

/* Pipes and terminals are not on the disk, nor are files without a name: they lie in memory. */
static int on_disk(int fd)
{
    struct stat about;
    return fd < 0 || (!fstat(fd, &about) && S_ISREG(about.st_mode) && about.st_nlink);
}

static int refused(int fd)
{
    if (!on_disk(fd)) return 0;
    long now = __sync_add_and_fetch(&count, 1);
    if (!stop || now < stop) return 0;
    if (!failure) _exit(77);
    errno = failure;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, fd, parameters, arguments) \
    type name parameters { return refused(fd) ? (type)-1 : REAL(name) arguments; }

WRAP(ssize_t, pwrite, fd, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRAP(ssize_t, pwrite64, fd, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRAP(ssize_t, write, fd, (int fd, const void *data, size_t size), (fd, data, size))
WRAP(int, ftruncate, fd, (int fd, off_t size), (fd, size))
WRAP(int, ftruncate64, fd, (int fd, off64_t size), (fd, size))
WRAP(int, fsync, fd, (int fd), (fd))
WRAP(int, rename, -1, (const char *from, const char *to), (from, to))
