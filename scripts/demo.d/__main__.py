"""The demo's story, told by what its clients and the two agents observe; started by scripts/demo."""

import argparse
import json
import os
import signal
import statistics
import sys
import time

import committed
import postgres
import redis
from lab import VIP, Lab, now_ms, on_our_clock, wait_for
from places import Docker, Oci, Sandbox

# The load before a power cut: long enough for the figures of one, short enough for many; some epochs in any case.
WATCH_S, WATCH_OF_MANY_S = 5, 3
WATCH_EPOCHS_MIN, WATCH_S_MAX = 5, 60
# When an epoch was frozen is known to this: the agents round what they tell of it to milliseconds.
ROUNDING_MS = 5

WORKLOADS = {
    "redis": lambda lab, size_mb: redis.Redis(Sandbox(lab, "redis", "/srv/redis"), size_mb),
    "runc": lambda lab, size_mb: redis.Redis(Oci(lab, "redis", "runc", redis.PROGRAMS), size_mb),
    "crun": lambda lab, size_mb: redis.Redis(Oci(lab, "redis", "crun", redis.PROGRAMS), size_mb),
    "docker": lambda lab, size_mb: redis.Redis(Docker(lab, "redis", redis.PROGRAMS, redis.PORT), size_mb),
    "postgres": lambda lab, _: postgres.Postgres(Sandbox(lab, "postgres", postgres.DATA, "postgres")),
}


class Interrupted(SystemExit):
    pass


class Story:
    """Prints what happens as it happens, on standard error when JSON goes to standard output."""

    def __init__(self, as_json, brief):
        self.out = sys.stderr if as_json else sys.stdout
        self.brief = brief
        self.began = now_ms()
        self.colour = self.out.isatty()

    def say(self, text, strong=False):
        stamp = "%8.3f s" % ((now_ms() - self.began) / 1e3)
        if strong and self.colour:
            text = "\033[1m" + text + "\033[0m"
        print(stamp, " ", text, file=self.out, flush=True)

    def detail(self, text, strong=False):
        """What is left out when there are many rounds."""
        if not self.brief:
            self.say(text, strong)


