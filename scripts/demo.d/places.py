"""Where a workload runs: a sandbox of Standin's, or a container of somebody's.

Each says how to start a command there (on A), how to protect it, how to run something in it, and what whoever runs it
knows of it after a takeover.
"""

import json
import subprocess

from lab import ROOTFS, STANDIN, VIP

ADDRESS = VIP + "/24"


class Sandbox:
    runtime = "sandbox"
    protect_flags = []

    def __init__(self, lab, name, path, user="root"):
        self.lab, self.name, self.path, self.user = lab, name, path, user

    def boot(self, host):
        """Starts what a host must have before its agent."""

    def start(self, *command):
        self.lab.on("A", "mkdir", "-p", self.path)
        self.lab.standin("A", "run", self.name, "--ip", ADDRESS, "--path", self.path, "--user", self.user, "--json",
                         "--", *command)

    def inside(self, host, *command, check=True):
        pid = self.lab.standin(host, "status", self.name, "--json")["pid"]
        return self.lab.on(host, "nsenter", "-t", str(pid), "-m", "-n", "--", *command, check=check)

    def known(self, host):
        """What its runtime says of it while it runs, in one line; nothing if it does not know it."""
        status = self.lab.standin(host, "status", self.name, "--json")
        return status["pid"] and "`standin status` on %s: %s %s %s" % (
            host, self.name, status["role"], status["state"])


# Changes a runtime's example of a config: no terminal, a root to write to, a command, a directory of the host.
CONFIGURE = """
import json, sys
bundle, command = sys.argv[1], sys.argv[2:]
config = json.load(open(bundle + "/config.json"))
config["process"].update(terminal=False, args=command)
config["root"]["readonly"] = False
config["linux"].pop("resources", None)
data = {"destination": "/data", "type": "bind", "source": bundle + "/data", "options": ["rbind", "rw"]}
config["mounts"].append(data)
json.dump(config, open(bundle + "/config.json", "w"))
"""


class Oci:
    path = "/data"

    def __init__(self, lab, name, runtime, programs):
        self.lab, self.name, self.runtime, self.programs = lab, name, runtime, programs
        self.protect_flags = ["--oci", name, "--ip", ADDRESS]

    def boot(self, host):
        pass

    def start(self, *command):
        bundle = "/srv/" + self.name
        self.lab.on("A", "mkdir", "-p", bundle + "/data")
        self.lab.on("A", ROOTFS, bundle + "/rootfs", *self.programs)
        self.lab.on("A", "sh", "-c", "cd %s && %s spec" % (bundle, self.runtime))
        self.lab.on("A", "python3", "-c", CONFIGURE, bundle, *command)
        self.lab.on("A", STANDIN, "wrap", self.name, "--bundle", bundle)
        # Its output must be a pipe, whose reader outlives the command.
        run = "%s run -d --bundle %s %s" % (self.runtime, bundle, self.name)
        self.lab.on("A", "bash", "-c", "%s < /dev/null > >(exec setsid cat > %s.log 2>&1) 2>&1" % (run, bundle))

    def inside(self, host, *command, check=True):
        return self.lab.on(host, self.runtime, "exec", self.name, *command, check=check)

    def known(self, host):
        rows = [line.split() for line in self.lab.on(host, self.runtime, "list").splitlines()]
        row = next((row for row in rows if row[0] == self.name and row[2] == "running"), None)
        return row and "`%s list` on %s: %s" % (self.runtime, host, " ".join(row[:4]))


# As by hand: nothing is configured. It may take seconds to answer.
DAEMON = """
mkdir -p /var/lib/docker
setsid dockerd --storage-driver overlay2 --exec-opt native.cgroupdriver=cgroupfs > /srv/dockerd.log 2>&1 < /dev/null &
for i in $(seq 300); do docker info > /dev/null 2>&1 && exit 0; sleep 0.1; done
cat /srv/dockerd.log
exit 1
"""


class Docker:
    runtime = "docker"
    path = "/data"

    def __init__(self, lab, name, programs, port):
        self.lab, self.name, self.programs, self.port = lab, name, programs, port
        self.protect_flags = ["--docker", name]

    def boot(self, host):
        self.lab.on(host, "sh", "-c", DAEMON)

    def start(self, *command):
        self.lab.on("A", ROOTFS, "/srv/rootfs", *self.programs)
        self.lab.on("A", "sh", "-c", "tar -C /srv/rootfs -c . | docker import - lab")
        self.ship_image()
        self.lab.on("A", "docker", "network", "create", "--subnet", "172.30.0.0/24", "app")
        self.lab.on("A", STANDIN, "wrap", self.name)
        self.lab.on("A", "docker", "run", "-d", "--name", self.name, "--entrypoint", "/.standin/init",
                    "-v", "/var/lib/standin/wrap/%s:/.standin:ro" % self.name, "--network", "app",
                    "-v", "data:" + self.path, "-p", "%d:%d" % (self.port, self.port), "--restart", "always",
                    "lab", *command)

    def ship_image(self):
        """What an operator does who has no registry."""
        with subprocess.Popen(self.lab.command("on", "A", "docker", "save", "lab"), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE) as save:
            load = subprocess.run(self.lab.command("on", "B", "docker", "load"), stdin=save.stdout,
                                  stdout=subprocess.DEVNULL)
        if save.returncode or load.returncode:
            raise SystemExit("demo: the image could not be brought from A to B")

    def inside(self, host, *command, check=True):
        return self.lab.on(host, "docker", "exec", self.name, *command, check=check)

    def known(self, host):
        rows = self.lab.on(host, "docker", "ps", "--filter", "status=running", "--format", "{{json .}}").splitlines()
        row = next((row for row in map(json.loads, rows) if row["Names"] == self.name), None)
        shown = row and [row[key] for key in ("ID", "Image", "Names", "Status")]
        return row and "`docker ps` on %s: %s" % (host, " ".join(shown))
