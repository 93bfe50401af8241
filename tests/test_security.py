"""What comes from elsewhere may not run code, leave its directory, or be reached from elsewhere."""

import ast
import hashlib
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fuzz_support import TARGETS

from evenstep.data import TokenData
from evenstep.errors import EvenstepError
from evenstep.models import load_pretrained
from evenstep.paths import is_plain_name, leaves
from evenstep.telemetry.watch import make_server
from evenstep.train.checkpoint import find_fault, read_manifest, read_tensors, read_trainer
from tests.telemetry.test_report import get

ROOT = Path(__file__).parents[1]
OUTSIDE = ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:secret", "\ud800", "a\nb", "x" * 300]


# ---- code ----


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}, node.lineno


def test_nothing_that_is_loaded_can_run_code():
    loose = []
    for path in (*ROOT.glob("evenstep/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/**/*.py")):
        for name, words, line in calls(path):
            unsafe = name.endswith("torch.load") and words.get("weights_only") != "True"
            unsafe |= name.startswith(("pickle.", "marshal.", "dill.", "joblib.")) or name in ("eval", "exec")
            unsafe |= name in ("np.load", "numpy.load") and words.get("allow_pickle") == "True"
            unsafe |= words.get("trust_remote_code") == "True" or words.get("shell") == "True"
            if unsafe:
                loose.append(f"{path.relative_to(ROOT)}:{line} {name}")
    assert loose == []


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_with_a_pickle_in_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 1, "config": Bomb()}, tmp_path / "trainer.pt")
    with pytest.raises(EvenstepError, match=r"trainer\.pt cannot be read"):
        read_tensors(tmp_path / "trainer.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [{}, [1], 3, {"step": "3"}, None])
def test_a_trainer_of_something_else_is_refused(checkpoint, content):
    assert read_trainer(checkpoint)["tokens"] == 9
    torch.save(content, checkpoint / "trainer.pt")
    with pytest.raises(EvenstepError, match=r"trainer\.pt is not of a run"):
        read_trainer(checkpoint)


# ---- paths ----


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_plain_name_has_no_way_out(name):
    assert not is_plain_name(name)
    assert is_plain_name("train-00000.bin") and not is_plain_name(None) and not is_plain_name(["a"])


def changed(place, change):
    path = place / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.fixture
def shards(tmp_path):
    place = tmp_path / "shards"
    place.mkdir()
    TARGETS["shards"].prepare(place)
    (tmp_path / "secret").write_bytes((place / "train-00000.bin").read_bytes())
    return place


@pytest.mark.parametrize("name", [*OUTSIDE, None, ["train-00000.bin"], 3])
def test_shards_do_not_leave_their_directory(shards, name):
    changed(shards, lambda manifest: manifest["splits"]["train"]["shards"][0].update(file=name))
    with pytest.raises(EvenstepError, match=r"lists .*a file outside|lacks"):
        TokenData(shards)


def test_neither_do_the_tokenizers_files(shards):
    secret = hashlib.sha256((shards.parent / "secret").read_bytes()).hexdigest()
    changed(shards, lambda manifest: manifest["tokenizer"]["files"].update({"../secret": secret}))
    with pytest.raises(EvenstepError, match="a file outside"):
        TokenData(shards)


def test_a_link_out_of_the_shards_is_refused(shards):
    (shards / "train-00000.bin").unlink()
    (shards / "train-00000.bin").symlink_to(shards.parent / "secret")
    assert leaves(shards, "train-00000.bin")
    with pytest.raises(EvenstepError, match="a file outside"):
        TokenData(shards)


def test_shards_reached_by_a_link_are_fine(shards, tmp_path):
    (tmp_path / "link").symlink_to(shards)
    assert len(TokenData(tmp_path / "link").train) > 0


@pytest.fixture
def checkpoint(tmp_path):
    place = tmp_path / "step-000003"
    place.mkdir()
    TARGETS["checkpoint"].prepare(place)
    assert find_fault(place) is None
    return place


@pytest.mark.parametrize("name", OUTSIDE)
def test_checkpoints_do_not_leave_their_directory(checkpoint, name):
    (checkpoint.parent / "secret").write_text("x")
    facts = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    changed(checkpoint, lambda manifest: manifest["files"].update({name: facts}))
    with pytest.raises(EvenstepError, match="outside of the checkpoint"):
        read_manifest(checkpoint)
    assert "outside" in find_fault(checkpoint)


def test_a_link_in_a_checkpoint_is_no_file_of_it(checkpoint):
    (checkpoint / "config.json").rename(checkpoint.parent / "config.json")
    (checkpoint / "config.json").symlink_to(checkpoint.parent / "config.json")
    assert find_fault(checkpoint) == "config.json is missing"


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_of_weights_does_not_leave_its_directory(tmp_path, name):
    TARGETS["config.json"].prepare(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "secret")
    index = {"weight_map": {"lm_head.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EvenstepError, match="do not trust it"):
        load_pretrained(tmp_path)


def test_a_model_of_absurd_size_is_refused_at_once(tmp_path):
    TARGETS["config.json"].prepare(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**8}))
    with pytest.raises(EvenstepError, match="100000000 layers"):
        load_pretrained(tmp_path)


# ---- the watch server ----


@pytest.fixture
def served(tmp_path):
    import threading

    TARGETS["metrics"].prepare(tmp_path)
    (tmp_path / "run/secret").write_text("not yours")
    with make_server([tmp_path / "run"]) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def asked(server, text, timeout=120.0):
    """The answer to a request as it goes over the wire."""
    with socket.create_connection(server.server_address, timeout) as connection:
        # It may answer and close before all was sent: what it answered is still there to be read.
        with suppress(OSError):
            connection.sendall(text if isinstance(text, bytes) else text.encode("latin-1"))
            connection.shutdown(socket.SHUT_WR)
        parts = []
        with suppress(ConnectionError):
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts)


