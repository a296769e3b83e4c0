/*
 * The bridge: a CRIU of which others are forked. See bridge.c.
 *
 * To start CRIU, its libraries above all, takes as much processor time as a whole dump. So one is started, which comes as
 * far as waiting for its task and never gets one. For each dump it is told to fork (criu/fork_server.rs); the child finds
 * its descriptors at the numbers that one started for this dump would have, and waits for the task itself. CRIU's own
 * service (cr_service() in cr-service.c) does the same for each of its clients.
 */

#include "bridge.h"

/* Of whichever C library the criu is linked with: it has to do at a fork. */
extern int fork(void);
extern void (*signal(int number, void (*handler)(int)))(int);

#define SIGCHLD 17
#define SIG_DFL ((void (*)(int))0)
#define WNOHANG 1
#define SOL_SOCKET 1
#define SCM_RIGHTS 1
#define MSG_CTRUNC 8
#define MSG_CMSG_CLOEXEC 0x40000000

/* Most descriptors that an order brings. */
#define FORK_FDS_MAX 8

/* One struct cmsghdr with room for descriptors. */
struct rights {
	u64 size;
	int level, type;
	int fds[FORK_FDS_MAX];
};

#define RIGHTS_SIZE(count) (16 + 4 * (u64)(count))

static void end(int code)
{
	for (;;)
		sys3(SYS_EXIT_GROUP, code, 0, 0);
}

/* Waits for an order: descriptors, and the numbers that they shall have. Gives how many; ends with the agent. */
static int receive_order(int server, int *fds, int *numbers)
{
	struct rights rights = { 0 };
	struct iovec part = { numbers, FORK_FDS_MAX * sizeof(*numbers) };
	struct msghdr message = { 0 };
	long n;

	message.parts = &part;
	message.parts_count = 1;
	message.control = &rights;
	message.control_size = sizeof(rights);
	do
		n = sys3(SYS_RECVMSG, server, &message, MSG_CMSG_CLOEXEC);
	while (n == -EINTR);
	if (n <= 0 || n % (long)sizeof(*numbers) || message.flags & (MSG_CTRUNC | MSG_TRUNC) ||
	    rights.level != SOL_SOCKET || rights.type != SCM_RIGHTS ||
	    rights.size != RIGHTS_SIZE(n / (long)sizeof(*numbers)))
		end(n != 0);
	for (long i = 0; i < n / (long)sizeof(*numbers); i++)
		fds[i] = rights.fds[i];
	return (int)(n / (long)sizeof(*numbers));
}

/* The child's pid and a descriptor of it, or the negated error number alone. */
static void answer(int server, long pid)
{
	int word = (int)pid, pidfd = -1;
	struct rights rights = { RIGHTS_SIZE(1), SOL_SOCKET, SCM_RIGHTS, { 0 } };
	struct iovec part = { &word, sizeof(word) };
	struct msghdr message = { 0 };

	message.parts = &part;
	message.parts_count = 1;
	if (pid > 0) {
		pidfd = (int)sys3(SYS_PIDFD_OPEN, pid, 0, 0);
		if (pidfd < 0)
			word = pidfd;
	}
	if (pidfd >= 0) {
		rights.fds[0] = pidfd;
		message.control = &rights;
		message.control_size = RIGHTS_SIZE(1);
	}
	/* An agent that does not hear it is gone; so is this process then. */
	sys3(SYS_SENDMSG, server, &message, MSG_NOSIGNAL);
	if (pidfd >= 0)
		sys3(SYS_CLOSE, pidfd, 0, 0);
}

static void reap(int number)
{
	(void)number;
	while (sys4(SYS_WAIT4, -1, 0, WNOHANG, 0) > 0)
		;
}

void serve_forks(int server)
{
	int fds[FORK_FDS_MAX], numbers[FORK_FDS_MAX];

	signal(SIGCHLD, reap);
	for (;;) {
		int count = receive_order(server, fds, numbers), pid = fork();

		if (pid == 0) {
			signal(SIGCHLD, SIG_DFL);
			/* One of the numbers is this socket's own. */
			for (int i = 0; i < count; i++)
				if (sys3(SYS_DUP2, fds[i], numbers[i], 0) < 0)
					end(1);
			for (int i = 0; i < count; i++)
				sys3(SYS_CLOSE, fds[i], 0, 0);
			return;
		}
		for (int i = 0; i < count; i++)
			sys3(SYS_CLOSE, fds[i], 0, 0);
		answer(server, pid > 0 ? pid : -*__errno_location());
	}
}
