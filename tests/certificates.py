"""Certificates that tests make for themselves."""

from __future__ import annotations

import os
from pathlib import Path

import trustme


def install(folder: Path, authority: trustme.CA, *names: str) -> tuple[str, ...]:
    """``cert.pem``, ``key.pem`` and ``ca.pem`` in ``folder``, for the loopback or ``names``; the sidecar's options."""
    issue(folder, authority, "", *(names or ("127.0.0.1", "localhost")))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return ("--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem"))


def issue(folder: Path, authority: trustme.CA, prefix: str, *names: str) -> tuple[Path, Path]:
    """Certificate and key of ``names``, each file replaced at once as a renewal would."""
    issued = authority.issue_cert(*names)
    for name, blob in (("cert.pem", issued.cert_chain_pems[0]), ("key.pem", issued.private_key_pem)):
        blob.write_to_path(str(folder / f"new-{prefix}{name}"))
        os.replace(folder / f"new-{prefix}{name}", folder / f"{prefix}{name}")
    return folder / f"{prefix}cert.pem", folder / f"{prefix}key.pem"
