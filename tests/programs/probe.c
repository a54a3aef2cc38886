/*
 * probe: the one helper program of the black-box suite. Static, no stdio buffering, so that what it does is what a
 * test sees. It runs on both sides: inside containers (what does a process find there?) and on the host (race
 * attacker, receiver of a console). Each subcommand prints plain lines; see usage() at the end.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define RENAME_EXCHANGE_FLAG 2

static void say(const char *format, ...)
{
    char line[8192];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n > (int)sizeof line)
        n = sizeof line;
    for (int done = 0; done < n;) {
        ssize_t w = write(1, line + done, n - done);
        if (w < 0)
            _exit(3);
        done += w;
    }
}

static int fail(const char *what)
{
    say("error: %s: %s\n", what, strerror(errno));
    return 1;
}

/* fds: every open descriptor but the one that lists them. */
static int fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    if (!dir)
        return fail("/proc/self/fd");
    for (struct dirent *e; (e = readdir(dir));) {
        char path[64], target[4096];
        if (e->d_name[0] == '.' || atoi(e->d_name) == dirfd(dir))
            continue;
        snprintf(path, sizeof path, "/proc/self/fd/%.20s", e->d_name);
        ssize_t n = readlink(path, target, sizeof target - 1);
        target[n < 0 ? 0 : n] = 0;
        say("%s %s\n", e->d_name, target);
    }
    return 0;
}

/* syscall NR [ARG...]: numbers in any base, or s:TEXT for a pointer to TEXT. */
static int raw_syscall(int n, char **v)
{
    long a[7] = {0};
    for (int i = 0; i < n && i < 7; i++)
        a[i] = strncmp(v[i], "s:", 2) ? (long)strtoull(v[i], NULL, 0) : (long)(v[i] + 2);
    errno = 0;
    long r = syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    say("ret=%ld errno=%d\n", r, r == -1 ? errno : 0);
    return 0;
}

#ifdef __x86_64__
/* int80 NR: the 32-bit entry, as a program for another architecture would use it. */
static int int80(long nr)
{
    long r;
    __asm__ volatile("int $0x80" : "=a"(r) : "a"(nr), "b"(0), "c"(0), "d"(0) : "memory", "r8", "r9", "r10", "r11");
    say("ret=%ld\n", r);
    return 0;
}
#endif

/* fork N: how many children could be made; they live until all are counted. */
static int fork_many(int n)
{
    int made = 0, error = 0, gate[2];
    char c;
    if (pipe(gate))
        return fail("pipe");
    for (int i = 0; i < n; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            close(gate[1]);
            _exit(read(gate[0], &c, 1) != 0);
        }
        if (pid < 0) {
            error = errno;
            break;
        }
        made++;
    }
    say("made=%d errno=%d\n", made, error);
    close(gate[1]);
    while (wait(NULL) > 0)
        ;
    return 0;
}

/* mem BYTES: touch that much anonymous memory. */
static int mem(size_t size)
{
    char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return fail("mmap");
    for (size_t i = 0; i < size; i += 4096)
        p[i] = 1;
    say("touched=%zu\n", size);
    return 0;
}

