/* What the tools that write ask of the system beyond section 2 of medrun.c. A tool includes this
 * file after medrun.c. MIT licence, see LICENSE. */

#ifndef _WIN32
/* Opens PATH to read and go on writing; where nothing is there, it makes a file for its owner. */
__attribute__((unused)) static int open_update(const char *path) {
    int fd;
    do fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    while (fd < 0 && errno == EINTR);
    return fd;
}

static int set_length(int fd, uint64_t bytes) {
    int code;
    do code = ftruncate(fd, (off_t)bytes);
    while (code && errno == EINTR);
    return code;
}
#else
/* The same; nobody else may write it at that time. */
__attribute__((unused)) static int open_update(const char *path) {
    wchar_t room[WIDE_PATH], *name = wide_path(path, room);
    DWORD access = GENERIC_READ | GENERIC_WRITE, share = FILE_SHARE_READ | FILE_SHARE_DELETE;
    if (!name) return -1;
    HANDLE h = CreateFileW(name, access, share, NULL, OPEN_ALWAYS, FILE_FLAG_BACKUP_SEMANTICS,
                           NULL);
    return h == INVALID_HANDLE_VALUE ? windows_failed() : _open_osfhandle((intptr_t)h, _O_BINARY);
}

static int set_length(int fd, uint64_t bytes) {
    FILE_END_OF_FILE_INFO i = {.EndOfFile.QuadPart = (LONGLONG)bytes};
    HANDLE h = (HANDLE)_get_osfhandle(fd);
    return SetFileInformationByHandle(h, FileEndOfFileInfo, &i, sizeof i) ? 0 : windows_failed();
}
#endif
