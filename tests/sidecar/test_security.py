"""Who gets in, over which wire, and what those who misbehave can hold on to. Real certificates, sockets and streams."""

from __future__ import annotations

import base64
import contextlib
import os
import pty
import queue
import re
import select
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bcrypt
import grpc
import httpx
import pytest
import trustme
from certificates import install
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from processes import Sidecar, program, wait_for
from watchers import free_port
from workers import MODEL, SITES, layout, window

from maxact_proto import wire
from maxact_proto.v1 import telemetry_pb2_grpc
from maxact_sidecar import auth, httpserver, ingest, state
from maxact_sidecar import fleet as fleets
from maxact_sidecar.config import make_settings
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.headroom import Instant
from maxact_sidecar.http import MOST_CARDS

TOKEN = "a-token-of-sufficient-length"
HASH = "$2y$04$" + "a" * 53


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Sidecar]]:
    running: list[Sidecar] = []

    def begin(*options: str) -> Sidecar:
        running.append(Sidecar(tmp_path / "log", *options))
        return running[-1]

    yield begin
    for sidecar in running:
        sidecar.stop()


def stream(
    address: str, credentials: grpc.ChannelCredentials | None, *metadata: tuple[str, str], **changes: Any
) -> tuple[grpc.StatusCode, str]:
    """How a worker that sends its layout and then leaves fares."""
    secure = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    with secure as channel:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
        call = stub.Stream(iter([wire.encode_layout(layout(**changes))]), timeout=20, metadata=metadata)
        try:
            list(call)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""


def serial_of(address: str) -> int:
    host, port = address.split(":")
    pem = ssl.get_server_certificate((host, int(port)))
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def test_both_servers_speak_tls_and_take_over_a_renewed_certificate(
    tmp_path: Path, authority: trustme.CA, start: Callable[..., Sidecar]
) -> None:
    sidecar = start(*install(tmp_path, authority))
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    assert httpx.get(f"{sidecar.url}/metrics", verify=trusted).is_success
    credentials = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
    assert stream(sidecar.grpc, credentials)[0] is grpc.StatusCode.OK
    assert stream(sidecar.grpc, None)[0] is grpc.StatusCode.UNAVAILABLE
    before = [serial_of(address) for address in (sidecar.grpc, sidecar.http)]
    install(tmp_path, authority)
    wait_for(lambda: serial_of(sidecar.http) != before[1], 10)
    assert serial_of(sidecar.grpc) == serial_of(sidecar.http)
    assert stream(sidecar.grpc, credentials)[0] is grpc.StatusCode.OK


def test_a_renewed_certificate_that_does_not_work_changes_nothing(
    tmp_path: Path, authority: trustme.CA, start: Callable[..., Sidecar]
) -> None:
    sidecar = start(*install(tmp_path, authority))
    before = serial_of(sidecar.http)
    (tmp_path / "cert.pem").write_text("half a certificate")
    wait_for(lambda: "certificate not renewed" in sidecar.log.read_text(), 10)
    assert serial_of(sidecar.http) == serial_of(sidecar.grpc) == before


def test_clients_show_a_certificate_where_an_authority_is_named(
    tmp_path: Path, authority: trustme.CA, start: Callable[..., Sidecar]
) -> None:
    options = install(tmp_path, authority)
    ca = str(tmp_path / "ca.pem")
    sidecar = start(*options, "--grpc-client-ca", ca)
    issued = authority.issue_cert("worker")
    root, key, chain = Path(ca).read_bytes(), issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes()
    assert stream(sidecar.grpc, grpc.ssl_channel_credentials(root, key, chain))[0] is grpc.StatusCode.OK
    assert stream(sidecar.grpc, grpc.ssl_channel_credentials(root))[0] is grpc.StatusCode.UNAVAILABLE
    foreign = trustme.CA().issue_cert("worker")
    stranger = grpc.ssl_channel_credentials(root, foreign.private_key_pem.bytes(), foreign.cert_chain_pems[0].bytes())
    assert stream(sidecar.grpc, stranger)[0] is grpc.StatusCode.UNAVAILABLE