static int listen_at(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (strlen(path) >= sizeof addr.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(addr.sun_path, path);
    if (s < 0 || bind(s, (void *)&addr, sizeof addr) || listen(s, 8))
        return -1;
    return s;
}

/*
 * console SOCKET [ROWS COLS]: receive one descriptor the way a container engine does, say what came with it, set the
 * window size when asked, then copy: terminal to stdout, stdin to terminal, until the terminal hangs up.
 */
static int console(int argc, char **v)
{
    int s = listen_at(v[0]);
    if (s < 0)
        return fail("listen");
    say("ready\n");
    int c = accept4(s, NULL, NULL, SOCK_CLOEXEC);
    if (c < 0)
        return fail("accept");
    char name[4097] = {0};
    union {
        char buf[CMSG_SPACE(sizeof(int) * 8)];
        struct cmsghdr align;
    } control;
    struct iovec iov = {name, sizeof name - 1};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof control.buf};
    ssize_t n = recvmsg(c, &msg, MSG_CMSG_CLOEXEC);
    struct cmsghdr *h = n < 0 ? NULL : CMSG_FIRSTHDR(&msg);
    int count = h && h->cmsg_type == SCM_RIGHTS ? (int)((h->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
    say("name=%s fds=%d\n", name, count);
    if (count < 1)
        return 1;
    int tty;
    memcpy(&tty, CMSG_DATA(h), sizeof tty);
    if (argc == 3) {
        struct winsize w = {.ws_row = atoi(v[1]), .ws_col = atoi(v[2])};
        if (ioctl(tty, TIOCSWINSZ, &w))
            return fail("TIOCSWINSZ");
    }
    struct pollfd p[2] = {{tty, POLLIN, 0}, {0, POLLIN, 0}};
    for (char buf[4096];;) {
        if (poll(p, 2, -1) < 0)
            return fail("poll");
        if (p[0].revents) {
            n = read(tty, buf, sizeof buf);
            if (n <= 0)
                return 0;
            if (write(1, buf, n) != n)
                return 1;
        } else if (p[1].revents) {
            n = read(0, buf, sizeof buf);
            if (n <= 0)
                p[1].fd = -1;
            else if (write(tty, buf, n) != n)
                return 1;
        }
    }
}

/* pty CMD...: run CMD on a terminal of its own and copy what it prints; exit as it does. */
static int pty(char **v)
{
    int m = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (m < 0 || grantpt(m) || unlockpt(m))
        return fail("openpt");
    struct winsize w = {.ws_row = 33, .ws_col = 77};
    ioctl(m, TIOCSWINSZ, &w);
    char name[64];
    if (ptsname_r(m, name, sizeof name))
        return fail("ptsname");
    pid_t pid = fork();
    if (pid == 0) {
        setsid();
        int s = open(name, O_RDWR);
        if (s < 0 || dup2(s, 0) < 0 || dup2(s, 1) < 0 || dup2(s, 2) < 0)
            _exit(126);
        if (s > 2)
            close(s);
        ioctl(0, TIOCSCTTY, 0);
        execvp(v[0], v);
        _exit(127);
    }
    char buf[4096];
    for (ssize_t n; (n = read(m, buf, sizeof buf)) > 0;)
        if (write(1, buf, n) != n)
            break;
    int st = 0;
    waitpid(pid, &st, 0);
    return WIFEXITED(st) ? WEXITSTATUS(st) : 128 + WTERMSIG(st);
}

/* tty: what a process on a terminal sees. */
static int tty_info(void)
{
    struct winsize w = {0};
    char name[256] = "none", link[256] = "";
    ttyname_r(0, name, sizeof name);
    ssize_t n = readlink("/proc/self/fd/0", link, sizeof link - 1);
    link[n < 0 ? 0 : n] = 0;
    ioctl(0, TIOCGWINSZ, &w);
    struct stat st = {0};
    fstat(0, &st);
    say("isatty=%d%d%d name=%s link=%s rows=%d cols=%d session=%d foreground=%d uid=%d\n", isatty(0), isatty(1),
        isatty(2), name, link, w.ws_row, w.ws_col, getsid(0) == getpid(), tcgetpgrp(0) == getpgrp(), (int)st.st_uid);
    return 0;
}

/* inherited: what a parent may leave behind in a process besides descriptors. */
static int inherited(void)
{
    stack_t st;
    sigaltstack(NULL, &st);
    sigset_t mask;
    sigprocmask(SIG_SETMASK, NULL, &mask);
    int blocked = 0, ignored = 0, handled = 0;
    for (int i = 1; i < 65; i++) {
        struct sigaction old;
        if (sigismember(&mask, i) == 1)
            blocked++;
        if (sigaction(i, NULL, &old))
            continue;
        if (old.sa_handler == SIG_IGN)
            ignored++;
        else if (old.sa_handler != SIG_DFL)
            handled++;
    }
    int death = -1;
    prctl(PR_GET_PDEATHSIG, &death);
    say("blocked=%d ignored=%d handled=%d altstack=%d timerslack=%d deathsig=%d keepcaps=%d securebits=%d dumpable=%d\n",
        blocked, ignored, handled, !(st.ss_flags & SS_DISABLE), prctl(PR_GET_TIMERSLACK), death,
        prctl(PR_GET_KEEPCAPS), prctl(PR_GET_SECUREBITS), prctl(PR_GET_DUMPABLE));
    return 0;
}

/* keyring: the description of the session keyring (keyctl DESCRIBE @s). */
static int keyring(void)
{
    char text[512] = {0};
    if (syscall(SYS_keyctl, 6L, -3L, text, sizeof text) < 0)
        return fail("keyctl");
    say("%s\n", text);
    return 0;
}

/* ignore-all: run CMD with every signal ignored and blocked that can be, as a careless caller might. */
static int ignore_all(char **v)
{
    sigset_t all;
    for (int i = 1; i < 65; i++)
        signal(i, SIG_IGN);
    /* SIGCHLD stays: ignoring it changes what wait() means, which is not what this is about */
    signal(SIGCHLD, SIG_DFL);
    sigfillset(&all);
    sigdelset(&all, SIGCHLD);
    sigprocmask(SIG_SETMASK, &all, NULL);
    prctl(PR_SET_TIMERSLACK, 123456);
    execvp(v[0], v);
    return fail(v[0]);
}

/* open-fds N CMD...: run CMD with descriptors 3..3+N open (inheritable), N of them on the host's root directory. */
static int open_fds(int n, char **v)
{
    for (int i = 0; i < n; i++)
        if (open("/", O_RDONLY | O_DIRECTORY) < 0)
            return fail("open");
    execvp(v[0], v);
    return fail(v[0]);
}

/* exchange A B: swap two names for ever, as an attacker with a shared volume does. */
static int exchange(const char *a, const char *b)
{
    say("ready\n");
    for (;;)
        if (syscall(SYS_renameat2, AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE_FLAG) && errno != ENOENT)
            return fail("renameat2");
}

/*
 * hunt OWN...: for ever, try to get at every other process that appears: its descriptors above 2, its program, its
 * memory. Programs whose path is among OWN are the container's own; anything else that can be read is a find.
 */
static int hunt(int argc, char **own)
{
    pid_t self = getpid();
    long looked = 0, denied = 0;
    say("ready\n");
    for (;;) {
        DIR *proc = opendir("/proc");
        if (!proc)
            return fail("/proc");
        for (struct dirent *e; (e = readdir(proc));) {
            char path[300], exe[4096];
            int pid = atoi(e->d_name), known = 0;
            if (pid <= 1 || pid == self)
                continue;
            looked++;
            snprintf(path, sizeof path, "/proc/%d/exe", pid);
            ssize_t n = readlink(path, exe, sizeof exe - 1);
            if (n < 0 && (errno == EACCES || errno == EPERM))
                denied++;
            if (n > 0) {
                exe[n] = 0;
                for (int i = 0; i < argc; i++)
                    known |= !strcmp(exe, own[i]);
                if (!known) {
                    say("find: %s is %s\n", path, exe);
                    int fd = open(path, O_RDONLY);
                    if (fd >= 0) {
                        say("find: opened it\n");
                        close(fd);
                    }
                    if (!syscall(SYS_ptrace, 0x4206L /* PTRACE_SEIZE */, (long)pid, 0L, 0L))
                        say("find: seized %d\n", pid);
                }
            }
            for (int fd = 3; fd < 24; fd++) {
                snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
                n = readlink(path, exe, sizeof exe - 1);
                if (n > 0) {
                    exe[n] = 0;
                    say("find: %s is %s\n", path, exe);
                }
            }
        }
        closedir(proc);
        if (looked && looked % 256 == 0)
            say("looked=%ld denied=%ld\n", looked, denied);
    }
}

/* overwrite-exe: try to open for writing the program of every process in sight, also through an O_PATH handle. */
static int overwrite_exe(void)
{
    DIR *proc = opendir("/proc");
    if (!proc)
        return fail("/proc");
    for (struct dirent *e; (e = readdir(proc));) {
        char path[64], name[4096];
        int pid = atoi(e->d_name);
        if (pid <= 0)
            continue;
        snprintf(path, sizeof path, "/proc/%d/exe", pid);
        ssize_t n = readlink(path, name, sizeof name - 1);
        name[n < 0 ? 0 : n] = 0;
        int handle = open(path, O_PATH | O_CLOEXEC);
        int direct = open(path, O_RDWR | O_CLOEXEC);
        int error = errno, again = -1;
        if (handle >= 0) {
            snprintf(path, sizeof path, "/proc/self/fd/%d", handle);
            again = open(path, O_WRONLY | O_CLOEXEC);
        }
        say("pid=%d exe=%s handle=%d direct=%d errno=%d again=%d\n", pid, name, handle >= 0, direct >= 0, error,
            again >= 0);
    }
    return 0;
}

/* The rest of the words is run on a kernel that lacks one system call or denies it: it and its children get the error. */
static int without(const char *call, const char *error, char **command)
{
    static const struct { const char *name; unsigned number; } calls[] = {
        {"bpf", SYS_bpf}, {"keyctl", SYS_keyctl}, {"mknodat", SYS_mknodat}, {"open_tree", SYS_open_tree},
    };
    static const struct { const char *name; unsigned number; } errors[] = {
        {"EINVAL", EINVAL}, {"ENOSYS", ENOSYS}, {"EPERM", EPERM},
    };
    unsigned number = 0, answer = 0;
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!strcmp(call, calls[i].name))
            number = calls[i].number;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (!strcmp(error, errors[i].name))
            answer = errors[i].number;
    if (!number || !answer)
        return 2;
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0 /* the number */),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | answer),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) != 0) {
        say("error: seccomp: %s\n", strerror(errno));
        return 1;
    }
    execvp(command[0], command);
    say("error: %s: %s\n", command[0], strerror(errno));
    return 127;
}

