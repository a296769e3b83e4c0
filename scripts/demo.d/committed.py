"""Output commit: clients whose connections are never opened again, through one power cut after the other."""

import multiprocessing
import random
import socket
import threading
import time

import redis
from lab import VIP, now_ms, wait_for

# A connection that is silent for longer is lost: no takeover takes so long.
PATIENCE_S = 20
DEPTH = 16
BULK_BYTES = 4 << 20
BULK_KEY = "bulk"
MEASURE_S = 3
# Between two power cuts, while the load runs.
CALM_S = 1.0, 2.0


class Plain(redis.Redis):
    """A redis without files of its own; the clients' keys are in database 1."""

    sound = "redis' digest of the untouched keys is identical"

    def start(self):
        self.place.start("redis-server", "--save", "", "--protected-mode", "no", "--enable-debug-command", "yes")
        inside = self.place.inside
        wait_for("redis answers", lambda: "PONG" in inside("A", "redis-cli", "ping", check=False))
        inside("A", "redis-cli", "debug", "populate", str(self.keys), "key", str(redis.VALUE_BYTES))
        return "redis holds %d keys" % self.keys

    def check(self, host):
        if self.ask_digest() != self.digest:
            return "redis' digest of the keys that nobody touched is DIFFERENT"
        return None


class Client(threading.Thread):
    """One connection. What breaks it is kept in `broken`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.connection = redis.Connection(PATIENCE_S)
        self.connection.call("SELECT", 1)
        self.done, self.broken = threading.Event(), None

    def run(self):
        try:
            while not self.done.is_set():
                self.turn()
        except (OSError, RuntimeError) as error:
            self.broken = repr(error)
        self.connection.close()

    def end(self):
        self.done.set()
        self.join(PATIENCE_S)
        return self.broken


class Counter(Client):
    """Increments a key of its own, so many at a time, and keeps what it was told."""

    def __init__(self, key, depth=1):
        super().__init__()
        self.key, self.depth = key, depth
        self.told = []
        words = ("INCR", key)
        request = b"*2\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words)
        self.request = request * depth

    def turn(self):
        sent = now_ms()
        self.connection.sock.sendall(self.request)
        for _ in range(self.depth):
            number = self.connection.reply()
            self.told.append((sent, now_ms(), number))

    def lost(self):
        """Increments that were acknowledged and taken back."""
        numbers = [number for _, _, number in self.told]
        return sum(max(0, before + 1 - after) for before, after in zip(numbers, numbers[1:]))

    def duplicated(self):
        """Increments that took effect more than once."""
        numbers = [number for _, _, number in self.told]
        return sum(max(0, after - before - 1) for before, after in zip(numbers, numbers[1:]))

    def latencies(self, begin, end):
        return [received - sent for sent, received, _ in list(self.told) if sent >= begin and received <= end]

    def gap(self, since, until):
        """The longest time without a reply."""
        times = [received for _, received, _ in self.told if since - 500 <= received <= until]
        return max((after - before for before, after in zip(times, times[1:])), default=0.0)


class Subscriber(Client):
    """Waits for messages, and says nothing."""

    def __init__(self):
        super().__init__()
        self.heard = []
        self.connection.sock.sendall(b"SUBSCRIBE news\r\n")
        self.connection.sock.settimeout(None)

    def turn(self):
        more = self.connection.sock.recv(65536)
        if not more and not self.done.is_set():
            raise ConnectionError("closed by the server")
        self.heard.append(more)

    def end(self):
        self.done.set()
        if not self.broken:
            self.connection.sock.shutdown(socket.SHUT_RDWR)
        return super().end()

    def has_heard(self, message):
        return message in b"".join(self.heard)


def bulk(pattern, counted, done, broken):
    """A process that reads the same value all the time and compares it."""
    head = b"$%d\r\n" % len(pattern)
    try:
        connection = redis.Connection(PATIENCE_S)
        connection.call("SELECT", 1)
        request, buffer = b"GET %s\r\n" % BULK_KEY.encode(), bytearray(len(head) + len(pattern) + 2)
        wanted = head + pattern + b"\r\n"
        connection.sock.sendall(request)
        while not done.value:
            # The next one is on its way while this one is read.
            connection.sock.sendall(request)
            view, at = memoryview(buffer), 0
            while at < len(buffer):
                length = connection.sock.recv_into(view[at:])
                if not length:
                    raise ConnectionError("closed by the server")
                at += length
                counted.value += length
            if buffer != wanted:
                raise RuntimeError("what was streamed is not what is stored")
    except (OSError, RuntimeError) as error:
        broken.put(repr(error))


class Bulk:
    def __init__(self, pattern):
        self.counted = multiprocessing.Value("Q", 0)
        self.done = multiprocessing.Value("b", 0)
        self.errors = multiprocessing.Queue()
        self.process = multiprocessing.Process(
            target=bulk, args=(pattern, self.counted, self.done, self.errors), daemon=True)
        self.process.start()

    def rate(self, seconds):
        """MB/s."""
        before, began = self.counted.value, now_ms()
        time.sleep(seconds)
        return (self.counted.value - before) / 1e3 / (now_ms() - began)

    @property
    def broken(self):
        return not self.errors.empty()

    def end(self):
        self.done.value = 1
        self.process.join(PATIENCE_S)
        if self.process.is_alive():
            self.process.kill()
            return "the stream stands still"
        return None if self.errors.empty() else self.errors.get()


def percentile(values, percent):
    values = sorted(values)
    return values[max(0, -(-len(values) * percent // 100) - 1)] if values else 0.0


class Story:
    """What is shown of a workload under output commit."""

    def __init__(self, demo, kills):
        self.demo, self.kills = demo, kills
        self.say = demo.story.say
        self.pattern = random.randbytes(BULK_BYTES // 16) * 16

    def measure(self, with_bulk):
        """Latencies of one closed loop alone, and MB/s of one stream alone."""
        counter = Counter("measured:%d" % now_ms())
        counter.start()
        time.sleep(0.5)
        begin = now_ms()
        time.sleep(MEASURE_S)
        broken = counter.end()
        latencies, rate = counter.latencies(begin, now_ms()), 0.0
        if with_bulk:
            stream = Bulk(self.pattern)
            time.sleep(0.5)
            rate = stream.rate(MEASURE_S)
            broken = stream.end() or broken
        if broken:
            raise SystemExit("demo: a client was cut off while it measured: %s" % broken)
        return latencies, rate

    def tell(self):
        demo = self.demo
        demo.begin()
        demo.protect("async")
        demo.lab.enter_client()
        demo.workload.note()
        store = redis.Connection(PATIENCE_S)
        store.call("SELECT", 1)
        value = self.pattern
        store.sock.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (
            len(BULK_KEY), BULK_KEY.encode(), len(value), value))
        store.reply()
        demo.lab.standin("A", "pause", "redis", "--json")
        plain, plain_rate = self.measure(True)
        self.say("unprotected: a reply after %.2f ms (p50), a stream of %.0f MB/s" % (
            percentile(plain, 50), plain_rate))
        demo.lab.standin("A", "resume", "redis", "--json")
        demo.lab.standin("A", "commit", "redis", "output", "--json")
        self.wait_gated()
        held, rate = self.measure(True)
        added = {percent: percentile(held, percent) - percentile(plain, percent) for percent in (50, 99)}
        self.say("output commit: each reply waits for an epoch, %.1f ms more (p50), %.1f (p99); a stream of %.0f MB/s" % (
            added[50], added[99], rate))
        figures = {
            "workload": "redis", "runtime": demo.workload.place.runtime, "commit": "output", "kills": self.kills,
            "added_latency_ms_p50": added[50], "added_latency_ms_p99": added[99],
            "bulk_mb_s": rate, "bulk_mb_s_unprotected": plain_rate,
        }
        figures.update(self.cuts())
        wrong = demo.check(demo.primary)
        self.say(wrong or demo.workload.sound)
        bad = figures["lost_acked_writes"] + figures["duplicated_writes"] + figures["connection_resets"]
        figures["digest_match"] = not wrong
        figures["ok"] = not wrong and bad == 0
        return figures

    def wait_gated(self):
        demo = self.demo
        demo.wait_protected()
        wait_for("output waits for its commit", lambda: (
            demo.status(demo.primary).get("held") or {}).get("output"))

    def cuts(self):
        demo = self.demo
        counter, pipelined, subscriber = Counter("counted"), Counter("pipelined", DEPTH), Subscriber()
        clients = {"the closed loop": counter, "the pipeline": pipelined, "the idle subscription": subscriber}
        for client in clients.values():
            client.start()
        stream = Bulk(self.pattern)
        clients["the stream"] = stream
        gaps = []
        for number in range(1, self.kills + 1):
            time.sleep(random.uniform(*CALM_S))
            gaps.append(self.cut(number, (counter, pipelined, subscriber, stream)))
            broken = [name for name, client in clients.items() if client.broken]
            if broken:
                self.say("%s did not survive" % " and ".join(broken), strong=True)
                break
        time.sleep(0.5)
        ends = {name: client.end() for name, client in clients.items()}
        for name, error in ends.items():
            if error:
                self.say("%s was cut off: %s" % (name, error), strong=True)
        lost = counter.lost() + pipelined.lost()
        duplicated = counter.duplicated() + pipelined.duplicated()
        resets = sum(1 for error in ends.values() if error)
        self.say("%d power cuts: %d and %d increments, %d lost, %d twice, %d of 4 connections broken; pauses %.0f ms "
                 "(p50), %.0f (max)" % (len(gaps), len(counter.told), len(pipelined.told), lost, duplicated, resets,
                                        percentile(gaps, 50), max(gaps)), strong=True)
        return {
            "acked_writes": len(counter.told) + len(pipelined.told),
            "lost_acked_writes": lost, "duplicated_writes": duplicated, "connection_resets": resets,
            "client_gap_ms_p50": percentile(gaps, 50), "client_gap_ms_max": max(gaps),
        }

    def cut(self, number, clients):
        """One power cut; how long the closed loop waited."""
        demo, (counter, pipelined, subscriber, stream) = self.demo, clients
        words = demo.lab.run("kill", demo.primary).stdout.split()
        killed_wall = float(words[words.index("killed") + 1]) * 1e3
        killed = now_ms()
        wait_for("%s takes over" % demo.standby, lambda: demo.promotion(killed_wall), 30)
        for name, client in (("the closed loop", counter), ("the pipeline", pipelined)):
            before = len(client.told)
            wait_for("%s goes on" % name, lambda: client.broken or len(client.told) > before + DEPTH, PATIENCE_S)
        streamed = stream.counted.value
        wait_for("the stream goes on", lambda: (
            stream.broken or stream.counted.value > streamed + BULK_BYTES), PATIENCE_S)
        news = b"message-%d." % number
        speaker = redis.Connection(PATIENCE_S)
        speaker.call("PUBLISH", "news", news.decode())
        speaker.close()
        wait_for("the subscription hears of it", lambda: subscriber.broken or subscriber.has_heard(news), PATIENCE_S)
        gap = counter.gap(killed, now_ms())
        demo.lab.run("boot", demo.primary)
        demo.start_host(demo.primary)
        demo.primary, demo.standby = demo.standby, demo.primary
        self.wait_gated()
        self.say("power cut %d: %s goes on %.0f ms later, and %s is its standby" % (
            number, demo.primary, gap, demo.standby))
        return gap
