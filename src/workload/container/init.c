/*
 * The init of a wrapped container: its pid 1, `/.standin/init COMMAND…`.
 *
 * It starts the container's own command as its child, in a session of its own, so that CRIU can dump that as a bare tree
 * from inside the container's namespaces; passes signals on to it, reaps what is left to it, and ends as it ends. On the
 * standby the engine starts the same container, and it waits for the tree that is restored beside it.
 *
 *   order        when it starts                 when its child ends
 *   (none), run  starts the command             ends as the child did
 *   wait         waits for another order        waits for another order
 *   track PID    waits for another order        ends as the child did; PID is that child
 *
 * The order is a line in the file `order` beside it, which the agent replaces by rename. Whoever starts the container
 * while it is protected, an operator or the engine after a reboot, so never makes a second copy of the workload.
 *
 * Freestanding, because it must run in any image. It never waits for a disk but in exec, and never for the agent. x86-64
 * alone.
 */

typedef unsigned long u64;

#define SYS_READ 0
#define SYS_WRITE 1
#define SYS_OPEN 2
#define SYS_CLOSE 3
#define SYS_RT_SIGPROCMASK 14
#define SYS_GETPID 39
#define SYS_FORK 57
#define SYS_EXECVE 59
#define SYS_WAIT4 61
#define SYS_KILL 62
#define SYS_SETSID 112
#define SYS_RT_SIGTIMEDWAIT 128
#define SYS_EXIT_GROUP 231

#define ENOENT 2
#define EACCES 13
#define ENOTDIR 20

#define SIGINT 2
#define SIGQUIT 3
#define SIGTERM 15
#define SIGCHLD 17
#define SIG_SETMASK 2
#define WNOHANG 1
#define O_CLOEXEC 02000000

/* What the shell and the engines call "could not be executed" and "was not found". */
#define CANNOT_EXECUTE 126
#define NOT_FOUND 127

#define ORDER_BYTES_MAX 64
#define PATH_BYTES_MAX 4096
/* Children whose end nobody has asked for yet: of a tree that ends right after it was restored. */
#define ENDED_MAX 64
/* How soon a new order is seen; and how soon somebody waits for a restored tree's end. */
#define ORDER_INTERVAL_NS 20000000

struct timespec {
	long s, ns;
};

static long sys4(long number, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return result;
}

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

static void say(const char *text)
{
	sys4(SYS_WRITE, 2, (long)text, (long)length(text), 0);
}

static void end(int code)
{
	for (;;)
		sys4(SYS_EXIT_GROUP, code, 0, 0, 0);
}

/* ---- the order ---- */

enum { RUN, WAIT, TRACK };

struct order {
	int kind;
	long pid;
};

/* An order that cannot be read is none to run: two copies are worse than none. */
static struct order read_order(void)
{
	struct order order = { RUN, 0 };
	char text[ORDER_BYTES_MAX];
	long fd, n;

	fd = sys4(SYS_OPEN, (long)"/.standin/order", O_CLOEXEC, 0, 0);
	if (fd == -ENOENT)
		return order;
	order.kind = WAIT;
	if (fd < 0)
		return order;
	n = sys4(SYS_READ, fd, (long)text, sizeof(text) - 1, 0);
	sys4(SYS_CLOSE, fd, 0, 0, 0);
	if (n <= 0)
		return order;
	text[n] = 0;
	if (starts_with(text, "run")) {
		order.kind = RUN;
	} else if (starts_with(text, "track ")) {
		order.kind = TRACK;
		for (const char *at = text + length("track "); *at >= '0' && *at <= '9'; at++)
			order.pid = order.pid * 10 + (*at - '0');
	}
	return order;
}

/* ---- the command ---- */

static long execute_in(const char *dir, u64 dir_length, char **argv, char **environment)
{
	char path[PATH_BYTES_MAX];
	u64 n = 0, name = length(argv[0]);

	if (dir_length + 1 + name + 1 > sizeof(path))
		return -ENOENT;
	for (; n < dir_length; n++)
		path[n] = dir[n];
	/* An empty entry of PATH is the directory that the process is in. */
	if (n)
		path[n++] = '/';
	for (u64 i = 0; i <= name; i++)
		path[n++] = argv[0][i];
	return sys4(SYS_EXECVE, (long)path, (long)argv, (long)environment, 0);
}

static const char *search_path(char **environment)
{
	for (; *environment; environment++)
		if (starts_with(*environment, "PATH="))
			return *environment + length("PATH=");
	return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
}