static int usage(void)
{
    say("usage: probe fds | syscall NR ARG... | int80 NR | fork N | mem BYTES | console SOCKET [ROWS COLS] | pty CMD... |\n"
        "       tty | inherited | keyring | ignore-all CMD... | open-fds N CMD... | exchange A B | hunt OWN... |\n"
        "       overwrite-exe | without CALL ERRNO CMD...\n");
    return 2;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    char **v = argv + 2;
    int n = argc > 2 ? argc - 2 : 0;
    if (!strcmp(what, "fds"))
        return fds();
    if (!strcmp(what, "syscall") && n >= 1)
        return raw_syscall(n, v);
#ifdef __x86_64__
    if (!strcmp(what, "int80") && n == 1)
        return int80(strtol(v[0], NULL, 0));
#endif
    if (!strcmp(what, "fork") && n == 1)
        return fork_many(atoi(v[0]));
    if (!strcmp(what, "mem") && n == 1)
        return mem(strtoull(v[0], NULL, 0));
    if (!strcmp(what, "console") && (n == 1 || n == 3))
        return console(n, v);
    if (!strcmp(what, "pty") && n >= 1)
        return pty(v);
    if (!strcmp(what, "tty"))
        return tty_info();
    if (!strcmp(what, "inherited"))
        return inherited();
    if (!strcmp(what, "keyring"))
        return keyring();
    if (!strcmp(what, "ignore-all") && n >= 1)
        return ignore_all(v);
    if (!strcmp(what, "open-fds") && n >= 2)
        return open_fds(atoi(v[0]), v + 1);
    if (!strcmp(what, "exchange") && n == 2)
        return exchange(v[0], v[1]);
    if (!strcmp(what, "hunt"))
        return hunt(n, v);
    if (!strcmp(what, "overwrite-exe"))
        return overwrite_exe();
    if (!strcmp(what, "without") && n >= 3)
        return without(v[0], v[1], v + 2);
    return usage();
}
