/*
 * The bridge: CRIU's scans of page maps, by PAGEMAP_SCAN. See bridge.c.
 */

#include "bridge.h"

/* ---- PAGEMAP_SCAN (Linux 6.7, include/uapi/linux/fs.h) ---- */

#define PAGEMAP_SCAN 0xc0606610u
#define PAGE_BYTES 4096ul
#define PAGE_IS_FILE (1ul << 2)
#define PAGE_IS_PRESENT (1ul << 3)
#define PAGE_IS_SOFT_DIRTY (1ul << 7)
#define PAGE_IS_GUARD (1ul << 8)

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
 * Mappings whose pages somebody else lists (capture/lists.rs): start and end of each, in the file of
 * the PID's number. Of such a one CRIU is told of the first page
 * alone, by which it lets that somebody know that it wants the mapping in the image. That saves the
 * kernel's walk over all its pages and CRIU's own.
 */
#define OURS_MAX 1024

static u64 ours[2 * OURS_MAX];
static u64 ours_words, ours_pid;

static void load_ours(u64 pid)
{
	long fd, n;

	ours_pid = pid;
	ours_words = 0;
	fd = open_list("ours-", pid, LIST_OF_MAPPINGS, O_RDONLY | O_CLOEXEC);
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
		u64 pid = pid_of(fd, "/pagemap");

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

/* ---- guard regions ----
 *
 * CRIU asks for those of the whole address space, which the kernel answers by a walk over all pages
 * (collect_madv_guards() in mem.c). The agent's own walk over the frozen memory has met them already.
 * It lists where it looked and what it found there; the kernel is asked for the rest alone. In the
 * file: the number of ranges looked at, start and end of each, then those of the guard regions.
 */
#define GUARD_WORDS_MAX 4096

static u64 guards[GUARD_WORDS_MAX];

/* Gives the number of words; 0 if there is no such list, or one larger than fits. */
static u64 load_guards(u64 pid)
{
	long fd = open_list("guards-", pid, LIST_OF_PAGES, O_RDONLY | O_CLOEXEC), n;

	if (fd < 0)
		return 0;
	n = sys3(SYS_READ, fd, guards, sizeof(guards));
	sys3(SYS_CLOSE, fd, 0, 0);
	if (n <= 0 || n >= (long)sizeof(guards) || (u64)n / 8 < 1 + 2 * guards[0])
		return 0;
	return (u64)n / 8;
}

/* Adds regions of `list` that reach behind `from` and begin before `to`. */
static u64 add_regions(const u64 *list, const u64 *end, u64 from, u64 to, struct page_region *out, u64 room)
{
	u64 n = 0;

	for (; list + 1 < end && n < room; list += 2) {
		if (list[1] <= from || list[0] >= to)
			continue;
		out[n].start = list[0] > from ? list[0] : from;
		out[n].end = list[1] < to ? list[1] : to;
		out[n++].categories = PAGE_IS_GUARD;
	}
	return n;
}

static long scan_for_guards(int fd, struct pm_scan_arg *asked)
{
	struct page_region *out = (struct page_region *)asked->vec;
	u64 pid = pid_of(fd, "/pagemap"), words = pid ? load_guards(pid) : 0;
	const u64 *looked = guards + 1, *found, *end = guards + words;
	u64 at = asked->start, filled = 0;

	if (!words)
		return sys3(SYS_IOCTL, fd, PAGEMAP_SCAN, asked);
	found = looked + 2 * guards[0];
	while (at < asked->end && filled < asked->vec_len) {
		struct pm_scan_arg gap = *asked;
		long n;

		while (looked < found && looked[1] <= at)
			looked += 2;
		if (looked < found && looked[0] <= at) {
			u64 to = looked[1] < asked->end ? looked[1] : asked->end;

			filled += add_regions(found, end, at, to, out + filled, asked->vec_len - filled);
			at = to;
			continue;
		}
		gap.start = at;
		gap.end = looked < found && looked[0] < asked->end ? looked[0] : asked->end;
		gap.vec = (u64)(out + filled);
		gap.vec_len = asked->vec_len - filled;
		n = sys3(SYS_IOCTL, fd, PAGEMAP_SCAN, &gap);
		if (n < 0)
			return n;
		filled += (u64)n;
		at = gap.end;
	}
	/* With a full vector CRIU asks again from here on. */
	asked->walk_end = filled == asked->vec_len ? out[filled - 1].end : asked->end;
	return (long)filled;
}

/* ---- shared memory ----
 *
 * Of shared memory CRIU sends all that is no hole (do_dump_one_shmem() in shmem.c). What the agent reads and lists itself
 * is one to it; in the file: the inodes. The agent means memory without a file alone: the inodes of System V
 * segments, which are on the same device, are numbered apart.
 */
#define SEEK_DATA 3
#define SHARED_MAX 256

struct file_facts {
	u64 device, inode, rest[16];
};

static int is_shared_of_ours(int fd)
{
	static u64 inodes[SHARED_MAX];
	static long words = -1;
	struct file_facts facts;
	char link[64];

	link_of(fd, link, sizeof(link));
	if (!starts_with(link, "/dev/zero") && !starts_with(link, "/memfd:"))
		return 0;
	if (words < 0) {
		long list = open_list("shared-", 0, LIST_OF_MAPPINGS, O_RDONLY | O_CLOEXEC);

		words = 0;
		if (list >= 0) {
			words = sys3(SYS_READ, list, inodes, sizeof(inodes)) / (long)sizeof(inodes[0]);
			sys3(SYS_CLOSE, list, 0, 0);
		}
	}
	if (words <= 0 || sys3(SYS_FSTAT, fd, &facts, 0) < 0)
		return 0;
	for (long i = 0; i < words; i++)
		if (inodes[i] == facts.inode)
			return 1;
	return 0;
}

EXPORT long lseek64(int fd, long offset, int whence)
{
	if (whence == SEEK_DATA && is_shared_of_ours(fd))
		return with_errno(-ENXIO);
	return with_errno(sys3(SYS_LSEEK, fd, offset, whence));
}

EXPORT long lseek(int fd, long offset, int whence)
{
	return lseek64(fd, offset, whence);
}

static int asks_for_guards(const struct pm_scan_arg *scan)
{
	return scan->vec && scan->vec_len && !scan->flags && !scan->max_pages && !scan->category_inverted &&
	       !scan->category_anyof_mask && scan->category_mask == PAGE_IS_GUARD &&
	       scan->return_mask == PAGE_IS_GUARD && scan->end - scan->start >= ASK_FROM_BYTES;
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
		if (asks_for_guards(scan))
			return (int)with_errno(scan_for_guards(fd, scan));
	}
	return (int)with_errno(sys3(SYS_IOCTL, fd, request, argument));
}