def test_http_clients_show_a_certificate_where_an_authority_is_named(tmp_path: Path, authority: trustme.CA) -> None:
    options = install(tmp_path, authority)
    ca, http = str(tmp_path / "ca.pem"), f"127.0.0.1:{free_port()}"
    command = [program("maxact"), "sidecar", "--grpc", "127.0.0.1:0", "--http", http, *options, "--http-client-ca", ca]
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
        wait_for(lambda: "sidecar ready" in log.read_text(), 20)
        context = ssl.create_default_context(cafile=ca)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"https://{http}/metrics", verify=context)
        issued = authority.issue_cert("prometheus")
        with issued.private_key_and_cert_chain_pem.tempfile() as pem:
            context.load_cert_chain(pem)
        assert httpx.get(f"https://{http}/metrics", verify=context).is_success
        process.terminate()


def test_who_showed_a_certificate_of_a_former_authority_no_longer_gets_in(
    tmp_path: Path, authority: trustme.CA, start: Callable[..., Sidecar]
) -> None:
    options, clients = install(tmp_path, authority), tmp_path / "clients.pem"
    former, present = trustme.CA(), trustme.CA()
    former.cert_pem.write_to_path(str(clients))
    http = f"127.0.0.1:{free_port()}"
    sidecar = start(*options, "--grpc-client-ca", str(clients))
    command = [program("maxact"), "sidecar", "--grpc", "127.0.0.1:0", "--http", http, *options]
    log = tmp_path / "other-log"
    with log.open("wb") as file, subprocess.Popen([*command, "--http-client-ca", clients], stderr=file) as process:
        wait_for(lambda: "sidecar ready" in log.read_text(), 20)

        def gets_in(of: trustme.CA) -> tuple[bool, bool]:
            root, issued = (tmp_path / "ca.pem").read_bytes(), of.issue_cert("client")
            key, chain = issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes()
            code, _ = stream(sidecar.grpc, grpc.ssl_channel_credentials(root, key, chain))
            context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
            with issued.private_key_and_cert_chain_pem.tempfile() as pem:
                context.load_cert_chain(pem)
            try:
                status = httpx.get(f"https://{http}/metrics", verify=context).is_success
            except httpx.TransportError:
                status = False
            return code is grpc.StatusCode.OK, status

        assert (gets_in(former), gets_in(present)) == ((True, True), (False, False))
        present.cert_pem.write_to_path(str(clients))
        wait_for(lambda: gets_in(present) == (True, True), 20)
        assert gets_in(former) == (False, False)
        process.terminate()


def test_a_worker_needs_a_token_where_tokens_are_named(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"# old\nanother-token-of-length\n{TOKEN}\n")
    sidecar = start("--grpc-token-file", str(tokens))
    assert stream(sidecar.grpc, None, ("authorization", f"Bearer {TOKEN}"))[0] is grpc.StatusCode.OK
    refused = [
        (),
        (("authorization", f"Bearer {TOKEN}x"),),
        (("authorization", TOKEN),),
        (("authorization", "Bearer "),),
    ]
    for metadata in refused:
        code, details = stream(sidecar.grpc, None, *metadata)
        assert (code, details) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "a token of the sidecar's grpc_token_file is needed",
        )
    assert 'maxact_windows_rejected_total{reason="authorization"} 4.0' in sidecar.scrape()
    assert TOKEN not in sidecar.log.read_text()


