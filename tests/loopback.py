"""A real OpenSSH server on 127.0.0.1, with keys of its own, that a test starts, kills and starts again."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from played.cpus import CPUS, VARIABLE

SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
SERVER = shutil.which("sshd", path=SBIN)
NEEDED = {"sshd (openssh-server)": SERVER, "ssh": shutil.which("ssh"), "ssh-keygen": shutil.which("ssh-keygen")}
PRIVILEGE_FOLDER = Path("/run/sshd")


class Loopback:
    """The server; `settings` are what a targets.toml says of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (root / "authorized").write_bytes((root / "user.pub").read_bytes())
        lines = {
            "ListenAddress": f"127.0.0.1:{self.port}",
            "HostKey": root / "host",
            "AuthorizedKeysFile": root / "authorized",
            "PidFile": root / "pid",
            "UsePAM": "no",
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "yes",
        }
        if VARIABLE in os.environ:  # sessions begin with an environment of their own; they play the same CPU
            inherited = (VARIABLE, "PYTHONPATH", *CPUS[os.environ[VARIABLE]].environment)
            lines["SetEnv"] = " ".join(f"{name}={os.environ[name]}" for name in inherited if name in os.environ)
        (root / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
        host_key = (root / "host.pub").read_text().split()[:2]
        (root / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {' '.join(host_key)}\n")
        (root / "ssh_config").write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {self.port}\n  IdentityFile {root / 'user'}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {root / 'known_hosts'}\n  StrictHostKeyChecking yes\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Waits until the server answers."""
        command = [str(SERVER), "-D", "-e", "-f", str(self.root / "sshd_config")]
        with (self.root / "sshd.log").open("ab") as log:
            # A group of its own: its children, one per connection, are killed with it, and the runner is not.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise TimeoutError((self.root / "sshd.log").read_text())

    def kill(self) -> None:
        """Ends the server and its connections without a word, as a power cut would."""
        if self.process is None:
            return
        import psutil

        served = psutil.Process(self.process.pid).children(recursive=True)
        for connection in [each for each in served if each.name().startswith("sshd")]:
            connection.kill()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def targets_toml(self, path: Path, **settings: object) -> Path:
        """A targets.toml that names this server "board"."""
        folder = self.root / "device"
        lines = {
            "transport": "ssh",
            "host": "board",
            "user": getpass.getuser(),
            "ssh_config": str(self.root / "ssh_config"),
            "python": sys.executable,
            "folder": str(folder),
            **settings,
        }
        shown = {key: value if isinstance(value, int | list) else f'"{value}"' for key, value in lines.items()}
        path.write_text("[board]\n" + "".join(f"{key} = {value}\n" for key, value in shown.items()))
        return path


def loopback(root: Path) -> Loopback:
    """A started server; skips the test where there is no OpenSSH, or no way to start it."""
    if missing := [name for name, found in NEEDED.items() if found is None]:
        pytest.skip(f"there is no {', '.join(missing)}")
    if os.geteuid() == 0:
        PRIVILEGE_FOLDER.mkdir(mode=0o755, exist_ok=True)
    server = Loopback(root)
    server.start()
    return server
