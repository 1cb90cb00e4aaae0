/* What the tools that write ask of the system beyond section 2 of medrun.c. A tool includes this
 * file after medrun.c. MIT licence, see LICENSE. */

#ifndef _WIN32
static int set_length(int fd, uint64_t bytes) {
    int code;
    do code = ftruncate(fd, (off_t)bytes);
    while (code && errno == EINTR);
    return code;
}
#else
static int set_length(int fd, uint64_t bytes) {
    FILE_END_OF_FILE_INFO i = {.EndOfFile.QuadPart = (LONGLONG)bytes};
    HANDLE h = (HANDLE)_get_osfhandle(fd);
    return SetFileInformationByHandle(h, FileEndOfFileInfo, &i, sizeof i) ? 0 : windows_failed();
}
#endif