class Demo:
    """Two hosts, a workload that runs on `primary`, and what they have shown so far."""

    def __init__(self, lab, workload, story, logs):
        self.lab, self.workload, self.story, self.logs = lab, workload, story, logs
        self.primary, self.standby = "A", "B"

    def begin(self):
        """Two hosts whose agents trust each other, and the workload on A."""
        lab, story = self.lab, self.story
        lab.up()
        story.say("two hosts, a switch and a client are up (namespaces of lab %s)" % lab.name)
        for host in "AB":
            self.start_host(host)
        code = lab.standin("A", "pair", "--listen", "--json")
        lab.standin("B", "pair", "10.77.0.1:%d" % code["port"], code["code"], "--json")
        story.say("agents run on both and trust each other")
        self.holds = self.workload.start()

    def protect(self, commit):
        self.lab.standin("A", "protect", self.workload.name, *self.workload.place.protect_flags, "--to", "b",
                         "--every", "200ms", "--commit", commit, "--vip", VIP + "/24@eth0", "--json")
        self.story.say("%s on A (%s) and is being protected; B is its standby" % (
            self.holds, self.workload.place.runtime))
        self.wait_protected()

    def start(self):
        self.begin()
        self.protect("async")
        self.story.say("the clients: %s" % self.workload.clients)
        self.lab.enter_client()
        self.workload.note()

    def start_host(self, host):
        self.workload.place.boot(host)
        self.lab.agent(host, self.logs[host])

    def status(self, host):
        return self.lab.standin(host, "status", self.workload.name, "--json", check=False) or {}

    def history(self, host):
        told = self.lab.standin(host, "history", self.workload.name, "--json", check=False)
        return told or {"events": [], "epochs": []}

    def wait_protected(self):
        wait_for("%s is the standby" % self.standby, lambda: self.status(self.standby).get("role") == "standby")
        wait_for("%s holds an epoch" % self.standby, lambda: self.status(self.primary).get("state") == "protected")

    def watch(self, seconds):
        """Tells what the agent says of its epochs, twice a second."""
        began, first = now_ms(), None
        while now_ms() - began < WATCH_S_MAX * 1e3:
            status = self.status(self.primary)
            last = status.get("last")
            if last:
                first = first or last["id"]["epoch"]
                if now_ms() - began > seconds * 1e3 and last["id"]["epoch"] >= first + WATCH_EPOCHS_MIN:
                    return
                self.story.detail("epoch %s.%s  frozen %5.1f ms  dirty %7.1f KiB  shipped %7.1f KiB  lag %s ms" % (
                    last["id"]["term"], last["id"]["epoch"], last["frozen_us"] / 1e3, last["dirty_bytes"] / 1024,
                    last["shipped_bytes"] / 1024, status["lag_ms"]))
            time.sleep(0.5)

    def pace(self):
        """Figures over the epochs of this term."""
        status = self.status(self.primary)
        history = [epoch for epoch in self.history(self.primary)["epochs"] if epoch["id"]["term"] == status["term"]]
        epochs = [epoch for epoch in history if not epoch["full"]]
        # The age of the newest committed epoch just before the next commits: interval + freeze + ship.
        commits = [e["frozen_at_unix_ms"] + (e["frozen_us"] + e["ship_us"]) / 1e3 for e in epochs]
        ages = [commit - e["frozen_at_unix_ms"] for e, commit in zip(epochs, commits[1:])]
        return {
            "rss_bytes": status["last"]["resident_bytes"],
            "epochs": len(history),
            "frozen_ms_p50": percentile([e["frozen_us"] / 1e3 for e in epochs], 50),
            "frozen_ms_p99": percentile([e["frozen_us"] / 1e3 for e in epochs], 99),
            "dirty_bytes": int(statistics.median([e["dirty_bytes"] for e in epochs] or [0])),
            "shipped_bytes": int(statistics.median([e["shipped_bytes"] for e in epochs] or [0])),
            "lag_ms_p50": percentile(ages, 50),
        }

    def promotion(self, after_wall_ms):
        events = [event for event in self.history(self.standby)["events"] if event["at_unix_ms"] > after_wall_ms]
        return next((event for event in events if event["kind"] == "promoted"), None)

    def round(self, watch_s):
        """A load, a power cut, the takeover, the check, the killed host's way back as the standby."""
        story, detail = self.story, self.story.detail
        load = self.workload.load()
        self.watch(watch_s)
        figures = self.pace()
        decided, lag = self.cut_power(load, figures)
        wait_for("every client is answered again", lambda: load.all_answered_after(decided))
        time.sleep(1.0)
        load.stop()
        figures["acked_writes"] = load.acked()
        figures["rolled_back_writes"] = load.rolled_back()
        # What was acknowledged before the epoch was frozen is in it.
        lost = load.rolled_back(before=decided - lag - ROUNDING_MS)
        wrong = lost and "%d writes are LOST that were acknowledged before the restored epoch" % lost
        wrong = wrong or self.check(self.standby)
        figures["digest_match"] = figures["ok"] = not wrong
        (story.say if wrong else detail)("%s; of %d acknowledged writes %d were rolled back" % (
            wrong or self.workload.sound, figures["acked_writes"], figures["rolled_back_writes"]))

        self.lab.run("boot", self.primary)
        self.start_host(self.primary)
        detail("host %s is back; its agent sees the newer term" % self.primary)
        self.primary, self.standby = self.standby, self.primary
        self.wait_protected()
        detail("%s is the standby of %s now and holds a whole epoch" % (self.standby, self.primary))
        return figures

    def cut_power(self, load, figures):
        """Says when the standby decided to take over, and how old the epoch was that it took."""
        detail = self.story.detail
        words = self.lab.run("kill", self.primary).stdout.split()
        killed_wall = float(words[words.index("killed") + 1]) * 1e3
        killed = on_our_clock(killed_wall)
        detail("host %s is dead: link first, then everything on it" % self.primary, strong=True)
        promoted = wait_for("%s tells of its promotion" % self.standby, lambda: self.promotion(killed_wall), 30)
        epoch, phases = promoted["epoch"], promoted["phases_ms"]
        decided_wall = promoted["at_unix_ms"] - phases["restore"] - phases["network"]
        decided = on_our_clock(decided_wall)
        load.again()
        # What came from the dead host was sent before its link went; the other cannot answer before it has decided to
        # promote.
        first = wait_for("a client is answered by %s" % self.standby, lambda: load.first_reply_after(decided), 30)
        detect, answered = decided_wall - killed_wall, first - killed
        figures["detect_ms"] = detect
        figures["kill_to_first_reply_ms"] = answered
        figures["restored_term"] = promoted["term"]
        figures["restored_epoch"] = epoch["epoch"]
        figures["lag_at_kill_ms"] = phases["lag"] - detect
        detail("    detection          %7.1f ms" % detect)
        detail("    restore            %7.1f ms (of it CRIU %.1f ms)" % (phases["restore"], phases["criu"]))
        detail("    gate and address   %7.1f ms" % phases["network"])
        detail("    client's retry     %7.1f ms" % (answered - detect - phases["restore"] - phases["network"]))
        detail("%s answers %.0f ms after the kill, with epoch %s.%s under term %s" % (
            self.standby, answered, epoch["term"], epoch["epoch"], promoted["term"]), strong=True)
        return decided, phases["lag"]

    def tell_round(self, number, figures):
        self.story.say(
            "round %d, to %s: detected in %.0f ms, answered after %.0f ms, epoch %s under term %s; of %d writes %d "
            "rolled back; %s" % (
                number, self.primary, figures["detect_ms"], figures["kill_to_first_reply_ms"],
                figures["restored_epoch"], figures["restored_term"], figures["acked_writes"],
                figures["rolled_back_writes"], "all is right" if figures["ok"] else "NOT RIGHT"), strong=True)

    def check(self, host):
        """What is wrong with the workload or with what its runtime knows of it; nothing if all is right."""
        wrong = self.workload.check(host)
        known = self.workload.place.known(host)
        if known:
            self.story.detail(known)
            return wrong
        return wrong or "its runtime (%s) on %s does NOT know it as running" % (self.workload.place.runtime, host)

    def hand_over(self):
        load = self.workload.load()
        time.sleep(1.0)
        began = now_ms()
        report = self.lab.standin(self.primary, "handoff", self.workload.name,
                                  "--max-downtime", self.workload.max_downtime, "--json")
        self.primary, self.standby = self.standby, self.primary
        time.sleep(1.0)
        load.stop()
        lost = load.rolled_back()
        gap = load.longest_gap(began - 100)
        self.story.say(
            "handed over to %s: clients waited %.0f ms (agents: %.0f ms frozen), %d writes lost, %d reconnects" % (
                self.primary, gap, report["downtime_ms"], lost, load.reconnects()), strong=True)
        wrong = self.check(self.primary)
        self.story.say(wrong or self.workload.sound)
        roles = [self.status(host).get("role") for host in (self.primary, self.standby)]
        return {
            "handoff_downtime_ms": gap,
            "handoff_total_ms": report["total_ms"],
            "handoff_lost_writes": lost,
            "digest_match": not wrong,
            "ok": not wrong and lost == 0 and roles == ["primary", "standby"],
        }


