/* A library that stands between a process and the C library (LD_PRELOAD), and makes one call fail.

   Calls are counted by kind once the process is armed.  The Nth one of a kind is not made, or only
   half, and fails with a chosen error; where that lasts, so do all that follow.  What was counted,
   and what failed, is read by the parent from memory that both share. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    OPEN, READ, PREAD, WRITE, PWRITE, WRITEV, FSYNC, FDATASYNC, MSYNC, RENAME, LINK, UNLINK, MKDIR,
    RMDIR, FTRUNCATE, FALLOCATE, MMAP, STAT, OPENDIR, READDIR, LOCK, THREAD, FORK, PIPE, DUP, CLOSE,
    RANDOM, MEMORY, UTIME, READLINK, KINDS
};

enum { PATH = 120, RECORDS = 1 << 15 };
#define HALF (-1)

struct record {
    int kind;
    char path[PATH];
};

struct shared {
    long counts[KINDS];
    int hits;
    char hit[PATH];
    long recorded;
    struct record records[RECORDS];
};

static struct shared *shared;
static int armed, wanted_kind, wanted_error, lasting, recording;
static long wanted_number;

struct shared *refusing_shared(void) {
    if (!shared) {
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (shared == MAP_FAILED)
            shared = NULL;
    }
    return shared;
}

void refusing_arm(int kind, long number, int error, int lasts, int records) {
    wanted_kind = kind;
    wanted_number = number;
    wanted_error = error;
    lasting = lasts;
    recording = records;
    armed = 1;
}

/* A process that is to have no threads is armed from its start. */
__attribute__((constructor)) static void begin(void) {
    if (getenv("REFUSING_THREADS") && refusing_shared())
        refusing_arm(THREAD, 1, EAGAIN, 1, 0);
}

static void describe(char *out, int fd, const char *path) {
    char link[64];
    long length = 0;
    if (path) {
        size_t size = strlen(path);  /* the end of a long one tells more */
        strcpy(out, size < PATH ? path : path + size - PATH + 1);
        return;
    }
    if (fd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        length = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH - 1);
    }
    out[length > 0 ? length : 0] = 0;
}

/* The error that a call fails with; 0 where it is made. */
static int refused(int kind, int fd, const char *path) {
    if (!armed || !shared)
        return 0;
    int saved = errno;
    long number = __atomic_add_fetch(&shared->counts[kind], 1, __ATOMIC_SEQ_CST);
    if (recording) {
        long at = __atomic_fetch_add(&shared->recorded, 1, __ATOMIC_SEQ_CST);
        if (at < RECORDS) {
            describe(shared->records[at].path, fd, path);
            shared->records[at].kind = kind;
        }
    }
    int hit = kind == wanted_kind && (number == wanted_number || (lasting && number > wanted_number));
    if (hit && __atomic_fetch_add(&shared->hits, 1, __ATOMIC_SEQ_CST) == 0)
        describe(shared->hit, fd, path);
    errno = saved;
    return hit ? wanted_error : 0;
}

#define REAL(name) ((__typeof__(&name))real(&name##_, #name))

static void *real(void **known, const char *name) {
    if (!*known)
        *known = dlsym(RTLD_NEXT, name);
    return *known;
}

#define WRAP(kind, result, bad, name, parameters, arguments, fd, path)                             \
    static void *name##_;                                                                          \
    result name parameters {                                                                       \
        int error = refused(kind, fd, path);                                                       \
        if (error) {                                                                               \
            errno = error == HALF ? EIO : error;                                                   \
            return bad;                                                                            \
        }                                                                                          \
        return REAL(name) arguments;                                                               \
    }

#define SOME(kind, name, parameters, arguments, halved)                                            \
    static void *name##_;                                                                          \
    ssize_t name parameters {                                                                      \
        int error = refused(kind, fd, NULL);                                                       \
        if (error == HALF && size > 1)                                                             \
            return REAL(name) halved;                                                              \
        if (error > 0) {                                                                           \
            errno = error;                                                                         \
            return -1;                                                                             \
        }                                                                                          \
        return REAL(name) arguments;                                                               \
    }

