"""A PostgreSQL as it comes, in a sandbox, under pgbench: its client, its load, and how it is found to be whole."""

import socket
import struct
import subprocess
import threading

from lab import VIP, wait_for
from load import WORKERS, Load

PORT = 5432
# Debian's are in a directory of their version.
PROGRAMS = "PATH=$(echo /usr/lib/postgresql/*/bin):$PATH"
DATA = "/srv/pg"
# pgbench's unit: 100,000 accounts, 15 MB.
SCALE = 4
CONNECTIONS = 32
# More would keep all processors of a small machine busy, the agents' too.
TRANSACTIONS_PER_S = 300
# A client that is cut off tries again after this.
PATIENCE_S = 0.25
QUERY_TIMEOUT_S = 60

INITDB = """
set -e; %s; mkdir -p %s; chown postgres: %s
setpriv --reuid postgres --regid postgres --clear-groups \
    initdb -D %s --data-checksums -A trust -E UTF8 --no-sync > /dev/null
printf 'host %%s all 0.0.0.0/0 trust\\n' all replication >> %s/pg_hba.conf
command -v postgres
""" % (PROGRAMS, DATA, DATA, DATA, DATA)

SETTINGS = [
    "listen_addresses=*", "unix_socket_directories=/tmp", "max_connections=300",
    # Small enough that a demo sees its checkpoints come and its log files be used again.
    "shared_buffers=32MB", "max_wal_size=64MB", "min_wal_size=32MB", "checkpoint_timeout=30s",
    # A power cut leaves sessions whose clients are gone or are ahead of them: they end soon, and with them their locks.
    "tcp_keepalives_idle=2", "tcp_keepalives_interval=1", "tcp_keepalives_count=3",
    "idle_in_transaction_session_timeout=2s",
]

TABLES = "create extension amcheck; create table ledger (writer int, n bigint, primary key (writer, n))"

FILL = """
set -e; %s; export PGHOST=%s PGUSER=postgres
for i in $(seq 200); do pg_isready -q && break; sleep 0.1; done
pgbench -q -i -s %d postgres
psql -q -c '%s'
""" % (PROGRAMS, VIP, SCALE, TABLES)

# In the log of a server that has crashed, or was started again on what was left.
TROUBLE = "PANIC|was terminated by signal|was interrupted|invalid page|redo starts"


class Connection:
    """A session by the protocol's third version, simple queries only, from inside the client's network namespace."""

    def __init__(self, timeout_s):
        self.sock = socket.create_connection((VIP, PORT), timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.input = self.sock.makefile("rb")
        hello = struct.pack("!i", 3 << 16) + b"user\0postgres\0database\0postgres\0\0"
        self.sock.sendall(struct.pack("!i", len(hello) + 4) + hello)
        self.answer()

    def query(self, text):
        """The rows of its answer, as tuples of texts; it has been committed."""
        text = text.encode() + b"\0"
        self.sock.sendall(b"Q" + struct.pack("!i", len(text) + 4) + text)
        return self.answer()

    def answer(self):
        rows, error = [], None
        while True:
            kind, size = struct.unpack("!ci", self.read(5))
            body = self.read(size - 4)
            if kind == b"D":
                rows.append(self.row(body))
            elif kind == b"E":
                error = dict((field[:1], field[1:]) for field in body.split(b"\0"))[b"M"].decode()
                if self.done_for(body):
                    raise RuntimeError(error)
            elif kind == b"Z":
                if error:
                    raise RuntimeError(error)
                return rows

    @staticmethod
    def done_for(error):
        """After one of these comes nothing more."""
        return b"VFATAL\0" in error or b"VPANIC\0" in error

    def read(self, size):
        body = self.input.read(size)
        if len(body) < size:
            raise ConnectionError("closed by the server")
        return body

    @staticmethod
    def row(body):
        count, at, values = struct.unpack_from("!h", body)[0], 2, []
        for _ in range(count):
            size = struct.unpack_from("!i", body, at)[0]
            at += 4
            values.append(None if size < 0 else body[at:at + size].decode())
            at += max(size, 0)
        return tuple(values)

    def close(self):
        self.input.close()
        self.sock.close()


class Ledger(Connection):
    """Adds rows to a table, each in a transaction of its own; those of one writer are numbered without gaps."""

    def __init__(self, index):
        super().__init__(PATIENCE_S)
        self.insert = ("insert into ledger select %d, coalesce(max(n), 0) + 1 from ledger where writer = %d returning n"
                       % (index, index))

    def write(self):
        return int(self.query(self.insert)[0][0])


class Bench(threading.Thread):
    """pgbench on the client, started again whenever it ends."""

    def __init__(self, lab):
        super().__init__(daemon=True)
        self.lab = lab
        self.done = threading.Event()
        self.process = None

    def run(self):
        command = self.lab.command(
            "on", "client", "sh", "-c", "%s; exec pgbench -n -c %d -j 2 -R %d -T 3600 -h %s -U postgres postgres" % (
                PROGRAMS, CONNECTIONS, TRANSACTIONS_PER_S, VIP))
        while not self.done.is_set():
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL)
            self.process.wait()
            self.done.wait(0.2)

    def again(self):
        if self.process:
            self.process.kill()

    def stop(self):
        self.done.set()
        # It may be about to start.
        while self.is_alive():
            self.again()
            self.join(0.1)


