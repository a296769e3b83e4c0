/*
 * The bridge: preloaded into the criu process, so that an unmodified CRIU
 *
 *   - takes memory tracking for granted on a kernel without soft-dirty, and finds no page
 *     changed. With a parent image it then writes the list of pages that the image must hold
 *     (as holes) and no content: the tracker knows what changed and reads it itself;
 *   - keeps its cache of kernel features in a directory of ours, tmpfs or not;
 *   - can read the limits of a task of another user where root lacks CAP_SYS_RESOURCE;
 *   - is told by the agent what that knows of the frozen tree already (lists.c), and does not ask the
 *     kernel again: the mappings of a task and their pages, guard regions, which sockets there are;
 *   - tells the agent when all tasks stand and when it has left one;
 *   - sends its records of pages many at a time (records.c);
 *   - has its memory at hand when it freezes the tree;
 *   - joins the workload's mount namespace when it is loaded already (lists.c);
 *   - is forked from one that was started already (fork.c).
 *
 * The first of these changes nothing for a dump that does not ask for tracking, nor for a restore;
 * so it is always on, and one cache of kernel features serves all.
 *
 * Environment, read once: STANDIN_KERNDAT=DIR, where that cache goes; STANDIN_LISTS=DIR, where such
 * lists are; STANDIN_GATE=FD, the socket between the bridge and the agent; STANDIN_FORK=FD, where
 * orders to fork come; STANDIN_PAGES=FD, the page server; STANDIN_MOUNTS=FD, a process whose mount namespace it joins.
 *
 * It is freestanding: no C library but the address of errno and what a fork takes, which come from
 * whichever C library the criu is linked with. CRIU is single-threaded where these functions matter.
 * x86-64 alone.
 */

#include "bridge.h"

/* ---- text ---- */

u64 length(const char *text)
{
	u64 n = 0;

	while (text[n])
		n++;
	return n;
}

int starts_with(const char *text, const char *head)
{
	while (*head)
		if (*text++ != *head++)
			return 0;
	return 1;
}

