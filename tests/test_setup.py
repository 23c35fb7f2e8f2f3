"""Set-up without a GPU takes torch's CPU build where it can, and says in one line what it costs where
it cannot."""

from __future__ import annotations

import base64
import hashlib
import http.server
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "setup_torch.py"
VERSION = "2.13.0+cpu"
WHEEL = f"torch-{VERSION}-py3-none-any.whl"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on a Linux machine without torch and without a GPU, whatever this one has."""
    spec = importlib.util.spec_from_file_location("setup_torch", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DRIVER_FILES", ())
    monkeypatch.setattr(module, "is_installed", lambda version: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", "")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return module


class Index:
    """An index of CPU builds on loopback: what it answers to a request, and what was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.asked: list[str] = []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                body = files.get(self.path)
                self.send_response(404 if body is None else 200)
                kind = "text/html" if self.path.endswith("/") else "application/octet-stream"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *values: Any) -> None:
                """Says nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/whl"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    """One that has a torch of this version, without a line of code in it."""
    page = f'<a href="{WHEEL.replace("+", "%2B")}">{WHEEL}</a>'.encode()
    files = {"/whl/torch/": page, f"/whl/torch/{WHEEL.replace('+', '%2B')}": wheel(tmp_path)}
    served = Index(files)
    yield served
    served.close()


def wheel(folder: Path) -> bytes:
    info = f"torch-{VERSION}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {VERSION}\nRequires-Dist: sympy\n"
    content = {
        "torch/__init__.py": f"__version__ = {VERSION!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for name, text in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record.append(f"{name},sha256={digest.decode()},{len(text)}")
    content[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return (folder / WHEEL).read_bytes()


@pytest.fixture
def installed(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The indexes that pip was to install from, instead of an installation."""
    indexes: list[str] = []

    def install(index: str) -> bool:
        indexes.append(index)
        return True

    monkeypatch.setattr(setup, "install", install)
    return indexes


def a_smi(folder: Path, text: str) -> str:
    """A folder for PATH with an nvidia-smi that does this."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return str(folder)


def test_without_a_gpu_torch_comes_from_an_index_that_answers(
    setup: ModuleType, index: Index, installed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.main(["--index", index.url + "/"]) == 0
    assert installed == [index.url] and index.asked == ["/whl/torch/"]
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("driver", "text", "is_gpu"),
    [
        ("smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'", True),
        ("smi", "echo 'NVIDIA-SMI has failed' && exit 9", False),
        ("smi", "echo 'No devices were found'", False),
        ("smi", "exec sleep 30", False),
        ("file", "", True),
        ("folder", "0000:0a:00.0", True),
        ("folder", "", False),
        ("none", "", False),
    ],
)
def test_a_gpu_is_what_nvidia_smi_or_the_driver_names(
    setup: ModuleType,
    index: Index,
    installed: list[str],
    driver: str,
    text: str,
    is_gpu: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "driver"
    if driver == "smi":
        monkeypatch.setenv("PATH", a_smi(path, text) + ":/usr/bin:/bin")
        monkeypatch.setattr(setup, "DRIVER_S", 1.0)
    else:
        monkeypatch.setattr(setup, "DRIVER_FILES", (path,))
    if driver == "file":
        path.touch()
    if driver == "folder":
        (path / text).mkdir(parents=True)
    assert setup.main(["--index", index.url]) == 0
    assert (index.asked, installed) == (([], []) if is_gpu else (["/whl/torch/"], [index.url]))


def test_nothing_is_asked_where_torch_is_there_or_no_index_is_named(
    setup: ModuleType,
    index: Index,
    installed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert setup.main(["--index", ""]) == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert setup.main(["--index", index.url]) == 0
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(setup, "is_installed", lambda version: version == "2.13.0")
    assert setup.main(["--index", index.url]) == 0
    assert index.asked == installed == [] and capsys.readouterr().out == ""


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed: one line that says what it costs, and how another index is named."""
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "several GB of CUDA libraries" in out and "TORCH_INDEX=" in out
    return out


def a_closed_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port: int = closed.getsockname()[1]
        return port


