/*
 * The bridge: what the agent says of the frozen tree. See bridge.c.
 *
 * The agent writes files into a directory (capture/lists.rs), each whole before it has its name, while CRIU works. CRIU
 * waits where it comes to need one that is not there yet. Without an agent that says otherwise there is
 * none, and the kernel is asked: what a list spares it is never what makes the answer true.
 */

#include "bridge.h"

extern char **environ;

const char *setting(const char *name)
{
	u64 n = length(name);

	for (char **entry = environ; entry && *entry; entry++)
		if (starts_with(*entry, name) && (*entry)[n] == '=')
			return *entry + n + 1;
	return 0;
}

int number_in(const char *name)
{
	const char *text = setting(name);
	int number = 0;

	if (!text || !*text)
		return -1;
	for (; *text >= '0' && *text <= '9'; text++)
		number = 10 * number + (*text - '0');
	return number;
}

/* ---- the socket between the bridge and the agent (gate.rs): a word and what belongs to it here, a pid there ---- */

/* A list has come; all of a kind have come; which protocols the sockets of the tree have. */
enum { HEARD_LIST = 0, HEARD_MAPPINGS = 1, HEARD_PAGES = 2, HEARD_PROTOCOLS = 3 };

/* In the place of a pid: all tasks stand; the first is about to be stopped, by who runs on this processor. */
#define ALL_STAND 0
#define ABOUT_TO_STOP 0x80000000u

static int gate_fd = -1;
static const char *lists_dir;
static int complete[2];
/* Of the sockets of the tree; all as long as nothing is heard of it. */
static u32 protocols = ~0u;
static int protocols_known;

static void find_agent(void)
{
	static int done;

	if (done)
		return;
	done = 1;
	lists_dir = setting("STANDIN_LISTS");
	gate_fd = number_in("STANDIN_GATE");
	if (gate_fd < 0 || !lists_dir || length(lists_dir) + 20 + DIGITS_MAX >= PATH_SIZE) {
		complete[LIST_OF_MAPPINGS] = complete[LIST_OF_PAGES] = 1;
		gate_fd = -1;
	}
}

static void hear(void)
{
	u32 heard[2];
	long n;

	do
		n = raw_syscall(SYS_RECVFROM, gate_fd, (long)heard, sizeof(heard), 0, 0, 0);
	while (n == -EINTR);
	if (n != sizeof(heard)) {
		complete[LIST_OF_MAPPINGS] = complete[LIST_OF_PAGES] = 1;
	} else if (heard[0] == HEARD_MAPPINGS) {
		complete[LIST_OF_MAPPINGS] = 1;
	} else if (heard[0] == HEARD_PAGES) {
		complete[LIST_OF_PAGES] = 1;
	} else if (heard[0] == HEARD_PROTOCOLS) {
		protocols = heard[1];
		protocols_known = 1;
	}
}

static void say(u32 said)
{
	find_agent();
	/* An agent that does not hear it hears of the same from CRIU, later. */
	if (gate_fd >= 0)
		raw_syscall(SYS_SENDTO, gate_fd, (long)&said, sizeof(said), MSG_NOSIGNAL | MSG_DONTWAIT, 0, 0);
}

void say_touched_no_more(u64 pid)
{
	say((u32)pid);
}

/* What CRIU has come to: collect_pstree() in seize.c sets an alarm before it stops the first task and takes it off behind
 * the last, or when it gave up; collect_pstree_ids(), which compares what tasks share, follows if it did not. */
static enum { BEFORE, STOPPING, STOPPED_OR_NOT, STAND } stage;

EXPORT u32 alarm(u32 seconds)
{
	u32 processor = 0;

	if (seconds) {
		stage = STOPPING;
		sys3(SYS_GETCPU, &processor, 0, 0);
		say(ABOUT_TO_STOP | processor);
	} else if (stage == STOPPING) {
		stage = STOPPED_OR_NOT;
	}
	return (u32)sys3(SYS_ALARM, seconds, 0, 0);
}

