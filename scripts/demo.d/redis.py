"""A redis, wherever it runs: its client, what it holds, and how it is found to be whole."""

import socket

from lab import VIP, wait_for
from load import WORKERS, Load

PORT = 6379
VALUE_BYTES = 1000
KEY_BYTES = 90
PROGRAMS = ["redis-server", "redis-cli", "redis-check-aof"]
# A client that is cut off tries again after this.
PATIENCE_S = 0.1


class Connection:
    """A connection to the redis at its address, from inside the client's network namespace."""

    def __init__(self, timeout_s):
        self.sock = socket.create_connection((VIP, PORT), timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest = b""

    def call(self, *words):
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            word = str(word).encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
        self.sock.sendall(b"".join(parts))
        return self.reply()

    def reply(self):
        """One of a line: all that the demo asks for is answered so."""
        while b"\r\n" not in self.rest:
            more = self.sock.recv(65536)
            if not more:
                raise ConnectionError("closed by the server")
            self.rest += more
        line, self.rest = self.rest.split(b"\r\n", 1)
        kind, text = line[:1], line[1:].decode()
        if kind == b"+":
            return text
        if kind == b":":
            return int(text)
        raise RuntimeError(text if kind == b"-" else "unexpected reply %r" % line)

    def close(self):
        self.sock.close()


class Counter(Connection):
    """Increments a key of its own in database 1."""

    def __init__(self, index):
        super().__init__(PATIENCE_S)
        self.key = "counter:%d" % index
        self.call("SELECT", 1)

    def write(self):
        return self.call("INCR", self.key)


class Redis:
    name = "redis"
    max_downtime = "200ms"
    clients = "%d that increment a key each" % WORKERS
    sound = "redis' digest of the untouched keys is identical, its append-only file is valid"

    def __init__(self, place, size_mb):
        self.place = place
        self.keys = size_mb * 1_000_000 // (VALUE_BYTES + KEY_BYTES)
        self.digest = None

    def start(self):
        """Starts it on A, with its keys; says what it holds."""
        self.place.start("redis-server", "--save", "", "--appendonly", "yes", "--dir", self.place.path,
                         "--protected-mode", "no", "--enable-debug-command", "yes")
        inside = self.place.inside
        wait_for("redis answers", lambda: "PONG" in inside("A", "redis-cli", "ping", check=False))
        inside("A", "redis-cli", "debug", "populate", str(self.keys), "key", str(VALUE_BYTES))
        return "redis holds %d keys" % self.keys

    def load(self):
        return Load(Counter)

    def note(self):
        """Notes, once a client reaches it, what must not change."""
        self.digest = self.ask_digest()

    def ask_digest(self):
        """redis' own digest of the key space that the load does not touch (database 0)."""
        connection = wait_for("redis answers the client", self.reach, 20)
        for words in ("SELECT", 1), ("FLUSHDB",), ("SELECT", 0):
            connection.call(*words)
        digest = connection.call("DEBUG", "DIGEST")
        connection.close()
        return digest

    def reach(self):
        try:
            connection = Connection(5)
            connection.call("PING")
            return connection
        except (OSError, RuntimeError):
            return None

    def check(self, host):
        """What is wrong with it; nothing if it is whole. Nobody else writes meanwhile."""
        if self.ask_digest() != self.digest:
            return "redis' digest of the keys that nobody touched is DIFFERENT"
        said = self.place.inside(host, "redis-check-aof", self.place.path + "/appendonlydir/appendonly.aof.manifest",
                                 check=False)
        if "All AOF files and manifest are valid" not in said:
            return "its append-only file is BROKEN: " + said
        return None