int same(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

int ends_with(const char *text, const char *tail)
{
	u64 n = length(text), m = length(tail);

	return n >= m && same(text + n - m, tail);
}

void path_with_number(char *out, const char *head, u64 number, const char *tail)
{
	char digits[20];
	int n = 0;

	while (*head)
		*out++ = *head++;
	do {
		digits[n++] = (char)('0' + number % 10);
		number /= 10;
	} while (number);
	while (n)
		*out++ = digits[--n];
	while (*tail)
		*out++ = *tail++;
	*out = 0;
}

void link_of(int fd, char *text, long size)
{
	char path[40];
	long n;

	path_with_number(path, "/proc/self/fd/", (u64)fd, "");
	n = sys3(SYS_READLINK, path, text, size - 1);
	text[n > 0 ? n : 0] = 0;
}

u64 pid_of(int fd, const char *tail)
{
	char link[64];
	u64 n, pid = 0;

	link_of(fd, link, sizeof(link));
	if (!starts_with(link, "/proc/"))
		return 0;
	for (n = length("/proc/"); link[n] >= '0' && link[n] <= '9'; n++)
		pid = pid * 10 + (u64)(link[n] - '0');
	return same(link + n, tail) ? pid : 0;
}

/* ---- the cache of kernel features ----
 *
 * CRIU 4.x keeps it at /run/criu.kdat (kerndat.c), only on tmpfs, because it must not outlive a
 * boot. What it says under tracking differs from what other users of CRIU must read there, so it
 * goes to our directory, which is named after the boot: hence it may be on any file system. */

#define KERNDAT_PATH "/run/criu.kdat"

static const char *kerndat_dir;
static int kerndat_fd = -1;

/* Looked up at the first call: a constructor of this library could run after another library's
 * that opens a file. */
static void find_kerndat_dir(void)
{
	static int done;

	if (!done)
		kerndat_dir = setting("STANDIN_KERNDAT");
	done = 1;
}

/* The path to use instead of `path`, or null if the substitute does not fit. */
static const char *redirected(const char *path, char *buffer)
{
	u64 dir_length, i = 0, j = 0;
	const char *name;

	find_kerndat_dir();
	if (!kerndat_dir || !starts_with(path, KERNDAT_PATH))
		return path;
	name = path + length("/run");
	dir_length = length(kerndat_dir);
	if (dir_length + length(name) >= PATH_SIZE)
		return 0;
	for (; i < dir_length; i++)
		buffer[i] = kerndat_dir[i];
	while (name[j])
		buffer[i++] = name[j++];
	buffer[i] = 0;
	return buffer;
}

/* ---- open ---- */

/* The descriptor on which the next write asks the kernel to reset soft-dirty bits. */
static int clear_refs_fd = -1;

/* ---- files of /proc/PID ----
 *
 * CRIU opens them relative to a descriptor of /proc/PID.
 *
 * Of "smaps" it reads a list of ours, if there is one: the same, as far as CRIU looks at it, made
 * without a walk over all pages (capture/lists.rs). Without one it reads the kernel's.
 *
 * "auxv" it reads when its parasite is out of the task and the task's registers are restored
 * (dump_one_task: compel_cure, then dump_task_mm). */

static long open_of_task(int dir, const char *name, int flags)
{
	u64 pid;

	if (same(name, "smaps")) {
		pid = pid_of(dir, "");
		return pid ? open_list("smaps-", pid, LIST_OF_MAPPINGS, flags) : -1;
	}
	if (same(name, "auxv")) {
		send_kept_records();
		pid = pid_of(dir, "");
		if (pid)
			say_touched_no_more(pid);
	}
	return -1;
}

static int open_at(int dir, const char *path, int flags, u32 mode)
{
	char buffer[PATH_SIZE];
	const char *used = redirected(path, buffer);
	long fd;

	if (dir >= 0) {
		fd = open_of_task(dir, path, flags);
		if (fd >= 0)
			return (int)fd;
	}
	if (!used)
		return (int)with_errno(-ENAMETOOLONG);
	fd = sys4(SYS_OPENAT, used == path ? dir : AT_FDCWD, used, flags, mode);
	if (fd >= 0) {
		/* Descriptor numbers are used again: an open of anything else ends the role. */
		if (clear_refs_fd == fd)
			clear_refs_fd = -1;
		if (kerndat_fd == fd)
			kerndat_fd = -1;
		if (used != path)
			kerndat_fd = (int)fd;
		else if (ends_with(path, "clear_refs"))
			clear_refs_fd = (int)fd;
	}
	return (int)with_errno(fd);
}

static int takes_mode(int flags)
{
	return (flags & O_CREAT) || (flags & O_TMPFILE_BIT);
}

#define MODE_ARGUMENT(flags, mode)                      \
	do {                                            \
		__builtin_va_list list;                 \
		__builtin_va_start(list, flags);        \
		if (takes_mode(flags))                  \
			mode = __builtin_va_arg(list, u32); \
		__builtin_va_end(list);                 \
	} while (0)

EXPORT int open64(const char *path, int flags, ...)
{
	u32 mode = 0;

	MODE_ARGUMENT(flags, mode);
	return open_at(AT_FDCWD, path, flags, mode);
}

EXPORT int open(const char *path, int flags, ...)
{
	u32 mode = 0;

	MODE_ARGUMENT(flags, mode);
	return open_at(AT_FDCWD, path, flags, mode);
}

EXPORT int openat64(int dir, const char *path, int flags, ...)
{
	u32 mode = 0;

	MODE_ARGUMENT(flags, mode);
	return open_at(dir, path, flags, mode);
}

EXPORT int openat(int dir, const char *path, int flags, ...)
{
	u32 mode = 0;

	MODE_ARGUMENT(flags, mode);
	return open_at(dir, path, flags, mode);
}

EXPORT int rename(const char *from, const char *to)
{
	char from_buffer[PATH_SIZE], to_buffer[PATH_SIZE];
	const char *from_used = redirected(from, from_buffer);
	const char *to_used = redirected(to, to_buffer);

	if (!from_used || !to_used)
		return (int)with_errno(-ENAMETOOLONG);
	return (int)with_errno(sys3(SYS_RENAME, from_used, to_used, 0));
}

EXPORT int unlink(const char *path)
{
	char buffer[PATH_SIZE];
	const char *used = redirected(path, buffer);

	if (!used)
		return (int)with_errno(-ENAMETOOLONG);
	return (int)with_errno(sys3(SYS_UNLINK, used, 0, 0));
}

static int file_system_of(int fd, long *facts)
{
	long result = sys3(SYS_FSTATFS, fd, facts, 0);

	/* struct statfs begins with f_type. */
	if (result == 0 && fd >= 0 && fd == kerndat_fd)
		facts[0] = TMPFS_MAGIC;
	return (int)with_errno(result);
}

EXPORT int fstatfs64(int fd, long *facts)
{
	return file_system_of(fd, facts);
}

EXPORT int fstatfs(int fd, long *facts)
{
	return file_system_of(fd, facts);
}

/* ---- soft-dirty ---- */

#define SOFT_DIRTY_BIT (1ul << 55)

/*
 * kerndat_get_dirty_track() in kerndat.c writes to a page, read()s its entry in
 * /proc/self/pagemap (the only 8-byte read() of a pagemap in CRIU; all others are pread or
 * PAGEMAP_SCAN) and looks for the soft-dirty bit.
 */
EXPORT long read(int fd, void *buffer, u64 size)
{
	long result = sys3(SYS_READ, fd, buffer, size);

	if (result == 8 && size == 8) {
		char link[64];

		link_of(fd, link, sizeof(link));
		if (ends_with(link, "/pagemap"))
			*(u64 *)buffer |= SOFT_DIRTY_BIT;
	}
	return with_errno(result);
}

/*
 * "4" to clear_refs resets soft-dirty. On a kernel without it this answers EINVAL; on one with it,
 * it write-protects all of the task's memory, which nobody here needs.
 */
EXPORT long write(int fd, const void *buffer, u64 size)
{
	if (clear_refs_fd >= 0 && fd == clear_refs_fd) {
		clear_refs_fd = -1;
		if (size >= 1 && size <= 2 && *(const char *)buffer == '4')
			return (long)size;
	}
	return with_errno(sys3(SYS_WRITE, fd, buffer, size));
}

/* ---- limits ---- */

struct limit {
	u64 current, maximum;
};

/* The lines of /proc/PID/limits (fs/proc/base.c), in the order of the RLIMIT_* numbers. */
static const char *const LIMIT_LINES[] = {
	"Max cpu time",	     "Max file size",	    "Max data size",	     "Max stack size",
	"Max core file size", "Max resident set",    "Max processes",	     "Max open files",
	"Max locked memory", "Max address space",   "Max file locks",	     "Max pending signals",
	"Max msgqueue size", "Max nice priority",   "Max realtime priority", "Max realtime timeout",
};

/* Reads one number or "unlimited"; returns what follows it, null if there is neither. */
static const char *parse_limit(const char *text, u64 *value)
{
	while (*text == ' ')
		text++;
	if (starts_with(text, "unlimited")) {
		*value = ~0ul;
		return text + length("unlimited");
	}
	if (*text < '0' || *text > '9')
		return 0;
	for (*value = 0; *text >= '0' && *text <= '9'; text++)
		*value = *value * 10 + (u64)(*text - '0');
	return text;
}

static int limit_from_proc(u64 pid, u64 resource, struct limit *limit)
{
	/* Sixteen lines of under 90 bytes. */
	char path[40], text[4096];
	const char *line = text, *name;
	long fd, n, used = 0;

	if (resource >= sizeof(LIMIT_LINES) / sizeof(LIMIT_LINES[0]))
		return 0;
	path_with_number(path, "/proc/", pid, "/limits");
	fd = sys4(SYS_OPENAT, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
	if (fd < 0)
		return 0;
	while (used < (long)sizeof(text) - 1 &&
	       (n = sys3(SYS_READ, fd, text + used, sizeof(text) - 1 - used)) > 0)
		used += n;
	sys3(SYS_CLOSE, fd, 0, 0);
	text[used] = 0;
	name = LIMIT_LINES[resource];
	while (*line) {
		if (starts_with(line, name)) {
			line = parse_limit(line + length(name), &limit->current);
			return line && parse_limit(line, &limit->maximum) != 0;
		}
		while (*line && *line != '\n')
			line++;
		if (*line)
			line++;
	}
	return 0;
}

/*
 * CRIU asks with syscall(__NR_prlimit64, pid, resource, NULL, &limit) (cr-dump.c). For a task of
 * another user the kernel wants CAP_SYS_RESOURCE (kernel/sys.c, check_prlimit_permission), which
 * root in many containers lacks, while /proc/PID/limits is open to everybody.
 */
EXPORT long syscall(long nr, ...)
{
	__builtin_va_list list;
	long a, b, c, d, e, f, result;

	__builtin_va_start(list, nr);
	a = __builtin_va_arg(list, long);
	b = __builtin_va_arg(list, long);
	c = __builtin_va_arg(list, long);
	d = __builtin_va_arg(list, long);
	e = __builtin_va_arg(list, long);
	f = __builtin_va_arg(list, long);
	__builtin_va_end(list);
	if (nr == SYS_KCMP)
		tasks_are_compared();
	result = raw_syscall(nr, a, b, c, d, e, f);
	if (nr == SYS_PRLIMIT64 && result == -EPERM && !c && d &&
	    limit_from_proc((u32)a, (u32)b, (struct limit *)d))
		return 0;
	return with_errno(result);
}