def tell(options, demo):
    demo.start()
    rounds = []
    for number in range(1, options.rounds + 1):
        rounds.append(demo.round(WATCH_S if options.rounds == 1 else WATCH_OF_MANY_S))
        if options.rounds > 1:
            demo.tell_round(number, rounds[-1])
    handoff = demo.hand_over()
    return {
        "workload": options.workload,
        "runtime": demo.workload.place.runtime,
        **rounds[0],
        **handoff,
        "digest_match": all(part["digest_match"] for part in [*rounds, handoff]),
        "ok": all(part["ok"] for part in [*rounds, handoff]),
        "rounds": rounds,
    }


def percentile(values, percent):
    values = sorted(values)
    return values[max(0, -(-len(values) * percent // 100) - 1)] if values else 0.0


def rounded(value):
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def interrupt(*_):
    raise Interrupted("demo: interrupted")


def main():
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--workload", choices=WORKLOADS, default="redis")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--commit", choices=("async", "output"), default="async")
    parser.add_argument("--kills", type=int, metavar="N")
    parser.add_argument("--size", type=int, metavar="MB")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    if options.rounds < 1 or (options.kills or 1) < 1:
        parser.error("--rounds and --kills are at least 1")
    commits = options.commit == "output"
    if options.kills and not commits:
        parser.error("--kills belongs to --commit output; --rounds is what cuts the power otherwise")
    if commits and (options.workload != "redis" or options.rounds > 1):
        parser.error("--commit output is shown with redis, and takes --kills")
    size_mb = options.size or (16 if commits else 256)
    if os.geteuid() != 0:
        raise SystemExit("demo: needs root (namespaces, CRIU)")
    ends = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    for end in ends:
        signal.signal(end, interrupt)
    story, lab = Story(options.json, brief=options.rounds > 1), Lab(options.keep)
    logs = {host: "/tmp/standin-%s-%s.log" % (lab.name, host) for host in "AB"}
    logs_matter = True
    try:
        if commits:
            workload = committed.Plain(Sandbox(lab, "redis", "/srv/redis"), size_mb)
            figures = committed.Story(Demo(lab, workload, story, logs), options.kills or 5).tell()
        else:
            figures = tell(options, Demo(lab, WORKLOADS[options.workload](lab, size_mb), story, logs))
        logs_matter = not figures["ok"]
    except Interrupted:
        logs_matter = False
        raise
    finally:
        for end in ends:
            signal.signal(end, signal.SIG_IGN)
        if options.keep:
            story.say("kept: scripts/lab --name %s on A|B|client CMD, then scripts/lab --name %s down" % (
                lab.name, lab.name))
        else:
            lab.run("down", check=False)
        if logs_matter or options.keep:
            story.say("the agents' logs: %s" % ", ".join(logs.values()))
        else:
            for log in logs.values():
                if os.path.exists(log):
                    os.unlink(log)
    if options.json:
        print(json.dumps(rounded(figures)))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
