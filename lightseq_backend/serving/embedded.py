"""A real tritonserver as a child of this process: found, started on loopback, watched and ended.

Apart from the rest of serving/ because it runs beside Triton, not inside it: nothing here is imported by a model.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from lightseq_backend.errors import ConfigError
from lightseq_backend.serving.cores import cores_awake, usable_cpus
from lightseq_backend.serving.device import DEVICES, choose_device
from lightseq_backend.serving.notice import NOTICE_VARIABLE

LOOPBACK = "127.0.0.1"
TRITON_VARIABLE = "LIGHTSEQ_TRITON"  # names the directory of the Triton to use
ADMIN_KEY_VARIABLE = "LIGHTSEQ_ADMIN_KEY"
MARGIN = 4.0  # seconds before the end of stop_timeout
GOING = 10.0  # seconds that a killed process may take to give its memory back, a GPU's too
LOG_LEVELS = ("error", "warning", "info", "verbose")
RESTRICTED_APIS = "model-repository,shared-memory,trace,logging"  # what changes the server, for those with the key
# Ctrl-C comes to us alone, and `_end` finds all. No session of its own where that can be had without: Linux gives each
# session its share of a core, and on a busy machine a thread of a new one may wait for seconds.
_OWN_GROUP: Any = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PORT_TAKEN = re.compile(r"address already in use|socket '[^']*' already in use", re.IGNORECASE)
# Triton 24.10 has ended so once, while the two instances of a model started beside each other.
_CRASHED = re.compile(r"boost::interprocess::lock_exception")
_IDLE_TALK = re.compile(r"I\d{4} |[+|]|\s*$")  # Triton's information lines and tables


class ServerFailed(RuntimeError):
    """tritonserver did not become ready, or ended by itself. The message carries the end of its log."""


@dataclass(frozen=True)
class Triton:
    """An installed tritonserver whose Python backend fits the running interpreter.

    backend_files  what a backend directory needs: library, triton_python_backend_utils and stub
    libraries      directories for the dynamic linker
    libpythons     names of a foreign libpython that the stub asks for and must not get
    """

    server: Path
    backend_files: tuple[Path, ...]
    libraries: tuple[Path, ...]
    libpythons: tuple[str, ...] = ()


def find_triton(directory: str | os.PathLike[str] | None = None) -> Triton:
    """The server in `directory` or, where that is None, in $LIGHTSEQ_TRITON; else the one inside the nvidia-pytriton
    wheel, else the one on PATH (Triton's container).

    The wheel's own Python package is never imported: it wants numpy<2, which the server does not.
    """
    directory = directory or os.environ.get(TRITON_VARIABLE)
    if directory:
        return _installed(Path(directory).resolve())
    package = find_spec("pytriton")
    if package is not None and package.submodule_search_locations:
        root = Path(package.submodule_search_locations[0])
        triton = root / "tritonserver"
        stubs = triton / "python_backend_stubs" / _python_version()
        return _checked(triton, stubs, root.parent / "nvidia_pytriton.libs")
    on_path = shutil.which("tritonserver")
    if on_path is None:
        raise ConfigError(
            "no tritonserver: install the extra `server`, name the directory of one with --triton or "
            f"{TRITON_VARIABLE}, or run inside Triton's container"
        )
    return _installed(Path(on_path).resolve().parents[1])


def _installed(root: Path) -> Triton:
    """A Triton that lies as NVIDIA's /opt/tritonserver does: bin, backends, and its libraries in lib or libs."""
    if not (root / "bin" / "tritonserver").exists():
        raise ConfigError(f"{root} holds no Triton: bin/tritonserver is missing")
    libraries = root / "libs" if (root / "libs").is_dir() else root / "lib"
    return _checked(root, root / "backends" / "python", libraries)


def _checked(root: Path, stubs: Path, libraries: Path) -> Triton:
    server, backend = root / "bin" / "tritonserver", root / "backends" / "python"
    stub = stubs / "triton_python_backend_stub"
    files = (backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stub)
    missing = [str(path) for path in (server, *files) if not path.exists()]
    if missing:
        raise ConfigError(f"this Triton does not serve Python {_python_version()}; missing: {', '.join(missing)}")
    built_for = re.search(rb"libpython3(?:-\w+)?\.(\d+)\.so", stub.read_bytes())
    if built_for and int(built_for[1]) != sys.version_info.minor:
        raise ConfigError(f"{stub} is for Python 3.{int(built_for[1])}; this is Python {_python_version()}")
    # For Python 3.13 the wheel brings a libpython of its own, which lacks what Debian's has built in (math, ...).
    own = f"libpython3-*.{sys.version_info.minor}.so.*"
    return Triton(server, files, (libraries,), tuple(path.name for path in libraries.glob(own)))


class EmbeddedServer:
    """One tritonserver over a model repository, from `start` (or `with`) to `stop`.

    device       "cpu" reads <model>/configs/cpu.pbtxt where a model has one, "gpu" reads config.pbtxt,
                 "auto" takes the GPU when one is usable
    *_port       0 picks a free one
    admin_key    opens the model-repository, shared-memory, trace and logging APIs (HTTP header `admin-key`,
                 gRPC metadata `triton-grpc-protocol-admin-key`); None locks them
    models       load only these, explicitly; None loads the whole repository
    triton       directory of the Triton to use, see find_triton
    shm_bytes    shared memory a model instance starts with
    log_to_terminal  pass Triton's log on instead of keeping it for `log`
    stop_timeout  seconds until a server that does not end is killed; Triton uses them up while a client keeps an
                 HTTP connection open, idle or not. Models answer what they have not done MARGIN before with an error
    environment  variables added to the server's, hence to every model's, environment
    The thread that starts the server must outlive it: the kernel ends the server with that thread.
    """

    def __init__(
        self,
        model_repository: str | os.PathLike[str],
        *,
        device: str = "auto",
        address: str = LOOPBACK,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        admin_key: str | None = None,
        models: Sequence[str] | None = None,
        triton: str | os.PathLike[str] | None = None,
        shm_bytes: int = 1 << 20,
        log_level: str = "info",
        log_to_terminal: bool = False,
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 120.0,
        stop_timeout: float = 10.0,
    ) -> None:
        if log_level not in LOG_LEVELS:
            raise ValueError(f"log_level is {log_level!r}; levels are {', '.join(LOG_LEVELS)}")
        self.model_repository = Path(model_repository).resolve()
        if not self.model_repository.is_dir():
            raise ConfigError(f"model repository {self.model_repository} is not a directory")
        self.device, self.gpu_obstacle = choose_device(device)
        self._address = address
        self._wanted_ports = (http_port, grpc_port, metrics_port)
        self._ports = self._wanted_ports
        self._admin_key = admin_key or secrets.token_hex(16)
        self._models = None if models is None else list(models)
        self._triton = triton
        self._shm_bytes = shm_bytes
        self._log_level = log_level
        self._log_to_terminal = log_to_terminal
        self._environment = dict(environment or {})
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._last_log = ""

    @property
    def http(self) -> str:
        """host:port of the HTTP service."""
        return self._reachable(self._ports[0])

    @property
    def grpc(self) -> str:
        """host:port of the gRPC service."""
        return self._reachable(self._ports[1])

    @property
    def metrics(self) -> str:
        """host:port of the Prometheus metrics."""
        return self._reachable(self._ports[2])

    @property
    def log(self) -> str:
        """Everything Triton and the models printed; kept after `stop`; empty with log_to_terminal."""
        if self._directory is None:
            return self._last_log
        path = Path(self._directory.name) / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def log_end(self, lines: int = 40) -> str:
        """The last lines of the log that say something, without Triton's information lines and tables."""
        if self._log_to_terminal:
            return "(its log is above)"
        return "\n".join([line for line in self.log.splitlines() if not _IDLE_TALK.match(line)][-lines:])

    @property
    def pid(self) -> int:
        """Process id of the running tritonserver."""
        if self._process is None:
            raise ServerFailed("the server is not running")
        return self._process.pid

    def start(self) -> EmbeddedServer:
        """Return when every model is ready. ServerFailed, with the log's end, when Triton gives up or time is up."""
        if self._process is not None:
            raise RuntimeError("this server is already running")
        triton = find_triton(self._triton)
        for attempt in range(3):
            self._ports = _choose_ports(self._wanted_ports)
            self._launch(triton)
            try:
                self._wait_until_ready()
                return self
            except BaseException as error:
                self.stop()
                # Between our look and Triton's bind another process may have taken a port.
                taken = _PORT_TAKEN.search(self._last_log) and 0 in self._wanted_ports
                crashed = _CRASHED.search(self._last_log)
                if not isinstance(error, ServerFailed) or not (taken or crashed) or attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def wait(self) -> int:
        """Block until the server ends by itself; its exit status."""
        if self._process is None:
            raise ServerFailed("the server is not running")
        while not _has_exited(self._process.pid):
            time.sleep(0.2)
        process = self._process
        self.stop()
        return process.returncode

    def stop(self) -> None:
        """Let running requests finish, end the server and whatever it started, drop its temporary files."""
        process, self._process = self._process, None
        if process is not None:
            self._ask_models_to_finish()
            _end(process, self._stop_timeout)
        if self._directory is not None:
            self._last_log = self.log
            directory, self._directory = self._directory, None
            for region in Path("/dev/shm").glob(Path(directory.name).name + "*"):
                region.unlink(missing_ok=True)
            directory.cleanup()

    def __enter__(self) -> EmbeddedServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _ask_models_to_finish(self) -> None:
        """Triton tells a model that it must end once all its requests are answered, however long that takes."""
        if self._directory is not None:
            notice = Path(self._directory.name) / "stopping"
            notice.with_suffix(".new").write_text(str(max(1.0, self._stop_timeout - MARGIN)))
            notice.with_suffix(".new").rename(notice)

    def _reachable(self, port: int) -> str:
        return f"{LOOPBACK if self._address == '0.0.0.0' else self._address}:{port}"

    def _launch(self, triton: Triton) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="lightseq-triton-")
        directory = Path(self._directory.name)
        backends = directory / "backends"
        _lay_out_backends(triton, backends)
        if triton.libpythons:
            _use_own_libpython(triton, directory)
        command = [str(triton.server), *self._arguments(backends)]
        setpriv = shutil.which("setpriv")
        if setpriv:  # when this process is killed, the server must not live on
            command = [setpriv, "--pdeathsig", "TERM", *command]
        log = None if self._log_to_terminal else (directory / "log").open("wb")
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
                env=self._server_environment(directory / "lib", triton),
                **_OWN_GROUP,
            )
        finally:
            if log:
                log.close()

    def _arguments(self, backends: Path) -> list[str]:
        http_port, grpc_port, metrics_port = self._ports
        arguments = [
            f"--model-repository={self.model_repository}",
            f"--backend-directory={backends}",
            f"--http-address={self._address}",
            f"--grpc-address={self._address}",
            f"--metrics-address={self._address}",
            f"--http-port={http_port}",
            f"--grpc-port={grpc_port}",
            f"--metrics-port={metrics_port}",
            f"--http-restricted-api={RESTRICTED_APIS}:admin-key={self._admin_key}",
            f"--grpc-restricted-protocol={RESTRICTED_APIS}:admin-key={self._admin_key}",
            f"--backend-config=python,shm-default-byte-size={self._shm_bytes}",
            # Named after the temporary directory, so that `stop` finds what a killed server leaves behind.
            f"--backend-config=python,shm-region-prefix-name={backends.parent.name}",
            # More at a time take each other's cores: a model whose process is silent for a second counts as dead, and
            # Triton 24.10 then waits for ever for its end.
            f"--model-load-thread-count={min(4, usable_cpus())}",
            f"--exit-timeout-secs={max(1, int(self._stop_timeout) - 2)}",
            *_log_arguments(self._log_level),
        ]
        if self._models is not None:
            arguments.append("--model-control-mode=explicit")
            arguments += [f"--load-model={name}" for name in self._models]
        if self.device == "cpu":
            arguments += ["--model-config-name=cpu", "--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
        return arguments

    def _server_environment(self, libpython: Path, triton: Triton) -> dict[str, str]:
        environment = dict(os.environ)
        # The stub embeds libpython, which finds its home through the python3 on PATH: the first one there must be
        # ours, then the stub runs this very environment, .pth files and all.
        _prepend(environment, "PATH", Path(sys.executable).parent)
        for directory in reversed((libpython, _library_directory(), *triton.libraries)):
            _prepend(environment, "LD_LIBRARY_PATH", directory)
        for variable in _THREAD_VARIABLES:
            environment.setdefault(variable, str(usable_cpus()))
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        environment[NOTICE_VARIABLE] = str(libpython.parent / "stopping")
        return environment | self._environment

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while time.monotonic() < deadline:
            if self._process is None or _has_exited(self._process.pid):
                raise ServerFailed(f"tritonserver ended before it was ready\n{self.log_end()}")
            if _is_ready(self.http) and _listens(self.grpc) and _listens(self.metrics):  # the last of them opens last
                return
            time.sleep(0.05)
        raise ServerFailed(f"tritonserver was not ready after {self._start_timeout:g} s\n{self.log_end()}")


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return True
    except OSError:
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lightseq serve`."""
    parser.add_argument("--repository", default="model_repository", help="model repository (default: %(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU where one is usable")
    parser.add_argument("--address", default=LOOPBACK, help="address to listen on (default: %(default)s)")
    parser.add_argument("--http-port", type=int, default=8000, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--grpc-port", type=int, default=8001, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=8002, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--model", action="append", dest="models", help="load only this model (may be repeated)")
    parser.add_argument(
        "--triton",
        metavar="DIR",
        help=f"the Triton to use, as /opt/tritonserver lies (default: {TRITON_VARIABLE}, else found)",
    )
    parser.add_argument(
        "--admin-key",
        default=os.environ.get(ADMIN_KEY_VARIABLE),
        help=f"opens the administration APIs to requests with this key (default: ${ADMIN_KEY_VARIABLE})",
    )
    parser.add_argument(
        "--awake",
        action="store_true",
        help="let no core fall asleep: requests that come one by one are answered sooner, at the cost of power",
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning")
    parser.add_argument("--start-timeout", type=float, default=300.0, help="seconds until ready (default: %(default)g)")
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="last of all: serve only while this command runs; {http}, {grpc} and {metrics} in it become addresses",
    )


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM, or while --run's command runs; the exit status for the command line."""
    signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        server = EmbeddedServer(
            arguments.repository,
            device=arguments.device,
            address=arguments.address,
            http_port=arguments.http_port,
            grpc_port=arguments.grpc_port,
            metrics_port=arguments.metrics_port,
            admin_key=arguments.admin_key,
            models=arguments.models,
            triton=arguments.triton,
            log_level=arguments.log_level,
            log_to_terminal=not arguments.run,
            start_timeout=arguments.start_timeout,
        )
        if server.gpu_obstacle:
            print(f"no usable GPU found ({server.gpu_obstacle}): serving on the CPU", flush=True)
        with cores_awake() if arguments.awake else nullcontext(), server:
            print(f"ready: http {server.http}  grpc {server.grpc}  metrics {server.metrics}/metrics", flush=True)
            if arguments.run:
                return _run(arguments.run, server)
            status = server.wait()
            print(f"tritonserver ended by itself with status {status}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        return 0
    except ServerFailed as error:
        print(f"lightseq serve: {error}", file=sys.stderr)
        return 1


def _run(command: list[str], server: EmbeddedServer) -> int:
    addresses = {"{http}": server.http, "{grpc}": server.grpc, "{metrics}": server.metrics}
    for name, address in addresses.items():
        command = [word.replace(name, address) for word in command]
    status = subprocess.run(command, check=False).returncode
    if status:
        print(f"Triton's log ends:\n{server.log_end()}", file=sys.stderr)
    return status


def _raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _lay_out_backends(triton: Triton, backends: Path) -> None:
    """The Python backend, and one named as LightSeq's own, so that its users' config.pbtxt works without a model.py."""
    # The library looks for its stub and utilities beside itself; the wheel keeps them apart. Copies, because Triton
    # refuses the program of a named backend when links lead out of the directory.
    (backends / "python").mkdir(parents=True)
    for path in triton.backend_files:
        shutil.copy(path, backends / "python")
    (backends / "lightseq").mkdir()
    program = "from lightseq_backend.serving.model import TritonPythonModel as TritonPythonModel\n"
    (backends / "lightseq" / "model.py").write_text(program)


def _use_own_libpython(triton: Triton, directory: Path) -> None:
    """Answer the stub's wish for a foreign libpython with the running interpreter's.

    The stub's RPATH, which comes before LD_LIBRARY_PATH, is relative to where the stub itself lies: our copy no longer
    finds the foreign one.
    """
    own = _library_directory() / f"libpython{_python_version()}.so.1.0"
    if not own.exists():
        raise ConfigError(f"{own} is missing: apt-get install libpython{_python_version()}")
    (directory / "lib").mkdir()
    for name in triton.libpythons:
        (directory / "lib" / name).symlink_to(own)


def _library_directory() -> Path:
    """Where the running interpreter's libpython3.X.so lies."""
    return Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")


def _prepend(environment: dict[str, str], variable: str, directory: Path) -> None:
    rest = environment.get(variable)
    environment[variable] = f"{directory}{os.pathsep}{rest}" if rest else str(directory)


def _log_arguments(level: str) -> list[str]:
    rank = LOG_LEVELS.index(level)
    arguments = [f"--log-{name}={str(LOG_LEVELS.index(name) <= rank).lower()}" for name in LOG_LEVELS[:3]]
    return [*arguments, f"--log-verbose={int(level == 'verbose')}"]


def _choose_ports(wanted: tuple[int, int, int]) -> tuple[int, int, int]:
    """The wanted ports, each 0 replaced by a free one. All are held open until the last is chosen."""
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        ports = []
        for port, holder in zip(wanted, (first, second, third), strict=True):
            if not port:
                holder.bind((LOOPBACK, 0))
                port = holder.getsockname()[1]
            ports.append(port)
    return ports[0], ports[1], ports[2]


def _is_ready(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _has_exited(pid: int) -> bool:
    """Whether our child has ended. It is left unreaped, so that its process group id stays its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """SIGTERM, wait, then SIGKILL the server and every stub of its process group, and wait until none of them runs."""
    if not _has_exited(process.pid):
        process.send_signal(signal.SIGTERM)
    _wait(lambda: _has_exited(process.pid), patience)
    os.killpg(process.pid, signal.SIGKILL)
    _wait(lambda: not _group_lives(process.pid), GOING)
    process.wait()


def _wait(until: Callable[[], bool], seconds: float) -> None:
    """Until that is so, or for so long."""
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(0.02)


def _group_lives(leader: int) -> bool:
    """Whether any process of that group runs. Those that have ended and wait for their parent do not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, group = path.read_text().rpartition(") ")[2].split()[:3]
            if int(group) == leader and state not in "ZX":
                return True
    return False
