"""The demo's story, told by what its client and the two agents observe; started by scripts/demo."""

import argparse
import ctypes
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
STANDIN = os.path.join(TOP, "target", "release", "standin")
VIP = "10.77.0.100"
PORT = 6379
VALUE_BYTES = 1000
WORKERS = 4


def now_ms():
    """One monotonic clock serves all: the lab's hosts share a kernel."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) * 1e3


WALL_AT_BOOT = time.time() * 1e3 - now_ms()


class Story:
    """Prints what happens as it happens, on standard error when JSON goes to standard output."""

    def __init__(self, as_json):
        self.out = sys.stderr if as_json else sys.stdout
        self.began = now_ms()
        self.colour = self.out.isatty()

    def say(self, text, strong=False):
        stamp = "%8.3f s" % ((now_ms() - self.began) / 1e3)
        if strong and self.colour:
            text = "\033[1m" + text + "\033[0m"
        print(stamp, " ", text, file=self.out, flush=True)


class Lab:
    def __init__(self):
        self.name = "demo%d" % os.getpid()

    def run(self, *args, check=True):
        done = subprocess.run([os.path.join(HERE, "lab"), "--name", self.name, *args],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if check and done.returncode:
            raise SystemExit("demo: `%s` failed:\n%s%s" % (" ".join(args), done.stdout, done.stderr))
        return done

    def on(self, host, *args, check=True):
        return self.run("on", host, *args, check=check).stdout

    def standin(self, host, *args, check=True):
        done = self.run("on", host, STANDIN, *args, check=check)
        return json.loads(done.stdout) if done.returncode == 0 and done.stdout.strip() else None

    def agent(self, host, log):
        """Starts the host's agent and waits until it answers."""
        out = open(log, "ab")
        subprocess.Popen([os.path.join(HERE, "lab"), "--name", self.name, "on", host, "setsid",
                          STANDIN, "agent", "--name", host.lower(), "--state-dir", "/var/lib/standin"],
                         stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        deadline = now_ms() + 20_000
        while now_ms() < deadline:
            if self.run("on", host, STANDIN, "status", "--json", check=False).returncode == 0:
                return
            time.sleep(0.05)
        raise SystemExit("demo: the agent on %s does not answer; its log is %s" % (host, log))


class Redis:
    """A connection to the redis at its address, from inside the client's network namespace."""

    def __init__(self, timeout_s):
        self.sock = socket.create_connection((VIP, PORT), timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(timeout_s)
        self.rest = b""

    def call(self, *words):
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            word = str(word).encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
        self.sock.sendall(b"".join(parts))
        return self.reply()

    def line(self):
        while b"\r\n" not in self.rest:
            more = self.sock.recv(65536)
            if not more:
                raise ConnectionError("closed by the server")
            self.rest += more
        line, self.rest = self.rest.split(b"\r\n", 1)
        return line

    def reply(self):
        line = self.line()
        kind, text = line[:1], line[1:].decode()
        if kind in (b"+", b"-"):
            if kind == b"-":
                raise RuntimeError(text)
            return text
        if kind == b":":
            return int(text)
        if kind == b"$":
            size = int(text)
            if size < 0:
                return None
            while len(self.rest) < size + 2:
                more = self.sock.recv(65536)
                if not more:
                    raise ConnectionError("closed by the server")
                self.rest += more
            body, self.rest = self.rest[:size], self.rest[size + 2:]
            return body.decode()
        raise RuntimeError("unexpected reply %r" % line)

    def close(self):
        self.sock.close()


class Counter(threading.Thread):
    """Increments one key in a closed loop, through reconnects, and records every acknowledgement.

    `acks` holds (sent, received, value): what the server told a client, and when.
    """

    def __init__(self, index):
        super().__init__(daemon=True)
        self.key = "counter:%d" % index
        self.acks = []
        self.reconnects = 0
        self.done = threading.Event()

    def run(self):
        redis = None
        while not self.done.is_set():
            try:
                if redis is None:
                    redis = Redis(0.1)
                    redis.call("SELECT", 1)
                sent = now_ms()
                value = redis.call("INCR", self.key)
                self.acks.append((sent, now_ms(), value))
                time.sleep(0.004)
            except (OSError, RuntimeError):
                self.reconnects += 1
                if redis is not None:
                    redis.close()
                    redis = None
                time.sleep(0.005)

    def stop(self):
        self.done.set()
        self.join()

    def after(self, when):
        """Index of the first acknowledgement of a request that was sent after `when`."""
        for index, (sent, _, _) in enumerate(self.acks):
            if sent > when:
                return index
        return None

    def first_reply_after(self, when):
        return next((received for _, received, _ in self.acks if received > when), None)

    def rolled_back(self):
        """Acknowledged increments that the server later did not know of (it counted on from less)."""
        lost = 0
        for before, after in zip(self.acks, self.acks[1:]):
            if after[2] <= before[2]:
                lost += before[2] - after[2] + 1
        return lost


class Load:
    def __init__(self):
        self.counters = [Counter(i) for i in range(WORKERS)]
        for counter in self.counters:
            counter.start()

    def stop(self):
        for counter in self.counters:
            counter.stop()

    def acked(self):
        return sum(len(counter.acks) for counter in self.counters)

    def rolled_back(self):
        return sum(counter.rolled_back() for counter in self.counters)

    def first_reply_after(self, when):
        replies = [counter.first_reply_after(when) for counter in self.counters]
        replies = [reply for reply in replies if reply is not None]
        return min(replies) if replies else None

    def longest_gap(self, since):
        """The longest time without any reply to anybody, milliseconds."""
        times = sorted(received for counter in self.counters for _, received, _ in counter.acks if received >= since)
        return max((b - a for a, b in zip(times, times[1:])), default=0.0)


def digest_of(host_redis):
    """redis' own digest of the key space that the load does not touch (database 0)."""
    host_redis.call("SELECT", 1)
    host_redis.call("FLUSHDB")
    host_redis.call("SELECT", 0)
    return host_redis.call("DEBUG", "DIGEST")


def wait_for(what, test, timeout_s=60):
    deadline = now_ms() + timeout_s * 1e3
    while now_ms() < deadline:
        value = test()
        if value:
            return value
        time.sleep(0.02)
    raise SystemExit("demo: gave up waiting until %s" % what)


def percentile(values, percent):
    values = sorted(values)
    return values[max(0, -(-len(values) * percent // 100) - 1)] if values else 0.0


CLONE_NEWNET = 0x40000000


def enter_client(lab):
    """Moves this process into the client's network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    runtime = "/run" if os.access("/run", os.W_OK) else "/tmp"
    with open("%s/standin-lab.%s/client/pid" % (runtime, lab.name)) as file:
        pid = int(file.read())
    with open("/proc/%d/ns/net" % pid) as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def workload(lab, host):
    return lab.standin(host, "status", "redis", "--json", check=False)


def watch(lab, host, story, seconds):
    """Tells what the agent says of its epochs, twice a second."""
    until = now_ms() + seconds * 1e3
    while now_ms() < until:
        status = workload(lab, host)
        if status and status["last"]:
            last = status["last"]
            story.say("epoch %s.%s  frozen %5.1f ms  dirty %7.1f KiB  shipped %7.1f KiB  lag %s ms" % (
                last["id"]["term"], last["id"]["epoch"], last["frozen_us"] / 1e3, last["dirty_bytes"] / 1024,
                last["shipped_bytes"] / 1024, status["lag_ms"]))
        time.sleep(0.5)


def tell(options, story, lab, logs):
    figures = {}
    lab.run("up", "--owner", str(os.getpid()))
    story.say("two hosts, a switch and a client are up (namespaces of lab %s)" % lab.name)
    for host in "AB":
        lab.agent(host, logs[host])
    code = lab.standin("A", "pair", "--listen", "--json")
    lab.on("B", STANDIN, "pair", "10.77.0.1:%d" % code["port"], code["code"])
    story.say("agents run on both and trust each other")

    lab.standin("A", "run", "redis", "--ip", VIP + "/24", "--json", "--", "redis-server", "--save", "",
                "--appendonly", "no", "--protected-mode", "no", "--enable-debug-command", "yes")
    keys = options.size * 1_000_000 // (VALUE_BYTES + 90)
    wait_for("redis answers", lambda: "PONG" in lab.on("A", "redis-cli", "-h", VIP, "ping", check=False))
    lab.on("A", "redis-cli", "-h", VIP, "debug", "populate", str(keys), "key", str(VALUE_BYTES))
    lab.standin("A", "protect", "redis", "--to", "b", "--every", "200ms", "--vip", VIP + "/24@eth0", "--json")
    story.say("redis holds %d keys on A and is being protected; B is its standby" % keys)
    wait_for("the first epoch is committed", lambda: (workload(lab, "A") or {}).get("state") == "protected")
    enter_client(lab)
    before = wait_for_redis()
    digest = digest_of(before)
    before.close()

    load = Load()
    watch(lab, "A", story, 5)
    history = lab.standin("A", "history", "redis", "--json")
    epochs = [epoch for epoch in history["epochs"] if not epoch["full"]]
    status = workload(lab, "A")
    figures["rss_bytes"] = status["last"]["resident_bytes"]
    figures["epochs"] = len(history["epochs"])
    figures["frozen_ms_p50"] = percentile([e["frozen_us"] / 1e3 for e in epochs], 50)
    figures["frozen_ms_p99"] = percentile([e["frozen_us"] / 1e3 for e in epochs], 99)
    figures["dirty_bytes"] = int(statistics.median([e["dirty_bytes"] for e in epochs] or [0]))
    figures["shipped_bytes"] = int(statistics.median([e["shipped_bytes"] for e in epochs] or [0]))
    # The age of the newest committed epoch just before the next commits: interval + freeze + ship.
    commits = [e["frozen_at_unix_ms"] + (e["frozen_us"] + e["ship_us"]) / 1e3 for e in epochs]
    ages = [commit - e["frozen_at_unix_ms"] for e, commit in zip(epochs, commits[1:])]
    figures["lag_ms_p50"] = percentile(ages, 50)

    words = lab.run("kill", "A").stdout.split()
    killed_wall = float(words[words.index("killed") + 1]) * 1e3
    killed = killed_wall - WALL_AT_BOOT
    story.say("host A is dead: link first, then everything on it", strong=True)
    promoted = wait_for("B tells of its promotion", lambda: promotion(lab), 30)
    phases = promoted["phases_ms"]
    decided_wall = promoted["at_unix_ms"] - phases["restore"] - phases["network"]
    # What came from A was sent before its link went; B cannot answer before it has decided to promote.
    first = wait_for("a client is answered by B", lambda: load.first_reply_after(decided_wall - WALL_AT_BOOT), 30)
    figures["detect_ms"] = decided_wall - killed_wall
    figures["kill_to_first_reply_ms"] = first - killed
    figures["restored_term"] = promoted["term"]
    figures["restored_epoch"] = promoted["epoch"]["epoch"]
    figures["lag_at_kill_ms"] = phases["lag"] - figures["detect_ms"]
    story.say("    detection          %7.1f ms" % figures["detect_ms"])
    story.say("    restore            %7.1f ms (of it CRIU %.1f ms)" % (phases["restore"], phases["criu"]))
    story.say("    gate and address   %7.1f ms" % phases["network"])
    story.say("    client's retry     %7.1f ms" % (first - killed - figures["detect_ms"] - phases["restore"] - phases["network"]))
    story.say("B answers %.0f ms after the kill, with epoch %s.%s under term %s" % (
        first - killed, promoted["epoch"]["term"], promoted["epoch"]["epoch"], promoted["term"]), strong=True)

    time.sleep(1.0)
    load.stop()
    figures["acked_writes"] = load.acked()
    figures["rolled_back_writes"] = load.rolled_back()
    after = wait_for_redis()
    match = digest_of(after) == digest
    after.close()
    story.say("redis' digest of the untouched keys is %s; of %d acknowledged writes %d were rolled back" % (
        "identical" if match else "DIFFERENT", figures["acked_writes"], figures["rolled_back_writes"]))

    lab.run("boot", "A")
    lab.agent("A", logs["A"])
    story.say("host A is back; its agent sees the newer term")
    wait_for("A is the standby", lambda: (workload(lab, "A") or {}).get("role") == "standby")
    wait_for("A holds an epoch", lambda: (workload(lab, "B") or {}).get("state") == "protected")
    story.say("A is the standby of B now and holds a whole epoch")

    load = Load()
    time.sleep(1.0)
    began = now_ms()
    report = lab.standin("B", "handoff", "redis", "--json")
    time.sleep(1.0)
    load.stop()
    figures["handoff_downtime_ms"] = load.longest_gap(began - 100)
    figures["handoff_total_ms"] = report["total_ms"]
    figures["handoff_lost_writes"] = load.rolled_back()
    story.say("handed back to A: clients waited %.0f ms (agents: %.0f ms frozen), %d writes lost, %d reconnects" % (
        figures["handoff_downtime_ms"], report["downtime_ms"], figures["handoff_lost_writes"],
        sum(counter.reconnects for counter in load.counters)), strong=True)
    last = wait_for_redis()
    match = match and digest_of(last) == digest
    last.close()
    figures["digest_match"] = match
    roles = (workload(lab, "A") or {}).get("role"), (workload(lab, "B") or {}).get("role")
    figures["ok"] = bool(match and figures["handoff_lost_writes"] == 0 and roles == ("primary", "standby"))
    return figures


def promotion(lab):
    history = lab.standin("B", "history", "redis", "--json", check=False)
    return next((event for event in (history or {"events": []})["events"] if event["kind"] == "promoted"), None)


def wait_for_redis():
    def attempt():
        try:
            redis = Redis(5)
            redis.call("PING")
            return redis
        except (OSError, RuntimeError):
            return None
    return wait_for("redis answers the client", attempt, 20)


def main():
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.add_argument("--size", type=int, default=256, metavar="MB", help="megabytes of keys in redis")
    parser.add_argument("--keep", action="store_true", help="leave the lab standing")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("demo: needs root (namespaces, CRIU)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    story, lab = Story(options.json), Lab()
    logs = {host: "/tmp/standin-%s-%s.log" % (lab.name, host) for host in "AB"}
    ended_well = False
    try:
        figures = tell(options, story, lab, logs)
        ended_well = figures["ok"]
    finally:
        if options.keep:
            story.say("kept: scripts/lab --name %s on A|B|client CMD, then scripts/lab --name %s down" % (
                lab.name, lab.name))
        else:
            lab.run("down", check=False)
        if ended_well:
            for log in logs.values():
                os.unlink(log)
        else:
            story.say("the agents' logs: %s" % ", ".join(logs.values()))
    if options.json:
        print(json.dumps({key: round(value, 3) if isinstance(value, float) else value
                          for key, value in figures.items()}))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
