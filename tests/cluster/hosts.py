"""Simulate hosts with namespaces of this machine: their processes see a separate network, hostname and process ids.

    with cluster(folder, ["alpha", "beta"]) as (alpha, beta):
        done = alpha.run("ssh", "beta", "hostname")

Every host has an ssh server, knows the others by name, and logs in to them without a password. Disk and cores are
shared. Nothing outside the namespaces changes, and no name is used that another test run could need. Everything ends
with this process, however it ends: the kernel kills the first process of each host, and with it all others and the
network.
"""

import ctypes
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from commands import run_script
from processes import forking

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = {"net": "--net", "mnt": "--mount", "pid": "--pid", "uts": "--uts", "ipc": "--ipc"}  # in /proc -> flag
UNSHARE = ("unshare", *NAMESPACES.values(), "--fork", "--mount-proc")
PACKAGES = {  # program -> Debian package
    "ip": "iproute2",
    "pdsh": "pdsh",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "unshare": "util-linux",
}
INTERFACE = "eth0"
SUBNET = "10.83.0"
# Variables that processes need on each host to train; also in .deepspeed_env, for those that pdsh starts.
# PYTHONPATH is needed because the virtual environment may have another checkout's package.
TRAINING = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "PYTHONPATH": str(ROOT),
}


def why_not() -> str | None:
    """Return why this machine cannot simulate hosts, or None."""
    if os.geteuid():
        return "hosts are played by namespaces, which need root"
    if missing := sorted(package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)):
        return f"not installed: {', '.join(missing)} (tests/cluster/setup.sh)"
    # A container without CAP_NET_ADMIN may have its own network, but not build one.
    attempt = "mount -t tmpfs none /run && ip link add name one type veth peer name two"
    tried = subprocess.run([*UNSHARE, "sh", "-c", attempt], capture_output=True, text=True)
    return f"no namespaces may be made here ({tried.stderr.strip()})" if tried.returncode else None