def test_an_index_that_refuses_is_one_line_and_pips_default(
    setup: ModuleType, installed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.main(["--index", f"http://127.0.0.1:{a_closed_port()}/whl"]) == 0
    assert "cannot be reached" in one_line(capsys) and installed == []


@pytest.mark.parametrize("url", ["nonsense", "http://[::1", "http://127.0.0.1:99999999/whl"])
def test_an_address_that_is_none_is_one_line_and_pips_default(
    setup: ModuleType, installed: list[str], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.main(["--index", url]) == 0
    assert "cannot be reached" in one_line(capsys) and installed == []


def test_an_index_without_torch_is_one_line_and_pips_default(
    setup: ModuleType, index: Index, installed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.main(["--index", index.url + "/other"]) == 0
    assert "answers HTTP 404" in one_line(capsys) and installed == []


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"])
def test_an_index_that_hangs_is_given_up_after_its_time(
    setup: ModuleType,
    installed: list[str],
    says: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It says nothing at all, or a byte at a time, which no time limit of a socket ends."""
    ended = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))

    def hang() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(says)
            while not ended.wait(0.05):
                if says:
                    connection.sendall(b" ")

    server = threading.Thread(target=hang, daemon=True)
    server.start()
    monkeypatch.setattr(setup, "ANSWER_S", 0.5)
    begin = time.monotonic()
    try:
        assert setup.main(["--index", f"http://127.0.0.1:{listening.getsockname()[1]}/whl"]) == 0
        assert time.monotonic() - begin < 5  # the server never ends it
    finally:
        ended.set()
        server.join()
        listening.close()
    assert "does not answer within 0.5 s" in one_line(capsys) and installed == []


def test_a_build_that_pip_cannot_install_is_one_line_and_pips_default(
    setup: ModuleType,
    index: Index,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(setup, "install", lambda index: False)
    assert setup.main(["--index", index.url]) == 0
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert "no NVIDIA GPU here" in first and "has no build that pip can install here" in rest


def test_the_time_limit_is_3_s_and_the_version_that_of_the_constraints(setup: ModuleType) -> None:
    assert setup.ANSWER_S == 3.0
    assert f"torch=={setup.pinned()}\n" in (ROOT / "constraints.txt").read_text()


def test_make_names_the_index_to_the_script() -> None:
    def commands(*variables: str) -> str:
        command = ["make", "--dry-run", "--always-make", "setup", *variables]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout

    script = ".venv/bin/python .ci/setup_torch.py --index "
    assert f"{script}'https://download.pytorch.org/whl/cpu'\n" in commands()
    assert f"{script}'http://elsewhere'\n" in commands("TORCH_INDEX=http://elsewhere")
    assert f"{script}''\n" in commands("TORCH_INDEX=")
    told = commands()
    assert told.index("setup_torch.py") < told.index("-e '.[dev,asv]'")


@pytest.mark.slow
@pytest.mark.procs
def test_pip_installs_the_build_of_the_index_and_the_second_time_nothing_is_fetched(
    index: Index, tmp_path: Path
) -> None:
    """The whole way, with pip in a new environment and a torch that has no code."""
    if any(Path(driver).exists() for driver in ("/dev/nvidia0", "/proc/driver/nvidia/gpus")):
        pytest.skip("this machine has an NVIDIA GPU, for which nothing is taken from the index")
    venv.create(tmp_path / "venv", with_pip=False)  # unpacking pip would take seconds
    pip = importlib.util.find_spec("pip")
    assert pip is not None and pip.submodule_search_locations
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "pip").symlink_to(pip.submodule_search_locations[0])
    python = tmp_path / "venv" / "bin" / "python"
    settings = {name: os.environ[name] for name in ("HOME",) if name in os.environ}
    environment = {
        **settings,
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(tmp_path / "tools"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_CACHE_DIR": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    said = []
    for _ in range(2):
        done = subprocess.run(
            [python, SCRIPT, "--index", index.url],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "torch's CPU build is taken from" in said[0] and said[1] == "", said
    assert len([path for path in index.asked if re.search(r"\.whl$", path)]) == 1
    shown = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
    )
    assert shown.stdout.strip() == VERSION, shown.stderr
