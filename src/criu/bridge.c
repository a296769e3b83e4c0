/*
 * The bridge: preloaded into the criu process, so that an unmodified CRIU
 *
 *   - takes memory tracking for granted on a kernel without soft-dirty, and finds no page
 *     changed. With a parent image it then writes the list of pages that the image must hold
 *     (as holes) and no content: the tracker knows what changed and reads it itself;
 *   - keeps its cache of kernel features in a directory of ours, tmpfs or not;
 *   - can read the limits of a task of another user where root lacks CAP_SYS_RESOURCE;
 *   - reads the mappings of a task from a list of ours, if there is one.
 *
 * The first of these changes nothing for a dump that does not ask for tracking, nor for a restore;
 * so it is always on, and one cache of kernel features serves all.
 *
 * Environment, read once: STANDIN_KERNDAT=DIR, where that cache goes; STANDIN_SMAPS=HEAD, how the paths
 * of such lists begin, before the pid.
 *
 * It is freestanding: no C library but the address of errno, which comes from whichever C library
 * the criu is linked with. CRIU is single-threaded where these functions matter. x86-64 alone.
 */

#if !defined(__x86_64__) || !defined(__linux__)
#error "the bridge is written for Linux on x86-64"
#endif

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

#define EXPORT __attribute__((visibility("default")))

extern int *__errno_location(void);
extern char **environ;

enum {
	SYS_READ = 0,
	SYS_WRITE = 1,
	SYS_CLOSE = 3,
	SYS_IOCTL = 16,
	SYS_RENAME = 82,
	SYS_UNLINK = 87,
	SYS_READLINK = 89,
	SYS_FSTATFS = 138,
	SYS_OPENAT = 257,
	SYS_PRLIMIT64 = 302,
};

#define EPERM 1
#define ENAMETOOLONG 36
#define AT_FDCWD (-100)
#define O_RDONLY 0
#define O_CREAT 0100
#define O_CLOEXEC 02000000
#define O_TMPFILE_BIT 020000000
#define TMPFS_MAGIC 0x01021994

/* Linux: results from -4095 to -1 are negated error numbers. */
#define ERRNO_MAX 4095

static long raw_syscall(long nr, long a, long b, long c, long d, long e, long f)
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

static long with_errno(long result)
{
	if (result < 0 && result >= -ERRNO_MAX) {
		*__errno_location() = (int)-result;
		return -1;
	}
	return result;
}

/* ---- text ---- */

static u64 length(const char *text)
{
	u64 n = 0;

	while (text[n])
		n++;
	return n;
}

static int starts_with(const char *text, const char *head)
{
	while (*head)
		if (*text++ != *head++)
			return 0;
	return 1;
}