/* open and its like, with or without the folder (`at`) that a path starts from */
#define OPENING(name, arguments, passed)                                                           \
    static void *name##_;                                                                          \
    int name arguments {                                                                           \
        mode_t mode = 0;                                                                           \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                       \
            va_list list;                                                                          \
            va_start(list, flags);                                                                 \
            mode = va_arg(list, mode_t);                                                           \
            va_end(list);                                                                          \
        }                                                                                          \
        int error = refused(OPEN, -1, path);                                                       \
        if (error) {                                                                               \
            errno = error;                                                                         \
            return -1;                                                                             \
        }                                                                                          \
        return REAL(name) passed;                                                                  \
    }

#define OPENS(name) OPENING(name, (const char *path, int flags, ...), (path, flags, mode))
#define OPENS_AT(name)                                                                             \
    OPENING(name, (int at, const char *path, int flags, ...), (at, path, flags, mode))

#define FCNTL(name)                                                                                \
    static void *name##_;                                                                          \
    int name(int fd, int command, ...) {                                                           \
        va_list list;                                                                              \
        va_start(list, command);                                                                   \
        void *argument = va_arg(list, void *);                                                     \
        va_end(list);                                                                              \
        int error = 0;                                                                             \
        switch (command) {                                                                         \
        case F_SETLK: case F_SETLKW: case F_OFD_SETLK: case F_OFD_SETLKW:                          \
            error = refused(LOCK, fd, NULL);                                                       \
            break;                                                                                 \
        case F_DUPFD: case F_DUPFD_CLOEXEC:                                                        \
            error = refused(DUP, fd, NULL);                                                        \
            break;                                                                                 \
        }                                                                                          \
        if (error) {                                                                               \
            errno = error;                                                                         \
            return -1;                                                                             \
        }                                                                                          \
        return REAL(name)(fd, command, argument);                                                  \
    }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
WRAP(OPEN, FILE *, NULL, fopen, (const char *path, const char *mode), (path, mode), -1, path)
WRAP(OPEN, FILE *, NULL, fopen64, (const char *path, const char *mode), (path, mode), -1, path)

SOME(READ, read, (int fd, void *data, size_t size), (fd, data, size), (fd, data, size / 2))
SOME(PREAD, pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at),
     (fd, data, size / 2, at))
SOME(PREAD, pread64, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at),
     (fd, data, size / 2, at))
SOME(WRITE, write, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, size / 2))
SOME(PWRITE, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at),
     (fd, data, size / 2, at))
SOME(PWRITE, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at),
     (fd, data, size / 2, at))
WRAP(WRITEV, ssize_t, -1, writev, (int fd, const struct iovec *rows, int count), (fd, rows, count),
     fd, NULL)

WRAP(FSYNC, int, -1, fsync, (int fd), (fd), fd, NULL)
WRAP(FDATASYNC, int, -1, fdatasync, (int fd), (fd), fd, NULL)
WRAP(MSYNC, int, -1, msync, (void *at, size_t size, int flags), (at, size, flags), -1, NULL)
WRAP(RENAME, int, -1, rename, (const char *old, const char *new), (old, new), -1, new)
WRAP(RENAME, int, -1, renameat, (int a, const char *old, int b, const char *new), (a, old, b, new),
     -1, new)
WRAP(RENAME, int, -1, renameat2,
     (int a, const char *old, int b, const char *new, unsigned flags), (a, old, b, new, flags), -1,
     new)
WRAP(LINK, int, -1, link, (const char *old, const char *new), (old, new), -1, new)
WRAP(LINK, int, -1, linkat, (int a, const char *old, int b, const char *new, int flags),
     (a, old, b, new, flags), -1, new)
WRAP(LINK, int, -1, symlink, (const char *to, const char *path), (to, path), -1, path)
WRAP(UNLINK, int, -1, unlink, (const char *path), (path), -1, path)
WRAP(UNLINK, int, -1, unlinkat, (int at, const char *path, int flags), (at, path, flags), -1, path)
WRAP(MKDIR, int, -1, mkdir, (const char *path, mode_t mode), (path, mode), -1, path)
WRAP(MKDIR, int, -1, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), -1, path)
WRAP(RMDIR, int, -1, rmdir, (const char *path), (path), -1, path)
WRAP(FTRUNCATE, int, -1, ftruncate, (int fd, off_t size), (fd, size), fd, NULL)
WRAP(FTRUNCATE, int, -1, ftruncate64, (int fd, off64_t size), (fd, size), fd, NULL)
WRAP(FALLOCATE, int, -1, fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size),
     fd, NULL)
