/*
 * What the files of the bridge share: system calls without a C library, text, and the agent's lists. See bridge.c.
 */

#ifndef STANDIN_BRIDGE_H
#define STANDIN_BRIDGE_H

#if !defined(__x86_64__) || !defined(__linux__)
#error "the bridge is written for Linux on x86-64"
#endif

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

#define EXPORT __attribute__((visibility("default")))

extern int *__errno_location(void);

enum {
	SYS_READ = 0,
	SYS_WRITE = 1,
	SYS_CLOSE = 3,
	SYS_FSTAT = 5,
	SYS_LSEEK = 8,
	SYS_BRK = 12,
	SYS_IOCTL = 16,
	SYS_MADVISE = 28,
	SYS_DUP2 = 33,
	SYS_ALARM = 37,
	SYS_SOCKET = 41,
	SYS_SENDTO = 44,
	SYS_RECVFROM = 45,
	SYS_SENDMSG = 46,
	SYS_RECVMSG = 47,
	SYS_SETSOCKOPT = 54,
	SYS_WAIT4 = 61,
	SYS_RENAME = 82,
	SYS_UNLINK = 87,
	SYS_READLINK = 89,
	SYS_FSTATFS = 138,
	SYS_SETPRIORITY = 141,
	SYS_EXIT_GROUP = 231,
	SYS_OPENAT = 257,
	SYS_PRLIMIT64 = 302,
	SYS_SETNS = 308,
	SYS_GETCPU = 309,
	SYS_KCMP = 312,
	SYS_PIDFD_OPEN = 434,
};

#define EPERM 1
#define EINTR 4
#define ENXIO 6
#define ENAMETOOLONG 36
#define AT_FDCWD (-100)
#define O_RDONLY 0
#define O_CREAT 0100
#define O_CLOEXEC 02000000
#define O_TMPFILE_BIT 020000000
#define CLONE_NEWNS 0x00020000
#define TMPFS_MAGIC 0x01021994
#define MSG_PEEK 2
#define SOL_TCP 6
#define TCP_REPAIR 19
#define TCP_REPAIR_OFF 0
#define TCP_REPAIR_OFF_NO_WP -1
#define TCP_REPAIR_QUEUE 20
#define TCP_NO_QUEUE 0
#define MSG_TRUNC 0x20
#define MSG_DONTWAIT 0x40
#define MSG_NOSIGNAL 0x4000

struct iovec {
	void *base;
	u64 size;
};

struct msghdr {
	void *name;
	u32 name_size;
	struct iovec *parts;
	u64 parts_count;
	void *control;
	u64 control_size;
	int flags;
};

/* Linux: results from -4095 to -1 are negated error numbers. */
#define ERRNO_MAX 4095

static inline long raw_syscall(long nr, long a, long b, long c, long d, long e, long f)
{
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

#define sys3(nr, a, b, c) raw_syscall(nr, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define sys4(nr, a, b, c, d) raw_syscall(nr, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

static inline long with_errno(long result)
{
	if (result < 0 && result >= -ERRNO_MAX) {
		*__errno_location() = (int)-result;
		return -1;
	}
	return result;
}

/* ---- text ---- */

#define PATH_SIZE 512
#define DIGITS_MAX 20

u64 length(const char *text);
int starts_with(const char *text, const char *head);
int same(const char *a, const char *b);
int ends_with(const char *text, const char *tail);
/* Writes head, number and tail as one text; `size` is enough at every caller. */
void path_with_number(char *out, const char *head, u64 number, const char *tail);
/* The link text of a descriptor, "" if it has none or does not fit. */
void link_of(int fd, char *text, long size);
/* Whose directory (tail "") or file of /proc a descriptor is, 0 if it is none. */
u64 pid_of(int fd, const char *tail);

/* ---- lists.c: what the agent says of the frozen tree ---- */

/* When a list is complete, and will not come any more if it has not. */
enum list { LIST_OF_MAPPINGS, LIST_OF_PAGES };

/* The value of a variable of the environment, null if it is not set. */
const char *setting(const char *name);
/* The descriptor that a variable names, -1 if there is none. */
int number_in(const char *name);
/* Opens the list `name` of a task, waiting until it is there; -1 if there is none. */
long open_list(const char *name, u64 pid, enum list kind, int flags);
/* The mappings of a task are dumped: nobody touches it any more. */
void say_touched_no_more(u64 pid);
/* CRIU compares what tasks share. */
void tasks_are_compared(void);

/* ---- records.c: what the page server is told ---- */

void send_kept_records(void);

/* ---- fork.c: a CRIU of which others are forked ---- */

/* Returns in a child, once for each order that comes on the socket. */
void serve_forks(int server);

#endif