void tasks_are_compared(void)
{
	if (stage != STOPPED_OR_NOT)
		return;
	stage = STAND;
	say(ALL_STAND);
}

long open_list(const char *name, u64 pid, enum list kind, int flags)
{
	char path[PATH_SIZE];
	u64 n = 0;

	find_agent();
	if (gate_fd < 0)
		return -1;
	for (const char *from = lists_dir; *from;)
		path[n++] = *from++;
	path[n++] = '/';
	path_with_number(path + n, name, pid, "");
	for (;;) {
		/* Looked at first: what came before the word that all have come is there then. */
		int all = complete[kind];
		long fd = sys4(SYS_OPENAT, AT_FDCWD, path, flags, 0);

		if (fd >= 0 || all)
			return fd;
		hear();
	}
}

/* ---- sockets ----
 *
 * CRIU asks the kernel for all sockets of the network namespace, protocol by protocol, before it
 * looks at the tasks' descriptors (collect_sockets() in sockets.c), and later looks up those that it
 * meets by their inodes. For the sockets of TCP the kernel walks its whole hash table, twice 0.16 ms,
 * and for a protocol of which it has no module it tries to load that. The agent tells which
 * protocols the sockets of the frozen tree have; for others the answer is an empty list.
 */

#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define AF_NETLINK 16
#define AF_PACKET 17
#define IPPROTO_TCP 6
#define SOCK_DIAG_BY_FAMILY 20
#define NLM_F_MULTI 2
#define NLM_F_DUMP 0x300
#define NLMSG_DONE 3

/* Bits of the agent's word, see capture/sockets.rs. */
enum {
	HAS_UNIX = 1,
	HAS_TCP = 2,
	HAS_INET = 4,
	HAS_TCP6 = 8,
	HAS_INET6 = 16,
	HAS_PACKET = 32,
	HAS_NETLINK = 64,
	HAS_ALL = 127,
};

struct netlink_header {
	u32 size;
	unsigned short type, flags;
	u32 sequence, pid;
};

struct sock_diag_request {
	struct netlink_header header;
	u8 family, protocol;
};

/*
 * Of a network namespace that is part of the tree CRIU asks for the connections that netfilter tracks, twice (dump_nf_ct()
 * in net.c), also where the namespace itself is not in the image. Nobody restores them there; and a kernel without that
 * protocol tries to load it each time, 5 to 10 ms. So the socket is another one, and the answer an empty list.
 */
#define NETLINK_NETFILTER 12
/* The subsystem is the upper byte of a message's type; other protocols have none. */
#define IS_OF_CONNECTIONS(type) ((type) >> 8 == 1 || (type) >> 8 == 2)

EXPORT int socket(int family, int kind, int protocol)
{
	find_agent();
	if (gate_fd >= 0 && family == AF_NETLINK && protocol == NETLINK_NETFILTER)
		protocol = 0;
	return (int)with_errno(sys3(SYS_SOCKET, family, kind, protocol));
}

/* The socket on which a question stands that is answered here, and its number. */
static int answered_fd = -1;
static u32 answered_sequence;

static u32 protocols_of_tree(void)
{
	while (!protocols_known && !complete[LIST_OF_MAPPINGS])
		hear();
	return protocols;
}

static u32 bit_of(const struct sock_diag_request *request)
{
	int tcp = request->protocol == IPPROTO_TCP;

	switch (request->family) {
	case AF_UNIX:
		return HAS_UNIX;
	case AF_INET:
		return tcp ? HAS_TCP : HAS_INET;
	case AF_INET6:
		return tcp ? HAS_TCP6 : HAS_INET6;
	case AF_PACKET:
		return HAS_PACKET;
	case AF_NETLINK:
		return HAS_NETLINK;
	default:
		return HAS_ALL;
	}
}

