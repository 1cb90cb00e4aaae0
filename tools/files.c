/* What the tools that write ask of the system beyond section 2 of medrun.c, for a file opened
 * TO_UPDATE. A tool includes this file after medrun.c. MIT licence, see LICENSE. */

#ifndef _WIN32
#include <sys/file.h>

/* Only one program at a time may hold it; the lock ends with FD. */
static int lock_file(int fd) { return flock(fd, LOCK_EX | LOCK_NB); }

static int set_length(int fd, uint64_t bytes) { return ftruncate(fd, (off_t)bytes); }
#else
static int lock_file(int fd) { return (void)fd, 0; }    /* nobody else could open it             */

static int set_length(int fd, uint64_t bytes) {
    FILE_END_OF_FILE_INFO i = {.EndOfFile.QuadPart = (LONGLONG)bytes};
    HANDLE h = (HANDLE)_get_osfhandle(fd);
    return SetFileInformationByHandle(h, FileEndOfFileInfo, &i, sizeof i) ? 0 : windows_failed();
}
#endif
