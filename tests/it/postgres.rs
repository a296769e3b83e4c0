//! A PostgreSQL as it comes: many processes, System V and POSIX shared memory, a data directory of its own.

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::{
    cluster::{Cluster, wait_for},
    lab::{Host, Lab},
    redis::VIP,
};

/// Its programs are in a directory of their version.
const PROGRAMS: &str = "PATH=$(echo /usr/lib/postgresql/*/bin):$PATH";
const CLIENTS: &str = "8";
/// For each round: rows that must be in an epoch, and how long it takes at least and at most.
const ROWS: i64 = 5;
const LOAD: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);

struct Postgres {
    cluster: Cluster,
}

impl Postgres {
    /// Protected on A.
    fn up() -> Self {
        Self::protected(&["--every", "100ms"])
    }

    /// The same, with these flags of `standin protect`.
    fn protected(flags: &[&str]) -> Self {
        let cluster = Cluster::up("postgres");
        let make = format!(
            "set -e; {PROGRAMS}; mkdir -p /srv/pg; chown postgres: /srv/pg; \
             setpriv --reuid postgres --regid postgres --clear-groups \
               initdb -D /srv/pg --data-checksums -A trust -E UTF8 --no-sync > /dev/null; \
             echo 'host all all 0.0.0.0/0 trust' >> /srv/pg/pg_hba.conf; command -v postgres"
        );
        let program = cluster.lab.ok(Host::A, &["sh", "-c", &make]);
        let ip = format!("{VIP}/24");
        cluster.standin(
            Host::A,
            &[
                ["run", "pg", "--ip", &ip, "--path", "/srv/pg", "--user", "postgres", "--", program.trim()]
                    .as_slice(),
                &["-D", "/srv/pg", "-c", "listen_addresses=*", "-c", "unix_socket_directories=/tmp"],
                &["-c", "max_wal_size=64MB", "-c", "min_wal_size=32MB", "-c", "shared_buffers=32MB"],
                &["-c", "max_parallel_workers_per_gather=2", "-c", "checkpoint_timeout=30s"],
            ]
            .concat(),
        );
        let postgres = Self { cluster };
        postgres.await_answer(Host::A);
        let fill = format!("{PROGRAMS}; pgbench -q -i -s 2 -h {VIP} -U postgres postgres");
        postgres.cluster.lab.ok(Host::A, &["sh", "-c", &fill]);
        postgres
            .sql(Host::A, "create table ledger (n bigint primary key); create extension amcheck")
            .expect("done");
        let vip = format!("{VIP}/24@eth0");
        let protect = ["protect", "pg", "--to", "b", "--vip", &vip];
        postgres.cluster.standin(Host::A, &[protect.as_slice(), flags].concat());
        postgres.cluster.wait_state_of("pg", Host::A, "primary", "protected");
        postgres
    }