EXPORT long sendmsg(int fd, const struct msghdr *message, int flags)
{
	const unsigned short *family = message->name;

	find_agent();
	if (gate_fd >= 0 && family && message->name_size >= sizeof(*family) && *family == AF_NETLINK &&
	    message->parts_count == 1 && message->parts[0].size >= sizeof(struct sock_diag_request)) {
		const struct sock_diag_request *request = message->parts[0].base;

		if ((request->header.flags & NLM_F_DUMP) == NLM_F_DUMP &&
		    (IS_OF_CONNECTIONS(request->header.type) ||
		     (request->header.type == SOCK_DIAG_BY_FAMILY &&
		      !(bit_of(request) & protocols_of_tree())))) {
			answered_fd = fd;
			answered_sequence = request->header.sequence;
			return (long)message->parts[0].size;
		}
	}
	return with_errno(sys3(SYS_SENDMSG, fd, message, flags));
}

EXPORT long recvmsg(int fd, struct msghdr *message, int flags)
{
	struct {
		struct netlink_header header;
		int error;
	} *answer;

	if (fd != answered_fd || message->parts_count != 1 || message->parts[0].size < sizeof(*answer))
		return with_errno(sys3(SYS_RECVMSG, fd, message, flags));
	answered_fd = -1;
	answer = message->parts[0].base;
	answer->header.size = sizeof(*answer);
	answer->header.type = NLMSG_DONE;
	answer->header.flags = NLM_F_MULTI;
	answer->header.sequence = answered_sequence;
	answer->header.pid = 0;
	answer->error = 0;
	message->flags = 0;
	return sizeof(*answer);
}

/* ---- memory ---- */

#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#define STACK_BYTES (128 * 1024)

/*
 * The first look at each page of memory is a fault, some 60 of them in a freeze. So what CRIU has of
 * memory is made present while it waits for its task, and what its heap got since when it is about to
 * begin: it asks for the size of a message first (recv_criu_msg() in cr-service.c), of the request and
 * then of the answer to "pre-dump". Where Linux cannot do that (before 5.14) there are faults. Libraries
 * are left out, but for what all share (libc's data, and data without a file): CRIU uses little of them,
 * and all of it would take milliseconds (as mlockall does).
 */
#define PREPARED_MAX 2
#define PAGE_BYTES 4096

/* Where the heap ended when it was last looked at. */
static u64 heap_end;

static int is_written_by_criu(const char *line)
{
	if (ends_with(line, "/criu") || ends_with(line, "/libc.so.6"))
		return 1;
	while (*line && *line != '/')
		line++;
	return !*line;
}

/* A line of /proc/self/maps: "start-end rw-p offset device inode   path". */
static void have_mapping_present(const char *line)
{
	u64 ends[2] = { 0, 0 };

	for (int i = 0; i < 2; i++, line++)
		for (; *line && *line != '-' && *line != ' '; line++)
			ends[i] = ends[i] * 16 + (u64)(*line <= '9' ? *line - '0' : *line - 'a' + 10);
	if (starts_with(line, "rw-p") && is_written_by_criu(line))
		sys3(SYS_MADVISE, ends[0], ends[1] - ends[0], MADV_POPULATE_WRITE);
	else if (starts_with(line, "r-") && ends_with(line, "/criu"))
		sys3(SYS_MADVISE, ends[0], ends[1] - ends[0], MADV_POPULATE_READ);
}

static void have_memory_present(void)
{
	volatile u8 stack[STACK_BYTES];
	static char text[16 * 1024];
	long fd, n, kept = 0;

	for (u64 i = STACK_BYTES; i >= PAGE_BYTES; i -= PAGE_BYTES)
		(void)(stack[i - 1] = 0);
	fd = sys4(SYS_OPENAT, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC, 0);
	if (fd < 0)
		return;
	while ((n = sys3(SYS_READ, fd, text + kept, sizeof(text) - (u64)kept)) > 0) {
		long line = 0;

		n += kept;
		for (long i = 0; i < n; i++) {
			if (text[i] != '\n')
				continue;
			text[i] = 0;
			have_mapping_present(text + line);
			line = i + 1;
		}
		for (kept = 0; line < n; line++)
			text[kept++] = text[line];
	}
	sys3(SYS_CLOSE, fd, 0, 0);
	heap_end = (u64)sys3(SYS_BRK, 0, 0, 0);
}

