/*
 * The bridge: CRIU's records for the page server, many at a time. See bridge.c.
 *
 * CRIU sends each hole as a record of its own (send_psi() in page-xfer.c), and the agent (criu/page_server.rs) would wake for
 * each, on CRIU's own processor as often as not. Nobody waits for what is said of holes, so they are kept, and go before
 * whatever else is sent, or when CRIU is done with the task: before it forks to look at namespaces, since a child would send
 * them too. A CRIU that gives up ends without that, and what it kept is of no use then.
 */

#include "bridge.h"

/* The version decides which (struct page_server_iov). */
#define RECORD_BYTES 32
#define RECORD_BYTES_OLD 24
/* Of a record's first word, command below flags. */
#define ADD_F 6
#define PE_PRESENT 4
#define KEPT_BYTES_MAX 4096

static u8 kept[KEPT_BYTES_MAX];
static u64 kept_bytes;

static int pages_fd(void)
{
	static int fd = -1, done;

	if (!done)
		fd = number_in("STANDIN_PAGES");
	done = 1;
	return fd;
}

static int is_hole(const u8 *record, u64 size)
{
	u32 head = (u32)record[0] | (u32)record[1] << 8 | (u32)record[2] << 16 | (u32)record[3] << 24;

	return (size == RECORD_BYTES || size == RECORD_BYTES_OLD) && (head & 0xffff) == ADD_F &&
	       !(head >> 16 & PE_PRESENT);
}

/* Sends what is kept; a negated error number if that fails. */
static long send_kept(int fd)
{
	u64 sent = 0;

	while (sent < kept_bytes) {
		long n = raw_syscall(SYS_SENDTO, fd, (long)(kept + sent), (long)(kept_bytes - sent), MSG_NOSIGNAL, 0, 0);

		if (n == -EINTR)
			continue;
		if (n < 0)
			return n;
		sent += (u64)n;
	}
	kept_bytes = 0;
	return 0;
}

void send_kept_records(void)
{
	/* What cannot be sent now fails at CRIU's next send. */
	if (kept_bytes)
		send_kept(pages_fd());
}

EXPORT long send(int fd, const void *buffer, u64 size, int flags)
{
	long failed;

	if (fd < 0 || fd != pages_fd())
		return with_errno(raw_syscall(SYS_SENDTO, fd, (long)buffer, (long)size, flags, 0, 0));
	if (is_hole(buffer, size)) {
		if (kept_bytes + size > sizeof(kept) && (failed = send_kept(fd)))
			return with_errno(failed);
		for (u64 i = 0; i < size; i++)
			kept[kept_bytes++] = ((const u8 *)buffer)[i];
		return (long)size;
	}
	failed = send_kept(fd);
	if (failed)
		return with_errno(failed);
	return with_errno(raw_syscall(SYS_SENDTO, fd, (long)buffer, (long)size, flags, 0, 0));
}