class Job:
    """A command on a host. It prints into a file, so that its output can be read while it runs."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]):
        self.command, self.log, self.began = command, log, time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def wait(self, timeout: float = 120) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout} s: {shlex.join(self.command)}\n{self.output}"
            ) from None

    def wait_until(self, happened, timeout: float = 120) -> None:
        """Wait until happened() is true. The job must still be running then."""
        end = time.monotonic() + timeout
        while not happened():
            assert self.exit_code is None, f"ended with {self.exit_code} too early\n{self.output}"
            assert time.monotonic() < end, f"did not happen within {timeout} s\n{self.output}"
            time.sleep(0.02)


class ForkedJob(Job):
    """A Python script on a host, in a process with the imports already done, which saves seven seconds."""

    def __init__(self, host_process: int, arguments: list[str], log: Path, environment: dict[str, str]):
        self.command, self.log, self.began = arguments, log, time.monotonic()
        self.process = forking.Process(target=run_on_host, args=(host_process, arguments, environment, str(log)))
        self.process.start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float = 120) -> int:
        """Return the exit code."""
        self.process.join(timeout)
        assert self.exit_code is not None, f"still running after {timeout} s: {self.command}\n{self.output}"
        return self.exit_code


def run_on_host(host_process: int, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Enter the namespaces of a host's process, run a script there in a child, and end with its exit code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    setns = ctypes.CDLL(None, use_errno=True).setns
    for namespace in [os.open(f"/proc/{host_process}/ns/{name}", os.O_RDONLY) for name in NAMESPACES]:
        if setns(namespace, 0):
            raise OSError(ctypes.get_errno(), "setns")
    if child := os.fork():  # a process keeps its own process id, so only its children are in the other namespace
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    run_script(arguments, environment, [output, output])


class Host:
    """One host: an `unshare` process, and its child, which is process 1 of the namespaces and an ssh server."""

    def __init__(self, name: str, address: str, folder: Path, boot: list[str]):
        self.name, self.address, self.folder = name, address, folder
        # --pdeathsig and --kill-child: if this process dies, even by SIGKILL, the kernel ends the host.
        dies_with_us = ("setpriv", "--pdeathsig", "KILL", *UNSHARE, "--kill-child")
        command = [*dies_with_us, "sh", "-euc", "\n".join(boot)]
        self.job = Job(command, folder / f"{name}.log", {"PATH": PATH})
        self.jobs = 0
        self.job.wait_until(lambda: f"{name} is up" in self.job.output)
        [self.first_process] = psutil.Process(self.job.process.pid).children()
        self.namespace = os.readlink(f"/proc/{self.first_process.pid}/ns/pid")

    def start(self, *command: object, **environment: str) -> Job:
        """Start a command here, in the repository's folder, as a user who has just logged in."""
        enter = ["nsenter", "--target", str(self.first_process.pid), *NAMESPACES.values(), f"--wdns={ROOT}", "--"]
        return Job([*enter, *map(str, command)], self.next_log(), self.environment(environment))

    def start_script(self, *arguments: object, **environment: str) -> ForkedJob:
        """Do what `start("python", *arguments)` does, without the seconds of its imports."""
        words = list(map(str, arguments))
        return ForkedJob(self.first_process.pid, words, self.next_log(), self.environment(environment))

    def next_log(self) -> Path:
        self.jobs += 1
        return self.folder / f"{self.name}.{self.jobs}.log"

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        return {"PATH": PATH, "HOME": str(self.folder), "LANG": "C.UTF-8", **TRAINING, **more}

    def run(self, *command: object, timeout: float = 120, **environment: str) -> str:
        """Return a command's output. The command must succeed."""
        job = self.start(*command, **environment)
        code = job.wait(timeout)
        assert code == 0, f"exit code {code}: {shlex.join(map(str, command))}\n{job.output}"
        return job.output

    def processes(self, word: str) -> list[psutil.Process]:
        """Return the processes here whose command lines contain the word."""
        return [
            process
            for process in psutil.process_iter()
            if self.holds(process) and any(word in argument for argument in cmdline(process))
        ]

    def holds(self, process: psutil.Process) -> bool:
        try:
            return os.readlink(f"/proc/{process.pid}/ns/pid") == self.namespace
        except OSError:  # it has just ended
            return False

    def replace(self, path: Path, other: Path) -> None:
        """Show another file or folder at this path, only on this host."""
        self.run("mount", "--bind", other, path)

    def cut_off(self) -> None:
        """Unplug the cable: everything here runs on, but no other host hears of it again."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def power_off(self) -> None:
        """Make the kernel kill all processes here and then remove the network."""
        if self.job.process.poll() is None:
            self.first_process.kill()
            self.job.wait()


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


@contextmanager
def cluster(folder: Path, names: list[str]):
    """Simulate two hosts joined by a cable. `folder` receives keys, configuration and all output."""
    addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, start=1)}
    write_configuration(folder, addresses)
    with ExitStack() as stack:
        hosts = []
        for name, address in addresses.items():
            hosts.append(Host(name, address, folder, boot_script(folder, name, address)))
            stack.callback(hosts[-1].power_off)
        first, second = (f"netns {host.first_process.pid}" for host in hosts)
        cable = f"ip link add {INTERFACE} {first} type veth peer name {INTERFACE} {second}"
        subprocess.run(cable.split(), check=True, env={"PATH": PATH})
        for host in hosts:
            host.run("sh", "-ec", f"ip address add {host.address}/24 dev {INTERFACE}; ip link set {INTERFACE} up")
        yield hosts


def write_configuration(folder: Path, addresses: dict[str, str]) -> None:
    """Write what an administrator would have written on each host, with one key for all hosts and users."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    (folder / "shadow").write_text("root:*:1::::::\n")  # sshd refuses an account that is locked, as root's may be here
    # Without ServerAliveInterval, ssh (and so pdsh) waits forever for a lost host.
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/key\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\n"
        "LogLevel ERROR\nConnectTimeout 5\nServerAliveInterval 2\nServerAliveCountMax 2\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\n"
        "PermitRootLogin yes\nPidFile none\nMaxStartups 100\n"
    )
    # DeepSpeed's launcher reads this in its $HOME, which is this folder.
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in TRAINING.items()))
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in addresses))


def boot_script(folder: Path, name: str, address: str) -> list[str]:
    """Lay the configuration over the machine's own, only in this host's mounts, and become the ssh server."""
    users_ssh = shlex.quote(str(Path(pwd.getpwuid(0).pw_dir) / ".ssh"))
    here = shlex.quote(str(folder))
    return [
        f"hostname {name}",
        "mount -t tmpfs none /run",
        "mkdir /run/sshd",
        f"mount --bind {here}/hosts /etc/hosts",
        f"mount --bind {here}/shadow /etc/shadow",
        f"mount --bind {here}/ssh_config /etc/ssh/ssh_config",
        f"[ ! -d {users_ssh} ] || mount -t tmpfs none {users_ssh}",
        "ip link set lo up",
        f"echo {name} is up",
        f"exec $(command -v sshd) -D -e -f {here}/sshd_config",
    ]