class Postgres:
    name = "postgres"
    max_downtime = "5s"
    clients = "%d that add rows to a ledger, and pgbench with %d connections" % (WORKERS, CONNECTIONS)
    sound = ("PostgreSQL runs as the same server without any recovery; pg_amcheck, every checksum, its balances and "
             "its ledger are right")

    def __init__(self, place):
        self.place, self.lab = place, place.lab
        self.started = None

    def start(self):
        """Starts it on A, with pgbench's tables and the ledger; says what it holds."""
        program = self.lab.on("A", "sh", "-c", INITDB).strip()
        self.place.start(program, "-D", DATA, *(word for setting in SETTINGS for word in ("-c", setting)))
        self.lab.on("A", "sh", "-c", FILL)
        return "PostgreSQL holds %d accounts" % (SCALE * 100_000)

    def load(self):
        return Load(Ledger, Bench(self.lab))

    def note(self):
        """Notes, once a client reaches it, what must not change."""
        session = self.reach()
        self.started = session.query("select pg_postmaster_start_time()")
        session.close()

    def reach(self):
        def attempt():
            try:
                return Connection(QUERY_TIMEOUT_S)
            except (OSError, RuntimeError):
                return None
        return wait_for("PostgreSQL answers the client", attempt, 20)

    def check(self, host):
        """What is wrong with it; nothing if it is whole."""
        session = self.reach()
        try:
            return self.wrong_by_sql(session) or self.wrong_by_tools() or self.wrong_by_log(host)
        except (OSError, RuntimeError) as error:
            return "PostgreSQL says: %s" % error
        finally:
            session.close()

    def wrong_by_sql(self, session):
        if session.query("select pg_postmaster_start_time()") != self.started:
            return "its postmaster was started ANEW"
        sums = session.query(
            "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), "
            "(select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)")[0]
        if len(set(sums)) != 1:
            return "the sums of its balances DIFFER: %s" % (sums,)
        holes = session.query("select writer, count(*), max(n) from ledger group by writer having count(*) <> max(n)")
        if holes:
            return "rows of its ledger are MISSING (writer, rows, last): %s" % holes
        return None

    def wrong_by_tools(self):
        for what, tool in (
                # Heaps and indexes against each other, every page of them.
                ("pg_amcheck", "pg_amcheck --heapallindexed postgres"),
                # The server checks the checksum of every page of every file that it sends.
                ("pg_basebackup", "pg_basebackup -c fast -X none --no-manifest -F tar -D - > /dev/null")):
            command = "%s; export PGHOST=%s PGUSER=postgres; %s" % (PROGRAMS, VIP, tool)
            done = self.lab.run("on", "client", "sh", "-c", command, check=False)
            if done.returncode:
                return "%s is NOT content: %s%s" % (what, done.stdout, done.stderr)
        return None

    def wrong_by_log(self, host):
        # It had nothing to say there yet if there is none.
        log = "/var/lib/standin/workloads/%s/output.log" % self.name
        lines = self.lab.on(host, "grep", "-E", TROUBLE, log, check=False)
        return "its log on %s tells of TROUBLE: %s" % (host, lines) if lines else None