static void have_new_heap_present(void)
{
	u64 end = (u64)sys3(SYS_BRK, 0, 0, 0), start = heap_end / PAGE_BYTES * PAGE_BYTES;

	if (heap_end && end > start)
		sys3(SYS_MADVISE, start, end - start, MADV_POPULATE_WRITE);
	heap_end = end;
}

/* What is in the workload's file system its makers chose: a library there, or an /etc/ld.so.preload, would run with CRIU's
 * rights. So CRIU comes from ours, whole, before it joins the workload's. */
static void join_mounts(void)
{
	static const char failed[] = "joining the workload's mount namespace failed\n";
	int init = number_in("STANDIN_MOUNTS");

	if (init < 0)
		return;
	if (sys3(SYS_SETNS, init, CLONE_NEWNS, 0)) {
		sys3(SYS_WRITE, 2, failed, sizeof(failed) - 1);
		sys3(SYS_EXIT_GROUP, 1, 0, 0);
	}
	sys3(SYS_CLOSE, init, 0, 0);
}

/* CRIU leaves a connection whose bytes to be sent it has read in a state in which the kernel counts as sent, and does not send,
 * what is still to be sent, for as long as the tree stands (soccr.c, TCP_REPAIR_QUEUE): whatever wakes it then, such as a pacing
 * timer, makes holes in the stream, which are found only as loss. It is taken out of that state as soon as they are read. */
static void let_send(int fd)
{
	int none = TCP_NO_QUEUE;

	raw_syscall(SYS_SETSOCKOPT, fd, SOL_TCP, TCP_REPAIR_QUEUE, (long)&none, sizeof(none), 0);
}

/* When CRIU is done with a connection the kernel would send a probe of the window, for which a restored one has need: here it goes
 * on as it was, and each idle client would answer in every epoch. */
EXPORT int setsockopt(int fd, int level, int name, const void *value, unsigned int size)
{
	int quietly = TCP_REPAIR_OFF_NO_WP;

	find_agent();
	if (gate_fd >= 0 && level == SOL_TCP && name == TCP_REPAIR && size == sizeof(quietly) &&
	    *(const int *)value == TCP_REPAIR_OFF)
		value = &quietly;
	return (int)with_errno(raw_syscall(SYS_SETSOCKOPT, fd, level, name, (long)value, size, 0));
}

/* As hurry() in sys.rs. Until it is to begin it has time. */
#define PRIO_PROCESS 0
#define HURRIED_NICE (-15)

/* CRIU's first call of it is for its task, when it has come wholly to be (cr_service_work() in cr-service.c). */
EXPORT long recv(int fd, void *buffer, u64 size, int flags)
{
	static int prepared, looked;
	long got;

	if (!looked) {
		looked = 1;
		join_mounts();
		if (fd == number_in("STANDIN_FORK"))
			serve_forks(fd);
	}
	find_agent();
	if (gate_fd >= 0 && prepared < PREPARED_MAX && flags == (MSG_PEEK | MSG_TRUNC)) {
		if (prepared++)
			have_new_heap_present();
		else
			have_memory_present();
	}
	got = raw_syscall(SYS_RECVFROM, fd, (long)buffer, (long)size, flags, 0, 0);
	if (prepared == PREPARED_MAX) {
		prepared++;
		sys3(SYS_SETPRIORITY, PRIO_PROCESS, 0, HURRIED_NICE);
	}
	if (flags == (MSG_PEEK | MSG_DONTWAIT))
		let_send(fd);
	return with_errno(got);
}