    /// One statement's answer; an error if it has none within a few seconds.
    fn sql(&self, from: Host, text: &str) -> Result<String, String> {
        let command = format!(
            "{PROGRAMS} PGCONNECT_TIMEOUT=2 PGOPTIONS='-c statement_timeout=20s' \
             timeout 25 psql -h {VIP} -U postgres -XAtq -v ON_ERROR_STOP=1 -c \"$0\" postgres"
        );
        let output = self.cluster.lab.on(from, &["sh", "-c", &command, text]);
        let [said, error] =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).trim().to_owned());
        if output.status.success() { Ok(said) } else { Err(error) }
    }

    fn await_answer(&self, from: Host) {
        wait_for("PostgreSQL to answer", || self.sql(from, "select 1").is_ok());
    }

    /// `pgbench` from the client until this child is killed; its connections may break.
    fn load(&self) -> Child {
        let command = format!(
            "{PROGRAMS}; while :; do \
               timeout 60 pgbench -n -c {CLIENTS} -j 2 -T 50 -h {VIP} -U postgres postgres > /dev/null 2>&1; sleep 0.2; \
             done"
        );
        self.cluster.lab.spawn(Host::Client, &["sh", "-c", &command])
    }

    /// Inserts rows from `from` on, each in a transaction of its own, until some have been in an epoch that is committed.
    /// Gives the last of these, and the last one of all.
    fn insert(&self, primary: Host, from: i64) -> (i64, i64) {
        let (mut acks, began) = (Vec::new(), Instant::now());
        for n in from.. {
            self.sql(Host::Client, &format!("insert into ledger values ({n})")).expect("inserted");
            acks.push((n, unix_ms()));
            let history = self.cluster.json(primary, &["history", "pg"]);
            let epochs = history["epochs"].as_array().expect("epochs").iter();
            let frozen = epochs.filter_map(|epoch| epoch["frozen_at_unix_ms"].as_u64()).max();
            let held = acks.iter().rev().find(|(_, at)| frozen.is_some_and(|frozen| *at < frozen));
            if let Some((held, _)) = held.filter(|(held, _)| *held >= from + ROWS && began.elapsed() > LOAD) {
                return (*held, n);
            }
            assert!(began.elapsed() < PATIENCE, "no epoch of {} s is committed", began.elapsed().as_secs());
        }
        unreachable!()
    }

    /// Whatever a database can be found wrong by; gives the last row of the ledger.
    fn check(&self, host: Host, started: &str) -> i64 {
        let sql = |text: &str| self.sql(Host::Client, text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(sql("select pg_postmaster_start_time()"), started, "it has not been started anew");
        let sums = sql(
            "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), \
                    (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)",
        );
        let sums: Vec<&str> = sums.split('|').collect();
        assert!(sums.len() == 4 && sums.iter().all(|sum| *sum == sums[0]), "balances on {host}: {sums:?}");
        // Heaps and indexes, every page of them, with its checksum.
        let check = format!("{PROGRAMS}; pg_amcheck -h {VIP} -U postgres --heapallindexed postgres");
        self.cluster.lab.ok(Host::Client, &["sh", "-c", &check]);
        assert_eq!(sql("select coalesce(sum(checksum_failures), 0) from pg_stat_database"), "0");
        // None, if it had nothing to say there.
        let log = self.cluster.lab.on(host, &["cat", "/var/lib/standin/workloads/pg/output.log"]);
        let log = String::from_utf8_lossy(&log.stdout).into_owned();
        for bad in ["PANIC", "was terminated by signal", "was interrupted", "invalid page", "redo starts"] {
            assert!(!log.contains(bad), "on {host}: {log}");
        }
        let [count, last]: [i64; 2] = sql("select count(*), coalesce(max(n), 0) from ledger")
            .split('|')
            .map(|n| n.parse().expect("a number"))
            .collect::<Vec<_>>()
            .try_into()
            .expect("two");
        assert_eq!(count, last, "no row is missing before the last");
        last
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// It goes on where the last epoch was: no crash recovery, every page sound, every row there that was committed before it.
#[test]
fn a_postgresql_under_load_outlives_its_hosts() {
    let mut postgres = Postgres::up();
    let mut load = postgres.load();
    let started = postgres.sql(Host::Client, "select pg_postmaster_start_time()").expect("an answer");
    let (mut at, mut next) = ((Host::A, Host::B), 1);
    for round in 0..3 {
        let (primary, standby) = at;
        let (held, newest) = postgres.insert(primary, next);
        let handoff = round == 1;
        if handoff {
            postgres.cluster.json(primary, &["handoff", "pg", "--max-downtime", "5s"]);
        } else {
            postgres.cluster.lab.kill(primary);
        }
        postgres.cluster.wait_state_of("pg", standby, "primary", if handoff { "protected" } else { "alone" });
        postgres.await_answer(Host::Client);
        let last = postgres.check(standby, &started);
        // A handoff loses nothing.
        let due = if handoff { newest } else { held };
        assert!((due..=newest).contains(&last), "{last} is the last row of {newest}, {due} is due");
        next = last + 1;
        if !handoff {
            postgres.cluster.lab.boot(primary);
            postgres.cluster.start_agent(primary);
            postgres.cluster.wait_state_of("pg", standby, "primary", "protected");
        }
        at = (standby, primary);
    }
    load.kill().and_then(|()| load.wait()).expect("it runs");
}

/// `pgbench` from the client, whose connections are never opened again.
struct Bench(Child);

impl Bench {
    fn start(postgres: &Postgres) -> Self {
        let command = format!(
            "{PROGRAMS}; exec pgbench -n -c {CLIENTS} -j 2 -T 3600 -h {VIP} -U postgres postgres < /dev/null 2>&1"
        );
        let mut command = postgres.cluster.lab.command(Host::Client, &["sh", "-c", &command]);
        let bench = Self(
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("scripts/lab can be run"),
        );
        // A connection that the server has not accepted yet does not outlive its host.
        let sessions = "select count(*) from pg_stat_activity where application_name = 'pgbench'";
        wait_for("every client of pgbench to have its session", || {
            postgres.sql(Host::Client, sessions).is_ok_and(|count| count == CLIENTS)
        });
        bench
    }

    fn assert_running(&mut self) {
        if let Some(status) = self.0.try_wait().expect("its end can be asked for") {
            panic!("pgbench ended with {status}: {}", self.said());
        }
    }

    fn said(&mut self) -> String {
        let mut said = String::new();
        self.0.stdout.take().expect("it is piped").read_to_string(&mut said).expect("text");
        said
    }

    /// Has it come to an end as if its time were over: what was begun is ended; gives how many transactions it was told
    /// were committed. A connection that broke would have it say so.
    fn end(mut self, lab: &Lab) -> i64 {
        let pid = lab.ok(Host::Client, &["pgrep", "-x", "pgbench"]);
        lab.ok(Host::Client, &["kill", "-ALRM", pid.trim()]);
        let said = self.said();
        let status = self.0.wait().expect("it ends");
        assert!(status.success() && !said.contains("aborted"), "{status}: {said}");
        let count =
            said.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or_else(|| panic!("no count: {said}"))
    }
}

/// One session that adds rows to the ledger, each in a transaction of its own, as long as its connection lasts.
struct Scribe {
    stop: Arc<AtomicBool>,
    /// The last row that was reported committed.
    reported: Arc<AtomicI64>,
    thread: JoinHandle<Result<(), String>>,
}

impl Scribe {
    fn start(postgres: &Postgres) -> Self {
        // What a server that is gone has it do, were it a person's: connect again. As it is, it ends.
        let command =
            format!("{PROGRAMS}; exec psql -h {VIP} -U postgres -XAtq -v ON_ERROR_STOP=1 postgres 2>&1");
        let mut command = postgres.cluster.lab.command(Host::Client, &["sh", "-c", &command]);
        let mut psql =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("scripts/lab can be run");
        let (stop, reported) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let (stopped, report) = (Arc::clone(&stop), Arc::clone(&reported));
        let thread = std::thread::spawn(move || {
            let mut input = psql.stdin.take().expect("it is piped");
            let mut output = BufReader::new(psql.stdout.take().expect("it is piped"));
            for n in 1.. {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let mut answer = String::new();
                writeln!(input, "insert into ledger values ({n}) returning n;")
                    .and_then(|()| output.read_line(&mut answer))
                    .map_err(|error| error.to_string())?;
                if answer.trim() != n.to_string() {
                    return Err(format!("row {n} is answered by {answer:?}"));
                }
                report.store(n, Ordering::SeqCst);
            }
            drop(input);
            psql.wait().map_err(|error| error.to_string()).and_then(|status| {
                if status.success() { Ok(()) } else { Err(format!("psql ends with {status}")) }
            })
        });
        Self { stop, reported, thread }
    }

    fn reported(&self) -> i64 {
        self.reported.load(Ordering::SeqCst)
    }

    fn await_more(&self) {
        let before = self.reported();
        wait_for("the session to go on", || self.thread.is_finished() || self.reported() > before + ROWS);
        assert!(!self.thread.is_finished(), "after row {} the session ended", self.reported());
    }

    /// Gives the last row that was reported committed.
    fn end(self) -> i64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("it runs to its end").expect("the connection lasts");
        self.reported.load(Ordering::SeqCst)
    }
}

/// Under output commit, what was reported committed is there, and no session notices.
#[test]
fn sessions_of_a_postgresql_outlive_its_hosts() {
    let mut postgres = Postgres::protected(&["--commit", "output"]);
    let started = postgres.sql(Host::Client, "select pg_postmaster_start_time()").expect("an answer");
    let (mut bench, scribe) = (Bench::start(&postgres), Scribe::start(&postgres));
    let mut at = (Host::A, Host::B);
    for _ in 0..3 {
        let (primary, standby) = at;
        scribe.await_more();
        let status = postgres.cluster.status(primary, "pg");
        assert_eq!(status["held"]["output"], true, "{status:#}");
        postgres.cluster.lab.kill(primary);
        postgres.cluster.wait_state_of("pg", standby, "primary", "alone");
        scribe.await_more();
        postgres.cluster.lab.boot(primary);
        postgres.cluster.start_agent(primary);
        postgres.cluster.wait_state_of("pg", standby, "primary", "protected");
        scribe.await_more();
        bench.assert_running();
        at = (standby, primary);
    }
    let committed = bench.end(&postgres.cluster.lab);
    let reported = scribe.end();
    // What checks it asks so much, one question after the other, that it must not wait for an epoch each time.
    postgres.cluster.standin(at.0, &["commit", "pg", "async"]);
    assert_eq!(postgres.check(at.0, &started), reported, "each row that was reported is there, and no other");
    let count = postgres.sql(Host::Client, "select count(*) from pgbench_history").expect("a count");
    assert_eq!(count, committed.to_string(), "each transaction that pgbench was told of is there once");
    println!("{committed} transactions of {CLIENTS} sessions, {reported} rows of one more");
}

#[test]
fn a_drill_of_a_postgresql_finds_every_row() {
    let postgres = Postgres::up();
    let mut load = postgres.load();
    let (held, _) = postgres.insert(Host::A, 1);
    postgres.cluster.wait_state_of("pg", Host::B, "standby", "ready");
    let probe = format!(
        "{PROGRAMS}; export PATH; PGUSER=postgres {}/scripts/probe/postgresql",
        env!("CARGO_MANIFEST_DIR")
    );
    let report = postgres.cluster.json(Host::B, &["drill", "pg", "--probe", &probe]);
    eprintln!("{report:#}");
    let output = report["probe"]["output"].as_str().expect("an output");
    let rows = output.lines().find_map(|line| line.strip_prefix("ledger: ")).expect("a count");
    assert!(rows.parse::<i64>().is_ok_and(|rows| rows >= held), "{held} rows were in an epoch: {output}");
    assert!(output.contains("pgbench_accounts: 200000") && output.contains("reads and writes"), "{output}");
    postgres.sql(Host::Client, "select 'standin_drill'::regclass").expect_err("production has no such table");
    load.kill().and_then(|()| load.wait()).expect("it runs");
}
