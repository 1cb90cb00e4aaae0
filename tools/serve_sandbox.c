/* serve_sandbox.c: what medrun-serve gives up before it listens to anybody. Included by serve.c.
 * MIT licence, see LICENSE.
 *
 * Landlock comes before any thread exists, as it binds the thread that calls it and those made
 * later: from then on only the files that were named can be read, nothing can be written or run, no
 * connection can be made, one port can be bound. With it comes what of seccomp loading does not
 * need: execve, ptrace and socket end the process. The rest comes when all is open and all threads
 * run: a list of calls is left. */

#if defined __linux__ && __has_include(<linux/seccomp.h>) && __has_include(<linux/landlock.h>)
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#if defined __x86_64__
#define SANDBOX_ARCH AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define SANDBOX_ARCH AUDIT_ARCH_AARCH64
#endif
#endif

#ifdef SANDBOX_ARCH
/* The kernel's structs may be older here than the kernel: these are those of ABI 4. */
struct rights { uint64_t files, network; };
struct port_rule { uint64_t allowed, port; };

static bool allow_file(int rules, const char *path) {
    struct landlock_path_beneath_attr a = {.allowed_access = LANDLOCK_ACCESS_FS_READ_FILE,
                                           .parent_fd = open(path, O_PATH | O_CLOEXEC)};
    if (a.parent_fd < 0) return false;
    long failed = syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &a, 0);
    close(a.parent_fd);
    return !failed;
}

/* Only the N files of PATHS are left, and PORT. Appends to SAYS what is forbidden. */
static void close_files(const char *const *paths, size_t n, int port, buffer *says) {
    long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
    if (abi < 1) {
        buffer_text(says, "files: all (this kernel has no Landlock); ");
        return;
    }
    struct rights r = {.files = (1ull << (abi < 2 ? 13 : abi < 3 ? 14 : abi < 5 ? 15 : 16)) - 1,
                       .network = abi >= 4 ? 3 : 0};        /* bind and connect                  */
    int rules = (int)syscall(SYS_landlock_create_ruleset, &r, abi >= 4 ? sizeof r : 8, 0);
    bool good = rules >= 0;
    for (size_t i = 0; i < n; i++) good = good && allow_file(rules, paths[i]);
    struct port_rule p = {1, (uint64_t)port};
    if (good && abi >= 4 && port)
        good = !syscall(SYS_landlock_add_rule, rules, 2, &p, 0);
    good = good && !syscall(SYS_landlock_restrict_self, rules, 0);
    if (rules >= 0) close(rules);
    buffer_text(says, good ? "files: only those named can be read, none written; "
                           : "files: all (Landlock refused); ");
    if (good && abi >= 4) buffer_text(says, "connecting: forbidden; ");
}

#define CALL_NUMBER offsetof(struct seccomp_data, nr)
#define LOAD(at) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)(at))
#define GIVE(what) BPF_STMT(BPF_RET | BPF_K, what)

/* All threads may do no more than this; LOADING: only the worst calls are gone, and the rules that
 * follow them are not reached. */
static void close_calls(bool loading, buffer *says) {
    static const short killed[] = {SYS_execve, SYS_execveat, SYS_ptrace, SYS_socket};
    static const short allowed[] = {
        SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_recvfrom, SYS_sendto, SYS_recvmsg,
        SYS_sendmsg, SYS_accept4, SYS_accept, SYS_ppoll, SYS_futex, SYS_munmap, SYS_mremap,
        SYS_madvise, SYS_brk, SYS_clock_gettime, SYS_clock_nanosleep, SYS_nanosleep,
        SYS_gettimeofday, SYS_getrandom, SYS_close, SYS_exit, SYS_exit_group, SYS_rt_sigreturn,
        SYS_rt_sigprocmask, SYS_rt_sigaction, SYS_sched_yield, SYS_getpid, SYS_gettid, SYS_tgkill,
        SYS_getcpu, SYS_set_robust_list, SYS_restart_syscall, SYS_fcntl, SYS_getsockname,
        SYS_setsockopt, SYS_shutdown, SYS_fstat, SYS_lseek, SYS_membarrier,
#ifdef SYS_rseq                                 /* of a thread that is just beginning             */
        SYS_rseq,
#endif
#ifdef SYS_poll
        SYS_poll,
#endif
    };
    struct sock_filter f[192];
    unsigned short n = 0;
    f[n++] = (struct sock_filter)LOAD(offsetof(struct seccomp_data, arch));
    f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SANDBOX_ARCH, 1, 0);
    f[n++] = (struct sock_filter)GIVE(SECCOMP_RET_KILL_PROCESS);
    f[n++] = (struct sock_filter)LOAD(CALL_NUMBER);
    for (size_t i = 0; i < sizeof killed / sizeof *killed; i++) {
        f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)killed[i], 0, 1);
        f[n++] = (struct sock_filter)GIVE(SECCOMP_RET_KILL_PROCESS);
    }
    if (loading) f[n++] = (struct sock_filter)GIVE(SECCOMP_RET_ALLOW);
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed; i++) {
        uint32_t one = (uint32_t)allowed[i];
        f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, one, 0, 1);
        f[n++] = (struct sock_filter)GIVE(SECCOMP_RET_ALLOW);
    }
    for (int map = 0; map < 2; map++) {         /* mapped memory never becomes code              */
        f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
                                              map ? SYS_mmap : SYS_mprotect, 0, 4);
        f[n++] = (struct sock_filter)LOAD(offsetof(struct seccomp_data, args[2]));
        f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 1, 0);
        f[n++] = (struct sock_filter)GIVE(SECCOMP_RET_ALLOW);
        f[n++] = (struct sock_filter)GIVE(SECCOMP_RET_ERRNO | EPERM);
    }
    f[n++] = (struct sock_filter)GIVE(SECCOMP_RET_ERRNO | EPERM);
    struct sock_fprog program = {n, f};
    long failed = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC,
                          &program);
    if (loading) return;
    buffer_text(says, failed ? "calls: all (seccomp refused)"
                             : "calls: no open, exec, ptrace or new socket");
}

static void forget_rights(void) {
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
}
#else
static void close_files(const char *const *paths, size_t n, int port, buffer *says) {
    (void)paths, (void)n, (void)port;
    buffer_text(says, "none on this system");
}
static void close_calls(bool loading, buffer *says) { (void)loading, (void)says; }
static void forget_rights(void) {}
#endif

/* No dump of memory, which has people's words in it. */
static void forbid_dumps(void) {
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    forget_rights();
}

/* For tests: does what the sandbox forbids, and says how that went. */
static int try_sandbox(const char *what) {
    int code = -1;
    if (!strcmp(what, "open")) code = open("/etc/passwd", O_RDONLY);
    else if (!strcmp(what, "write")) code = open("medrun-serve.try", O_WRONLY | O_CREAT, 0600);
    else if (!strcmp(what, "connect")) code = socket(AF_INET, SOCK_STREAM, 0);
    else if (!strcmp(what, "exec")) code = execl("/bin/true", "true", (char *)NULL);
    else return MEDRUN_USAGE;
    fprintf(stderr, "medrun-serve: %s: %s\n", what, code < 0 ? strerror(errno) : "it is possible");
    return code < 0 ? MEDRUN_OK : MEDRUN_FAILED;
}