static int same(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

static int ends_with(const char *text, const char *tail)
{
	u64 n = length(text), m = length(tail);

	return n >= m && same(text + n - m, tail);
}

/* Writes head, number and tail as one text; `size` is enough at every caller. */
static void path_with_number(char *out, const char *head, u64 number, const char *tail)
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

/* ---- settings ---- */

static const char *kerndat_dir;
static const char *lists_head;
static const char *ours_head;

static const char *setting(const char *name)
{
	u64 n = length(name);

	for (char **entry = environ; entry && *entry; entry++)
		if (starts_with(*entry, name) && (*entry)[n] == '=')
			return *entry + n + 1;
	return 0;
}

/* Looked up at the first call of a function below: a constructor of this library could run after
 * another library's that calls one of them. */
static void read_settings(void)
{
	static int done;

	if (done)
		return;
	done = 1;
	kerndat_dir = setting("STANDIN_KERNDAT");
	lists_head = setting("STANDIN_SMAPS");
	ours_head = setting("STANDIN_OURS");
}

/* ---- the cache of kernel features ----
 *
 * CRIU 4.x keeps it at /run/criu.kdat (kerndat.c), only on tmpfs, because it must not outlive a
 * boot. What it says under tracking differs from what other users of CRIU must read there, so it
 * goes to our directory, which is named after the boot: hence it may be on any file system. */

#define KERNDAT_PATH "/run/criu.kdat"
#define PATH_SIZE 512

static int kerndat_fd = -1;

/* The path to use instead of `path`, or null if the substitute does not fit. */
static const char *redirected(const char *path, char *buffer)
{
	u64 dir_length, i = 0, j = 0;
	const char *name;

	read_settings();
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

/* ---- smaps ----
 *
 * CRIU opens "smaps" relative to a descriptor of /proc/PID. If there is a file of that PID's number
 * behind the head that we are given (in the directory of the images), that is what it reads: the
 * same, as far as CRIU looks at it, made without a walk over all pages (capture/maps.rs). Without
 * one it reads the kernel's. */

#define DIGITS_MAX 20

static long open_list_of_mappings(int dir, int flags)
{
	char link[PATH_SIZE], path[PATH_SIZE];
	u64 pid = 0;
	long n, i = 6; /* behind "/proc/" */

	read_settings();
	if (!lists_head || length(lists_head) + DIGITS_MAX >= PATH_SIZE)
		return -1;
	path_with_number(path, "/proc/self/fd/", (u64)dir, "");
	n = sys3(SYS_READLINK, path, link, PATH_SIZE - 1);
	if (n <= i || n > i + 10)
		return -1;
	link[n] = 0;
	if (!starts_with(link, "/proc/"))
		return -1;
	for (; i < n; i++) {
		if (link[i] < '0' || link[i] > '9')
			return -1;
		pid = pid * 10 + (u64)(link[i] - '0');
	}
	path_with_number(path, lists_head, pid, "");
	return sys4(SYS_OPENAT, AT_FDCWD, path, flags, 0);
}

static int open_at(int dir, const char *path, int flags, u32 mode)
{
	char buffer[PATH_SIZE];
	const char *used = redirected(path, buffer);
	long fd;

	if (dir >= 0 && same(path, "smaps")) {
		fd = open_list_of_mappings(dir, flags);
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

/* The link text of a descriptor, "" if it has none or does not fit. */
static void link_of(int fd, char *text, long size)
{
	char path[40];
	long n;

	path_with_number(path, "/proc/self/fd/", (u64)fd, "");
	n = sys3(SYS_READLINK, path, text, size - 1);
	text[n > 0 ? n : 0] = 0;
}

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

/* ---- PAGEMAP_SCAN (Linux 6.7, include/uapi/linux/fs.h) ---- */

#define PAGEMAP_SCAN 0xc0606610u
#define PAGE_BYTES 4096ul
#define PAGE_IS_FILE (1ul << 2)
#define PAGE_IS_PRESENT (1ul << 3)
#define PAGE_IS_SOFT_DIRTY (1ul << 7)

struct pm_scan_arg {
	u64 size, flags, start, end, walk_end, vec, vec_len, max_pages;
	u64 category_inverted, category_mask, category_anyof_mask, return_mask;
};

struct page_region {
	u64 start, end, categories;
};

/* PROCMAP_QUERY (Linux 6.11): the mapping that covers an address. */
#define PROCMAP_QUERY 0xc0686611u

struct procmap_query {
	u64 size, query_flags, query_addr;
	u64 vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
	u32 dev_major, dev_minor, vma_name_size, build_id_size;
	u64 vma_name_addr, build_id_addr;
};

/*
 * Telling file pages from anonymous ones is what makes a scan slow (12 ms/GB against 1.2): the
 * kernel must look at each page's struct. In a private anonymous mapping there are none, so the
 * question may be left out there. Asking costs three system calls: worth it for long ranges.
 */
#define ASK_FROM_BYTES (2ul << 20)

/* Whose page map a descriptor is, 0 if it is none. */
static u64 pid_of_pagemap(int fd)
{
	char link[64];
	u64 n, pid = 0;

	link_of(fd, link, sizeof(link));
	if (!starts_with(link, "/proc/"))
		return 0;
	for (n = length("/proc/"); link[n] >= '0' && link[n] <= '9'; n++)
		pid = pid * 10 + (u64)(link[n] - '0');
	return same(link + n, "/pagemap") ? pid : 0;
}

static int is_anonymous(u64 pid, u64 start, u64 end)
{
	struct procmap_query query;
	char maps[64];
	u64 n;
	long fd, result;

	if (!pid)
		return 0;
	path_with_number(maps, "/proc/", pid, "/maps");
	fd = sys4(SYS_OPENAT, AT_FDCWD, maps, O_RDONLY | O_CLOEXEC, 0);
	if (fd < 0)
		return 0;
	for (n = 0; n < sizeof(query); n++)
		((volatile u8 *)&query)[n] = 0;
	query.size = sizeof(query);
	query.query_addr = start;
	result = sys3(SYS_IOCTL, fd, PROCMAP_QUERY, &query);
	sys3(SYS_CLOSE, fd, 0, 0);
	/* Shared anonymous memory is a file of the kernel's own tmpfs and has an inode. */
	return result == 0 && query.vma_start <= start && end <= query.vma_end && query.inode == 0 &&
	       query.dev_major == 0 && query.dev_minor == 0;
}

/*
 * Mappings whose pages somebody else lists (capture/maps.rs): start and end of each, in the file of
 * the PID's number behind the head that we are given. Of such a one CRIU is told of the first page
 * alone, by which it lets that somebody know that it wants the mapping in the image. That saves the
 * kernel's walk over all its pages and CRIU's own.
 */
#define OURS_MAX 1024

static u64 ours[2 * OURS_MAX];
static u64 ours_words, ours_pid;

static void load_ours(u64 pid)
{
	char path[PATH_SIZE];
	long fd, n;

	read_settings();
	ours_pid = pid;
	ours_words = 0;
	if (!ours_head || length(ours_head) + DIGITS_MAX >= PATH_SIZE)
		return;
	path_with_number(path, ours_head, pid, "");
	fd = sys4(SYS_OPENAT, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
	if (fd < 0)
		return;
	n = sys3(SYS_READ, fd, ours, sizeof(ours));
	sys3(SYS_CLOSE, fd, 0, 0);
	if (n > 0)
		ours_words = (u64)n / sizeof(ours[0]);
}

static int is_ours(u64 pid, u64 start, u64 end)
{
	if (pid && pid != ours_pid)
		load_ours(pid);
	for (u64 i = 0; pid && i + 1 < ours_words; i += 2)
		if (ours[i] == start && ours[i + 1] == end)
			return 1;
	return 0;
}

/* CRIU's scan, with no page soft-dirty. The results stay in the order and form CRIU expects. */
static long scan_as_clean(int fd, struct pm_scan_arg *asked)
{
	struct pm_scan_arg used = *asked;
	struct page_region *regions = (struct page_region *)asked->vec;
	long found;

	if (used.end > used.start && used.end - used.start >= ASK_FROM_BYTES) {
		u64 pid = pid_of_pagemap(fd);

		if (asked->vec_len && is_ours(pid, used.start, used.end)) {
			regions[0].start = used.start;
			regions[0].end = used.start + PAGE_BYTES;
			regions[0].categories = PAGE_IS_PRESENT;
			asked->walk_end = used.end;
			return 1;
		}
		if (is_anonymous(pid, used.start, used.end)) {
			used.category_inverted &= ~PAGE_IS_FILE;
			used.category_mask &= ~PAGE_IS_FILE;
		}
	}
	used.return_mask &= ~PAGE_IS_SOFT_DIRTY;
	found = sys3(SYS_IOCTL, fd, PAGEMAP_SCAN, &used);
	asked->walk_end = used.walk_end;
	for (long i = 0; i < found; i++)
		regions[i].categories &= ~PAGE_IS_SOFT_DIRTY;
	return found;
}

EXPORT int ioctl(int fd, u64 request, ...)
{
	__builtin_va_list list;
	long argument;

	__builtin_va_start(list, request);
	argument = __builtin_va_arg(list, long);
	__builtin_va_end(list);
	if ((u32)request == PAGEMAP_SCAN) {
		struct pm_scan_arg *scan = (struct pm_scan_arg *)argument;

		/* Without a result vector it is CRIU's probe of the kernel: let it see the truth. */
		if (scan->vec && (scan->return_mask & PAGE_IS_SOFT_DIRTY))
			return (int)with_errno(scan_as_clean(fd, scan));
	}
	return (int)with_errno(sys3(SYS_IOCTL, fd, request, argument));
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
	result = raw_syscall(nr, a, b, c, d, e, f);
	if (nr == SYS_PRLIMIT64 && result == -EPERM && !c && d &&
	    limit_from_proc((u32)a, (u32)b, (struct limit *)d))
		return 0;
	return with_errno(result);
}