/* Returns only with an error. */
static long execute(char **argv, char **environment)
{
	const char *path = search_path(environment);
	long error = -ENOENT;

	for (const char *c = argv[0]; *c; c++)
		if (*c == '/')
			return sys4(SYS_EXECVE, (long)argv[0], (long)argv, (long)environment, 0);
	for (;;) {
		u64 n = 0;
		long tried;

		while (path[n] && path[n] != ':')
			n++;
		tried = execute_in(path, n, argv, environment);
		if (tried != -ENOENT && tried != -ENOTDIR && (error = tried) != -EACCES)
			return error;
		if (!path[n])
			return error;
		path += n + 1;
	}
}

static long start(char **argv, char **environment, const u64 *mask)
{
	long error, child = sys4(SYS_FORK, 0, 0, 0, 0);

	if (child < 0) {
		say("standin init: cannot fork\n");
		end(CANNOT_EXECUTE);
	}
	if (child)
		return child;
	/* CRIU wants the root of a tree to lead a session. */
	sys4(SYS_SETSID, 0, 0, 0, 0);
	sys4(SYS_RT_SIGPROCMASK, SIG_SETMASK, (long)mask, 0, sizeof(*mask));
	error = execute(argv, environment);
	say("standin init: cannot execute ");
	say(argv[0]);
	say(error == -ENOENT ? ": no such file\n" : error == -EACCES ? ": permission denied\n" : "\n");
	end(error == -ENOENT ? NOT_FOUND : CANNOT_EXECUTE);
	return 0;
}

/* ---- what it looks after ---- */

/* The child whose end is the container's; 0 while there is none. */
static long tracked;

static struct {
	long pid;
	int status;
} ended[ENDED_MAX];
static int ended_next;

static int code_of(int status)
{
	int signal = status & 0x7f;

	return signal ? 128 + signal : status >> 8 & 0xff;
}

static void track(long pid)
{
	tracked = pid;
	for (int i = 0; i < ENDED_MAX; i++)
		if (ended[i].pid == pid)
			end(code_of(ended[i].status));
}

static void reap(void)
{
	int status;
	long pid;

	while ((pid = sys4(SYS_WAIT4, -1, (long)&status, WNOHANG, 0)) > 0) {
		if (pid != tracked) {
			ended[ended_next].pid = pid;
			ended[ended_next].status = status;
			ended_next = (ended_next + 1) % ENDED_MAX;
		} else if (read_order().kind == WAIT) {
			tracked = 0;
		} else {
			end(code_of(status));
		}
	}
}

static void pass_on(long number)
{
	if (tracked)
		sys4(SYS_KILL, tracked, number, 0, 0);
	else if (number == SIGTERM || number == SIGINT || number == SIGQUIT)
		end(128 + (int)number);
}

__attribute__((used)) static void run(u64 *stack)
{
	long count = (long)stack[0];
	char **argv = (char **)(stack + 1), **environment = argv + count + 1;
	static const struct timespec interval = { 0, ORDER_INTERVAL_NS };
	u64 all = ~0UL, mask = 0;

	if (count < 2) {
		say("usage: /.standin/init COMMAND…, as the entry point of a container\n");
		end(2);
	}
	if (sys4(SYS_GETPID, 0, 0, 0, 0) != 1) {
		say("standin init: must be the container's pid 1: start it without the engine's own --init and without "
		    "the host's pid namespace\n");
		end(CANNOT_EXECUTE);
	}
	sys4(SYS_RT_SIGPROCMASK, SIG_SETMASK, (long)&all, (long)&mask, sizeof(all));
	if (read_order().kind == RUN)
		tracked = start(argv + 1, environment, &mask);
	for (;;) {
		long number =
			sys4(SYS_RT_SIGTIMEDWAIT, (long)&all, 0, tracked ? 0 : (long)&interval, sizeof(all));

		if (number == SIGCHLD)
			reap();
		else if (number > 0)
			pass_on(number);
		if (!tracked) {
			struct order order = read_order();

			if (order.kind == RUN)
				tracked = start(argv + 1, environment, &mask);
			else if (order.kind == TRACK && order.pid > 0)
				track(order.pid);
		}
	}
}

/* The kernel starts it with its arguments on the stack. */
__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rsp, %rdi\n"
	"	and $-16, %rsp\n"
	"	call run\n"
	"	hlt\n");