WRAP(FALLOCATE, int, error, posix_fallocate, (int fd, off_t at, off_t size), (fd, at, size), fd,
     NULL)
WRAP(FALLOCATE, int, error, posix_fallocate64, (int fd, off64_t at, off64_t size), (fd, at, size),
     fd, NULL)
WRAP(MMAP, void *, MAP_FAILED, mmap,
     (void *at, size_t size, int protection, int flags, int fd, off_t offset),
     (at, size, protection, flags, fd, offset), fd, NULL)
WRAP(MMAP, void *, MAP_FAILED, mmap64,
     (void *at, size_t size, int protection, int flags, int fd, off64_t offset),
     (at, size, protection, flags, fd, offset), fd, NULL)
WRAP(MEMORY, int, -1, memfd_create, (const char *name, unsigned flags), (name, flags), -1, name)
WRAP(STAT, int, -1, fstat, (int fd, struct stat *out), (fd, out), fd, NULL)
WRAP(STAT, int, -1, fstat64, (int fd, struct stat64 *out), (fd, out), fd, NULL)
WRAP(STAT, int, -1, stat, (const char *path, struct stat *out), (path, out), -1, path)
WRAP(STAT, int, -1, stat64, (const char *path, struct stat64 *out), (path, out), -1, path)
WRAP(STAT, int, -1, lstat, (const char *path, struct stat *out), (path, out), -1, path)
WRAP(STAT, int, -1, lstat64, (const char *path, struct stat64 *out), (path, out), -1, path)
WRAP(STAT, int, -1, fstatat, (int at, const char *path, struct stat *out, int flags),
     (at, path, out, flags), -1, path)
WRAP(STAT, int, -1, fstatat64, (int at, const char *path, struct stat64 *out, int flags),
     (at, path, out, flags), -1, path)
WRAP(OPENDIR, DIR *, NULL, opendir, (const char *path), (path), -1, path)
WRAP(OPENDIR, DIR *, NULL, fdopendir, (int fd), (fd), fd, NULL)
WRAP(READDIR, struct dirent *, NULL, readdir, (DIR *folder), (folder), dirfd(folder), NULL)
WRAP(READDIR, struct dirent64 *, NULL, readdir64, (DIR *folder), (folder), dirfd(folder), NULL)
WRAP(LOCK, int, -1, flock, (int fd, int operation), (fd, operation), fd, NULL)
FCNTL(fcntl)
FCNTL(fcntl64)
WRAP(THREAD, int, error, pthread_create,
     (pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument),
     (thread, attributes, run, argument), -1, NULL)
WRAP(FORK, pid_t, -1, fork, (void), (), -1, NULL)
WRAP(PIPE, int, -1, pipe, (int ends[2]), (ends), -1, NULL)
WRAP(PIPE, int, -1, pipe2, (int ends[2], int flags), (ends, flags), -1, NULL)
WRAP(DUP, int, -1, dup, (int fd), (fd), fd, NULL)
WRAP(DUP, int, -1, dup2, (int fd, int to), (fd, to), fd, NULL)
WRAP(DUP, int, -1, dup3, (int fd, int to, int flags), (fd, to, flags), fd, NULL)
WRAP(RANDOM, ssize_t, -1, getrandom, (void *data, size_t size, unsigned flags),
     (data, size, flags), -1, NULL)
WRAP(UTIME, int, -1, utimensat, (int at, const char *path, const struct timespec times[2], int flags),
     (at, path, times, flags), -1, path)
WRAP(UTIME, int, -1, futimens, (int fd, const struct timespec times[2]), (fd, times), fd, NULL)
WRAP(READLINK, ssize_t, -1, readlink, (const char *path, char *out, size_t size), (path, out, size),
     -1, path)
WRAP(READLINK, ssize_t, -1, readlinkat, (int at, const char *path, char *out, size_t size),
     (at, path, out, size), -1, path)

static void *close_;
int close(int fd) {  /* a descriptor is closed, whatever is said of its file */
    int error = refused(CLOSE, fd, NULL);
    int done = REAL(close)(fd);
    if (error) {
        errno = error;
        return -1;
    }
    return done;
}
