"""Who gets in, over which wire, and what those who misbehave can hold on to. Real certificates, sockets and streams."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bcrypt
import grpc
import httpx
import pytest
import trustme
from processes import Sidecar, free_port, program, wait_for
from workers import MODEL, layout

from maxact_proto import wire
from maxact_proto.v1 import telemetry_pb2_grpc

TOKEN = "a-token-of-sufficient-length"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def install(folder: Path, authority: trustme.CA) -> tuple[str, ...]:
    """A certificate for the loopback in ``folder``; the options that name it."""
    issued = authority.issue_cert("127.0.0.1", "localhost")
    for name, blob in (("cert.pem", issued.cert_chain_pems[0]), ("key.pem", issued.private_key_pem)):
        blob.write_to_path(str(folder / f"new-{name}"))
        os.replace(folder / f"new-{name}", folder / name)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return ("--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem"))


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
    address: str, credentials: grpc.ChannelCredentials | None, *metadata: tuple[str, str]
) -> tuple[grpc.StatusCode, str]:
    """How a worker that sends its layout and then leaves fares."""
    secure = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    with secure as channel:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
        call = stub.Stream(iter([wire.encode_layout(layout())]), timeout=20, metadata=metadata)
        try:
            list(call)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""


def serial_of(address: str) -> int:
    host, port = address.split(":")
    pem = ssl.get_server_certificate((host, int(port)))
    from cryptography import x509

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
    # Uvicorn's probe of readiness has no certificate: HTTP stays open to tell that the sidecar is up.
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
    tokens.write_text("a-new-token-that-replaces\n")
    assert stream(sidecar.grpc, None, ("authorization", f"Bearer {TOKEN}"))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert TOKEN not in sidecar.log.read_text()


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


def test_the_command_line_logs_in(tmp_path: Path, authority: trustme.CA, start: Callable[..., Sidecar]) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    sidecar = start(*install(tmp_path, authority), "--http-token-file", str(tmp_path / "tokens"))
    url = sidecar.url
    command = [program("maxact"), "card", url, "--output", str(tmp_path / "card.json")]
    login = ["--token-file", str(tmp_path / "tokens"), "--ca", str(tmp_path / "ca.pem")]
    asked = [subprocess.run([*command, *options], capture_output=True, text=True) for options in (login[2:], login)]
    assert [done.stderr for done in asked] == [
        f"error: {url}: log in first\n",
        f"error: {url}: no engine has connected yet\n",
    ]


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


def test_a_stream_that_says_nothing_is_ended(sidecar: Sidecar) -> None:
    def never() -> Iterator[object]:
        time.sleep(30)
        yield

    with grpc.insecure_channel(sidecar.grpc) as channel:
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as raised:
            list(telemetry_pb2_grpc.TelemetryServiceStub(channel).Stream(never(), timeout=25))
        assert raised.value.details() == "layout: did not come within 10 s"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "sent", [b"", b"GET /metrics HT", b"POST /api/v1/cards HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
)
def test_an_http_client_that_keeps_us_waiting_is_cut_off(sidecar: Sidecar, sent: bytes) -> None:
    host, port = sidecar.http.split(":")
    with socket.create_connection((host, int(port)), timeout=40) as slow:
        slow.sendall(sent)
        assert taken(slow) == 0, "an answer to half a request"
    assert httpx.get(f"{sidecar.url}/-/ready").is_success


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
        slow.sendall(b"GET /api/v1/sites HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.recv(16).startswith(b"HTTP/1.1 200")
        time.sleep(20)
        slow.settimeout(20)
        assert taken(slow) < answer


def taken(client: socket.socket) -> int:
    """Bytes that still come until the server has hung up."""
    num_bytes = 0
    with contextlib.suppress(ConnectionResetError):
        while received := client.recv(65536):
            num_bytes += len(received)
    return num_bytes


def test_nothing_of_the_model_is_in_a_refusal(tmp_path: Path, start: Callable[..., Sidecar]) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    sidecar = start("--http-token-file", str(tmp_path / "tokens"))
    sidecar.connect().send(1.0)
    for path in ("/", "/metrics", "/api/v1/models"):
        assert MODEL not in httpx.get(sidecar.url + path).text