def status(answer):
    return int(answer.split(b" ", 2)[1])


def request(server, path, method="GET", host="localhost", more=""):
    where = f"{host}:{server.server_port}"
    return asked(server, f"{method} {path} HTTP/1.0\r\nHost: {where}\r\n{more}\r\n")


def test_it_listens_on_this_machine_alone(served):
    assert served.server_address[0] == "127.0.0.1"
    assert status(request(served, "/")) == 200
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(1)
        other.connect((_outer_address(), served.server_port))


def _outer_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            address = probe.getsockname()[0]
        except OSError:
            address = ""
    return address if address and not address.startswith("127.") else "127.1.2.3"


PATHS = [
    "/secret", "/run/secret", "/../secret", "/..%2fsecret", "/%2e%2e/secret", "//secret", "/./secret", "/metrics.jsonl",
    "/config.toml", "/data.json/../secret", "/data.json%00", "/etc/passwd", "file:///etc/passwd", "\\secret", "*",
    "http://localhost/secret", "/?/../secret", "/data.json?x=../secret", "/" + "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_it_serves_two_things_and_nothing_else(served, path):
    answer = request(served, path)
    assert status(answer) == 404 and b"not yours" not in answer and b"root:" not in answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "HEAD", "X", "get", "<b>"])
def test_it_answers_get_alone(served, method):
    answer = request(served, "/", method)
    assert status(answer) in (400, 501) and b"Access-Control" not in answer
    assert b"<b>" not in answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.7", "[::1]", "", "@localhost"],
)
def test_names_that_other_sites_point_here_are_refused(served, host):
    for path in ("/", "/data.json"):
        assert status(request(served, path, host=host)) == 403
    assert status(asked(served, "GET / HTTP/1.0\r\n\r\n")) == 403
    assert status(request(served, "/", host="127.0.0.1")) == 200


def test_other_pages_cannot_read_the_answer(served):
    _, _, headers = get(f"http://localhost:{served.server_port}/data.json", Origin="https://evil.example")
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00",  # a TLS hello
        b"GET / HTTP/1.1",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n" * 100,
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost:1\r\nA: " + b"b" * 200_000 + b"\r\n\r\n",
        b"\0" * 1000,
    ],
    ids=["tls", "cut", "short", "version", "empty", "long path", "many headers", "long header", "zeros"],
)
def test_what_is_no_request_is_refused_and_the_next_one_answered(served, text, capfd):
    answer = asked(served, text)
    assert not answer.startswith(b"HTTP/1.0 200") and b"Traceback" not in answer
    assert status(request(served, "/")) == 200
    assert capfd.readouterr().err == ""


def test_a_body_is_not_read(served):
    answer = request(served, "/", more="Content-Length: 99999999999\r\n")
    assert status(answer) == 200


def test_a_silent_connection_is_dropped(served, monkeypatch):
    monkeypatch.setattr(served.RequestHandlerClass, "timeout", 0.2)
    with socket.create_connection(served.server_address, 120) as connection:
        connection.sendall(b"GET / HT")
        assert connection.recv(100) == b""


def test_a_reader_that_leaves_is_no_error(served, capfd):
    for _ in range(3):
        with socket.create_connection(served.server_address, 120) as connection:
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )  # a reset instead of a goodbye
            connection.sendall(f"GET / HTTP/1.0\r\nHost: localhost:{served.server_port}\r\n\r\n".encode())
    assert status(request(served, "/")) == 200
    assert "Traceback" not in capfd.readouterr().err