def test_a_withdrawn_token_ends_the_stream_that_came_with_it(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    sidecar = start("--grpc-token-file", str(tokens))
    bearer = (("authorization", f"Bearer {TOKEN}"),)
    requests: queue.Queue[Any] = queue.Queue()
    with grpc.insecure_channel(sidecar.grpc) as channel:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
        replies = stub.Stream(iter(requests.get, None), metadata=bearer, timeout=60)
        requests.put(wire.encode_layout(layout()))
        layout_id = next(replies).layout_accepted.layout_id
        requests.put(wire.encode_window(window(1, 1.0, layout_id=layout_id)))
        assert next(replies).window_ack.sequence == 1
        tokens.write_text("a-new-token-that-replaces\n")
        time.sleep(auth.LOOK_SECONDS + 0.2)
        requests.put(wire.encode_window(window(2, 9.0, layout_id=layout_id)))
        with pytest.raises(grpc.RpcError) as raised:
            next(replies)
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        requests.put(None)
    assert stream(sidecar.grpc, None, *bearer)[0] is grpc.StatusCode.UNAUTHENTICATED
    assert 'maxact_windows_total{model_name="tiny/llama",engine="0"} 1' in sidecar.scrape()


def test_a_token_file_that_breaks_leaves_the_former_tokens(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    sidecar = start("--grpc-token-file", str(tokens))
    tokens.write_text("a secret with spaces in it\n")
    time.sleep(auth.LOOK_SECONDS + 0.2)
    assert stream(sidecar.grpc, None, ("authorization", f"Bearer {TOKEN}"))[0] is grpc.StatusCode.OK
    log = sidecar.log.read_text()
    assert f"{tokens}:1: is not a token" in log
    assert "a secret" not in log


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def test_http_asks_for_a_token_or_a_password(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    hashed = bcrypt.hashpw(b"right password", bcrypt.gensalt(4)).decode()
    (tmp_path / "users").write_text(f"ada:{hashed}\n")
    sidecar = start("--http-token-file", str(tmp_path / "tokens"), "--http-users-file", str(tmp_path / "users"))

    def status(header: str | None, path: str = "/metrics") -> int:
        return httpx.get(sidecar.url + path, headers={"authorization": header} if header else {}).status_code

    accepted = (f"Bearer {TOKEN}", f"bearer {TOKEN}", basic("ada", "right password"), basic("ada", "right password"))
    assert [status(header) for header in accepted] == [200] * 4
    refused = (
        None,
        f"Bearer {TOKEN[:-1]}",
        basic("ada", "wrong password"),
        basic("eve", "right password"),
        basic("ada", ""),
        "Basic not-base64!",
        "Basic",
        basic("ada", "x" * 5000),
    )
    assert [status(header) for header in refused] == [401] * len(refused)
    assert [status(None, path) for path in ("/-/healthy", "/-/ready")] == [200, 200]
    assert [status(None, path) for path in ("/", "/api/v1/sites", "/openapi.json", "/nothing")] == [401] * 4
    answer = httpx.get(sidecar.url)
    assert answer.headers["www-authenticate"] == 'Basic realm="maxact"'


def test_guessing_passwords_leaves_room_for_those_who_know_theirs(
    tmp_path: Path, start: Callable[..., Sidecar]
) -> None:
    hashed = bcrypt.hashpw(b"right password", bcrypt.gensalt(11)).decode()
    (tmp_path / "users").write_text(f"ada:{hashed}\n")
    sidecar = start("--http-users-file", str(tmp_path / "users"))

    with httpx.Client(base_url=sidecar.url, timeout=60) as client, ThreadPoolExecutor(3 * auth.MOST_LOGINS) as guessers:

        def status(password: str) -> int:
            return client.get("/api/v1/flags", headers={"authorization": basic("ada", password)}).status_code

        assert status("right password") == 200
        guesses = [guessers.submit(status, f"guess {number}") for number in range(3 * auth.MOST_LOGINS)]
        wait_for(lambda: any(guess.done() and guess.result() == 401 for guess in guesses), 30)
        assert status("right password") == 200
        num_waiting = sum(not guess.done() for guess in guesses)
        assert {guess.result() for guess in guesses} == {401, 429}
    assert num_waiting > 2, "it waited until the guesses were over"


def test_a_password_is_as_long_as_bcrypt_reads(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    long = "x" * 72
    hashed = bcrypt.hashpw(long.encode(), bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$")
    (tmp_path / "users").write_text(f"ada:{hashed}\n")
    sidecar = start("--http-users-file", str(tmp_path / "users"))
    for password, expected in ((long, 200), (long + "y", 200), (long[:-1], 401), ("\0", 401)):
        headers = {"authorization": basic("ada", password)}
        assert httpx.get(f"{sidecar.url}/metrics", headers=headers).status_code == expected


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:9471", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:9471", 200),
        ("[::1]", 200),
        ("rebound.example:9471", 403),
        ("localhost.rebound.example", 403),
        ("10.0.0.1", 403),
        ("", 403),
    ],
)
def test_a_browser_that_was_led_here_by_a_foreign_name_is_refused(sidecar: Sidecar, host: str, status: int) -> None:
    assert httpx.get(f"{sidecar.url}/metrics", headers={"host": host}).status_code == status


def test_a_name_that_the_certificate_vouches_for_is_no_foreign_one(
    tmp_path: Path, authority: trustme.CA, start: Callable[..., Sidecar]
) -> None:
    sidecar = start(*install(tmp_path, authority))
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    assert httpx.get(f"{sidecar.url}/metrics", headers={"host": "sidecar.example"}, verify=trusted).is_success


def test_state_is_open_to_its_owner_only_whatever_its_folder(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    sidecar = start("--state", str(folder))
    sidecar.connect().send(1.0)
    wait_for(lambda: any(folder.iterdir()), 10)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    http, grpc_port = free_port(), free_port()
    command = [program("maxact"), "sidecar", "--grpc", f"127.0.0.1:{grpc_port}", "--http", f"127.0.0.1:{http}"]
    controller, terminal = pty.openpty()
    with subprocess.Popen(command, stderr=terminal) as process:
        os.close(terminal)
        wait_for(lambda: b"sidecar ready" in read_some(controller), 20)
        stream(f"127.0.0.1:{grpc_port}", None, engine="\x1b[2J\nWARNING forged")
        process.terminate()
    said = b""
    with contextlib.suppress(OSError):
        while more := os.read(controller, 65536):
            said += more
    os.close(controller)
    assert b"engine=\\x1b[2J\\nWARNING forged" in said
    assert b"\x1b" not in said


def read_some(terminal: int) -> bytes:
    """What was written to the terminal meanwhile."""
    ready, _, _ = select.select([terminal], [], [], 0)
    return os.read(terminal, 65536) if ready else b""


def test_who_logs_in_may_come_by_any_name(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    sidecar = start("--http-token-file", str(tmp_path / "tokens"))
    headers = {"host": "maxact.example", "authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"{sidecar.url}/metrics", headers=headers).is_success


def test_the_command_line_logs_in(tmp_path: Path, authority: trustme.CA, start: Callable[..., Sidecar]) -> None:
    (tmp_path / "tokens").write_text(f"# of the sidecar\n{TOKEN}\n")
    sidecar = start(*install(tmp_path, authority), "--http-token-file", str(tmp_path / "tokens"))
    url = sidecar.url
    command = [program("maxact"), "card", url, "--output", str(tmp_path / "card.json")]
    login = ["--token-file", str(tmp_path / "tokens"), "--ca", str(tmp_path / "ca.pem")]
    asked = [subprocess.run([*command, *options], capture_output=True, text=True) for options in (login[2:], login)]
    assert [done.stderr for done in asked] == [
        f"error: {url}: log in first\n",
        f"error: {url}: no engine has connected yet\n",
    ]


def test_the_doctor_comes_as_a_worker_would(
    tmp_path: Path, authority: trustme.CA, start: Callable[..., Sidecar]
) -> None:
    tokens, ca = tmp_path / "tokens", str(tmp_path / "ca.pem")
    tokens.write_text(f"{TOKEN}\n")
    sidecar = start(*install(tmp_path, authority), "--grpc-token-file", str(tokens), "--http-token-file", str(tokens))
    for options, status, receiver, page in (
        (["--ca", ca, "--token-file", str(tokens)], 0, "takes workers with these settings", "no engine has connected"),
        (["--ca", ca], 1, "UNAUTHENTICATED: a token of the sidecar's grpc_token_file is needed", "log in first"),
        (["--ca", str(tokens)], 1, f"{tokens}: holds no certificate", f"{tokens}: holds no certificate"),
    ):
        command = [program("maxact"), "doctor", "--endpoint", sidecar.grpc, "--http", sidecar.url, *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
        assert done.returncode == status, done.stdout
        lines = {line.split(maxsplit=3)[2]: line for line in done.stdout.splitlines() if "sidecar, " in line}
        assert receiver in lines["gRPC"]
        assert page in lines["HTTP"]


def test_the_command_line_shows_a_certificate(tmp_path: Path, authority: trustme.CA) -> None:
    options, http = install(tmp_path, authority), f"127.0.0.1:{free_port()}"
    command = [program("maxact"), "sidecar", "--grpc", "127.0.0.1:0", "--http", http, *options]
    log = tmp_path / "log"
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    with log.open("wb") as file, subprocess.Popen([*command, "--http-client-ca", ca], stderr=file) as process:
        wait_for(lambda: "sidecar ready" in log.read_text(), 20)
        card = [program("maxact"), "card", f"https://{http}", "--output", str(tmp_path / "card.json"), "--ca", ca]
        shown = subprocess.run([*card, "--cert", cert, "--key", key], capture_output=True, text=True)
        hidden = subprocess.run(card, capture_output=True, text=True)
        process.terminate()
    assert shown.stderr == f"error: https://{http}: no engine has connected yet\n"
    assert hidden.stderr.startswith(f"error: https://{http}: no sidecar answers there (")


def test_the_command_line_sends_no_token_unencrypted(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    (tmp_path / "short").write_text("short-token\n")
    for url, tokens, message in (
        ("http://192.0.2.1:9471", "tokens", "http://192.0.2.1:9471: a token would cross the network unencrypted"),
        ("https://localhost:1", "short", f"--token-file: {tmp_path / 'short'}:1: is not a token of at least 16"),
        ("https://localhost:1", "none", f"--token-file: {tmp_path / 'none'}: No such file"),
    ):
        command = [program("maxact"), "card", url, "--output", "x", "--token-file", str(tmp_path / tokens)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stderr.startswith(f"error: {message}"), done.stderr
        assert "short-token" not in done.stderr


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, ["--http", "0.0.0.0:0"], "http: 0.0.0.0:0 can be reached from other machines, without encryption"),
        ({}, ["--tls-cert", "{}/cert.pem"], "tls_cert: certificate and key are needed together"),
        ({}, ["--grpc-client-ca", "{}/ca.pem"], "grpc_client_ca: needs TLS"),
        ({}, ["--tls-cert", "{}/c", "--tls-key", "{}/k"], "tls_cert: {}/c: No such file or directory"),
        ({"c": "x", "k": "y"}, ["--tls-cert", "{}/c", "--tls-key", "{}/k"], "tls_cert: {}/c and {}/k are not a cert"),
        ({"t": "short\n"}, ["--http-token-file", "{}/t"], "{}/t:1: is not a token of at least 16 characters"),
        ({"t": "# none\n"}, ["--grpc-token-file", "{}/t"], "{}/t: holds no token"),
        ({"u": "\nada:password\n"}, ["--http-users-file", "{}/u"], "{}/u:2: is not name:bcrypt-hash"),
        ({"u": f":{HASH}\n"}, ["--http-users-file", "{}/u"], "{}/u:1: is not name:bcrypt-hash"),
        ({"u": f"ada:{HASH.replace('$04$', '$17$')}\n"}, ["--http-users-file", "{}/u"], "{}/u:1: costs 2^17"),
        ({"u": ""}, ["--http-users-file", "{}/u"], "{}/u: holds no user"),
        (
            {},
            ["--http", "unix:{}/s", "--tls-cert", "c", "--tls-key", "k", "--http-client-ca", "ca"],
            "http_client_ca: there is no TLS on unix:{}/s",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_listens(
    tmp_path: Path, files: dict[str, str], options: list[str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    given = [option.replace("{}", str(tmp_path)) for option in options]
    done = subprocess.run([program("maxact"), "sidecar", "--check-config", *given], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: " + message.replace("{}", str(tmp_path))), done.stderr


def test_other_machines_may_come_with_tls(tmp_path: Path, authority: trustme.CA) -> None:
    options = install(tmp_path, authority)
    done = subprocess.run(
        [program("maxact"), "sidecar", "--check-config", "--http", "0.0.0.0:9471", *options], capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_an_encrypted_key_is_refused_without_a_question(tmp_path: Path, authority: trustme.CA) -> None:
    options = install(tmp_path, authority)
    key = serialization.load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    locked = key.private_bytes(*form, serialization.BestAvailableEncryption(b"password"))
    (tmp_path / "key.pem").write_bytes(locked)
    done = subprocess.run([program("maxact"), "sidecar", "--check-config", *options], capture_output=True, text=True)
    assert done.stderr == "error: tls_key: is encrypted; a server starts without anybody to type a password\n"


def test_what_is_open_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "loose").write_text(f"{TOKEN}\n")
    (tmp_path / "loose").chmod(0o644)
    options = ["--grpc", "0.0.0.0:0", "--http", "0.0.0.0:0", "--insecure", "--http-token-file", tmp_path / "loose"]
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen([program("maxact"), "sidecar", *options], stderr=file) as process:
        wait_for(lambda: "sidecar ready" in log.read_text(), 20)
        process.terminate()
    text = log.read_text()
    assert "anybody who reaches it may use it server=grpc" in text
    assert "tokens and passwords cross the network unencrypted server=http" in text
    assert f"every user of this machine can read it setting=http_token_file file={tmp_path / 'loose'}" in text


def test_a_private_sidecar_with_private_files_has_nothing_to_say(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    (tmp_path / "tight").write_text(f"{TOKEN}\n")
    (tmp_path / "tight").chmod(0o600)
    assert "WARNING" not in start("--http-token-file", str(tmp_path / "tight")).log.read_text()


@pytest.mark.parametrize(
    ("changes", "details"),
    [
        ({"model": "m" * (wire.MAX_STRING + 1)}, f"layout.model: 513 characters, allowed are {wire.MAX_STRING}"),
        (
            {"sites": (SITES[1],) * (wire.MAX_SITES + 1)},
            f"layout.sites: 20001 sites, allowed are 1 to {wire.MAX_SITES}",
        ),
    ],
)
def test_a_layout_beyond_a_limit_is_refused(sidecar: Sidecar, changes: dict[str, Any], details: str) -> None:
    assert stream(sidecar.grpc, None, **changes) == (grpc.StatusCode.INVALID_ARGUMENT, details)
    assert sidecar.get("models") == []


def test_an_engine_has_only_so_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_MOST_RANKS", 2)
    fleet = Fleet(make_settings())
    for tp_rank in range(2):
        fleet.attach(layout(tp_rank=tp_rank, tp_size=4))
    with pytest.raises(wire.WireError, match="2 ranks of this engine are known"):
        fleet.attach(layout(tp_rank=2, tp_size=4))
    fleet.attach(layout(tp_rank=1, tp_size=4))


def test_of_engines_that_are_gone_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "_MOST_GONE", 3)
    fleet = Fleet(make_settings(stale=1e6))
    for number in range(5):
        engine, rank = fleet.attach(layout(engine=f"engine-{number}"))
        engine.detach(rank, Instant(1e9 + number, 1000.0 + number))
    shown = [snapshot.engine for snapshot in fleet.snapshots(Instant(1e9 + 9, 1009.0))]
    assert shown == ["engine-2", "engine-3", "engine-4"]


def test_only_so_many_cards_are_kept(sidecar: Sidecar) -> None:
    sidecar.connect().send(1.0)
    card = sidecar.get("card")
    with httpx.Client(base_url=sidecar.url) as client:

        def load(number: int) -> int:
            return client.post("/api/v1/cards", json={**card, "model": f"model-{number}"}).status_code

        assert {load(number) for number in range(MOST_CARDS)} == {201}
        assert (load(MOST_CARDS), load(0)) == (409, 201)
    assert len(sidecar.get("cards")) == MOST_CARDS


def test_a_stream_that_says_nothing_is_ended(sidecar: Sidecar) -> None:
    def never() -> Iterator[object]:
        time.sleep(30)
        yield

    with grpc.insecure_channel(sidecar.grpc) as channel:
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as raised:
            list(telemetry_pb2_grpc.TelemetryServiceStub(channel).Stream(never(), timeout=25))
        assert raised.value.details() == f"layout: did not come within {ingest.LAYOUT_SECONDS:g} s"
    assert time.monotonic() - started < 2 * ingest.LAYOUT_SECONDS


def test_connections_beyond_the_limits_are_closed_and_the_others_go_on(
    tmp_path: Path, start: Callable[..., Sidecar]
) -> None:
    sidecar = start("--max-streams", "2")
    worker = sidecar.connect()
    for address, most in ((sidecar.grpc, 2 + ingest.SPARE_CONNECTIONS), (sidecar.http, httpserver.MAX_CONNECTIONS)):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(address)) for _ in range(most + 20)]
            time.sleep(1)
            num_open = len([client for client in clients if not is_closed(client)])
        # The worker's connection counts as well, and what is left of the probes of readiness.
        assert most - 10 <= num_open <= most, address
    worker.send(1.0)
    wait_for(lambda: httpx.get(f"{sidecar.url}/-/ready").is_success, 5)


def test_as_many_files_may_be_open_as_connections_are_let_in(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [program("maxact"), "sidecar", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    with (
        log.open("wb") as file,
        subprocess.Popen(["sh", "-c", 'ulimit -Sn 256; exec "$@"', "sh", *command], stderr=file) as process,
    ):
        wait_for(lambda: "sidecar ready" in log.read_text(), 20)
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        process.terminate()
    (soft,) = re.findall(r"^Max open files +(\d+)", limits, re.MULTILINE)
    assert int(soft) > 1024 + ingest.SPARE_CONNECTIONS + httpserver.MAX_CONNECTIONS


def test_connections_that_say_nothing_are_closed(
    tmp_path: Path, authority: trustme.CA, start: Callable[..., Sidecar]
) -> None:
    sidecar = start(*install(tmp_path, authority))
    started = time.monotonic()
    silent = [connect(address) for address in (sidecar.grpc, sidecar.http)]
    with grpc.secure_channel(sidecar.grpc, grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())) as idle:
        states: list[grpc.ChannelConnectivity] = []
        idle.subscribe(states.append, try_to_connect=True)
        wait_for(lambda: grpc.ChannelConnectivity.READY in states, 10)
        for client in silent:
            assert taken(client) == 0
        assert time.monotonic() - started < 2 * max(ingest.HANDSHAKE_SECONDS, httpserver.HANDSHAKE_SECONDS)
        assert states[-1] is grpc.ChannelConnectivity.READY
        wait_for(lambda: states[-1] is grpc.ChannelConnectivity.IDLE, 2 * ingest.IDLE_SECONDS)


def test_http_clients_that_keep_us_waiting_are_cut_off(sidecar: Sidecar) -> None:
    head = b"POST /api/v1/cards HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    slow = [connect(sidecar.http) for _ in range(3)]
    for client, sent in zip(slow, (b"", b"GET /metrics HT", head), strict=True):
        client.sendall(sent)
    assert [taken(client) for client in slow] == [0, 0, 0], "an answer to half a request"
    assert httpx.get(f"{sidecar.url}/-/ready").is_success


def test_a_request_without_end_to_its_head_is_refused(sidecar: Sidecar) -> None:
    with connect(sidecar.http) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n")
        with contextlib.suppress(OSError):
            for _ in range(256):
                client.sendall(b"x: " + b"y" * 1000 + b"\r\n")
        assert client.recv(64).startswith(b"HTTP/1.1 400")


def test_a_client_that_does_not_take_its_answer_is_cut_off(sidecar: Sidecar) -> None:
    sites = tuple(
        wire.Site(layer=each, name="hidden", width=8, sharded=False, module="m" * 64) for each in range(20_000)
    )
    sidecar.connect(layout(sites=sites)).send(3.0)
    answer = len(httpx.get(f"{sidecar.url}/api/v1/sites", timeout=60).content)
    host, port = sidecar.http.split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(b"GET /api/v1/sites HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert slow.recv(16).startswith(b"HTTP/1.1 200")
        time.sleep(httpserver.PATIENCE_SECONDS + 5)
        slow.settimeout(20)
        assert taken(slow) < answer


def connect(address: str) -> socket.socket:
    """A connection over which nothing is said yet."""
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=40)


def is_closed(client: socket.socket) -> bool:
    """Whether the server has hung up."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


def taken(client: socket.socket) -> int:
    """Bytes that still come until the server has hung up; closes."""
    num_bytes = 0
    with client, contextlib.suppress(ConnectionResetError):
        while received := client.recv(65536):
            num_bytes += len(received)
    return num_bytes


def test_nothing_of_the_model_is_in_a_refusal(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    sidecar = start("--http-token-file", str(tmp_path / "tokens"))
    sidecar.connect().send(1.0)
    for path in ("/", "/metrics", "/api/v1/models"):
        assert MODEL not in httpx.get(sidecar.url + path).text
