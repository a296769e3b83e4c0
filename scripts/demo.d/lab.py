"""The lab (scripts/lab) as the demo uses it, and the clock that all of it shares."""

import ctypes
import json
import os
import subprocess
import time

SCRIPTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STANDIN = os.environ["STANDIN_BINARY"]
ROOTFS = os.path.join(SCRIPTS, "rootfs")
VIP = "10.77.0.100"
CLONE_NEWNET = 0x40000000


def now_ms():
    """One monotonic clock serves all: the lab's hosts share a kernel."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) * 1e3


def on_our_clock(wall_ms):
    """A time of the agents' wall clock, which may be set during a long run, by `now_ms`."""
    return wall_ms - time.time() * 1e3 + now_ms()


def wait_for(what, test, timeout_s=60):
    deadline = now_ms() + timeout_s * 1e3
    while now_ms() < deadline:
        value = test()
        if value:
            return value
        time.sleep(0.02)
    raise SystemExit("demo: gave up waiting until %s" % what)


class Lab:
    def __init__(self, keep=False):
        self.name = "demo%d" % os.getpid()
        # It goes when its owner does, whichever way that ends.
        self.owner = [] if keep else ["--owner", str(os.getpid())]

    def command(self, *args):
        return [os.path.join(SCRIPTS, "lab"), "--name", self.name, *args]

    def run(self, *args, check=True):
        done = subprocess.run(self.command(*args), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if check and done.returncode:
            raise SystemExit("demo: `%s` failed:\n%s%s" % (" ".join(args), done.stdout, done.stderr))
        return done

    def up(self):
        # Of the machine's /tmp, for one, the hosts see nothing.
        self.run("up", *self.owner, "--share", os.path.dirname(STANDIN))

    def on(self, host, *args, check=True):
        return self.run("on", host, *args, check=check).stdout

    def standin(self, host, *args, check=True):
        done = self.run("on", host, STANDIN, *args, check=check)
        return json.loads(done.stdout) if done.returncode == 0 and done.stdout.strip() else None

    def agent(self, host, log):
        """Starts the host's agent and waits until it answers."""
        with open(log, "ab") as out:
            subprocess.Popen(self.command("on", host, "setsid", STANDIN, "agent", "--name", host.lower(),
                                          "--state-dir", "/var/lib/standin"),
                             stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        wait_for("the agent on %s answers; its log is %s" % (host, log), lambda: self.run(
            "on", host, STANDIN, "status", "--json", check=False).returncode == 0, 20)

    def enter_client(self):
        """Moves this thread, and those that it starts later, into the client's network namespace."""
        libc = ctypes.CDLL(None, use_errno=True)
        runtime = "/run" if os.access("/run", os.W_OK) else "/tmp"
        with open("%s/standin-lab.%s/client/pid" % (runtime, self.name)) as file:
            pid = int(file.read())
        with open("/proc/%d/ns/net" % pid) as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
