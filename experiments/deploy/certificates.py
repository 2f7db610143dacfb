"""Certificates of the server, keys of the nodes, and one clear sentence where one of them does not do."""

from __future__ import annotations

import datetime
import ipaddress
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flowerbed.errors import ConfigError

CURVE = ec.SECP384R1
"""What Flower's nodes sign with."""
CA_DAYS = 3650
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names under which the server's own processes reach it."""
SKEW = datetime.timedelta(hours=1)
"""A certificate is valid from this long before it was made, so that clocks need not agree to the minute."""


def make_authority(folder: Path, name: str) -> None:
    """Write ``ca.crt`` and ``ca.key`` of a new certificate authority that signs for servers only."""
    key = ec.generate_private_key(CURVE())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"flowerbed {name} CA")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_private(folder / "ca.key", _private_pem(key))
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def make_server(folder: Path, names: Sequence[str], days: int) -> None:
    """Write ``server.crt`` and ``server.key``, signed by the authority in ``folder``, for host names and addresses."""
    authority = read_certificate(folder / "ca.crt")
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(CURVE())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    alternatives = [_general_name(name) for name in dict.fromkeys((*names, *LOCAL))]
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        .sign(signer, hashes.SHA384())
    )
    write_private(folder / "server.key", _private_pem(key))
    (folder / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def make_node_key(path: Path) -> None:
    """Write a node's private key to ``path`` and its public half, which is what gets registered, to ``path.pub``."""
    key = ec.generate_private_key(CURVE())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_private(path, private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public + b"\n")


def read_public_key(path: Path) -> bytes:
    """Return a node's public key as Flower stores it; raises ``ConfigError`` for a file that holds no such key."""
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no public key of a node ({error}); give the .pub file that deploy init made, or one of "
            "ssh-keygen -t ecdsa -b 384."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path} is a public key of another kind; nodes use ssh-keygen -t ecdsa -b 384.")
    encoded: bytes = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded


def check_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return a node's private key; raises ``ConfigError`` if it is missing, no key, or readable by others."""
    require_private(path, "node's key")
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"The node's key {path} cannot be read ({error}); copy it again from the operator's folder."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"The node's key {path} is of another kind; nodes use ssh-keygen -t ecdsa -b 384.")
    return key


def check_server(folder: Path, now: datetime.datetime | None = None) -> None:
    """Raise ``ConfigError`` unless server certificate, key and authority fit together and are valid now."""
    now = now or datetime.datetime.now(datetime.UTC)
    require_private(folder / "server.key", "server's key")
    authority, certificate = read_certificate(folder / "ca.crt"), read_certificate(folder / "server.crt")
    renew = "make a new one with: flowerbed deploy renew DIR"
    for what, found in (("server's certificate", certificate), ("certificate authority", authority)):
        if now > found.not_valid_after_utc:
            raise ConfigError(f"The {what} expired on {found.not_valid_after_utc:%Y-%m-%d}; {renew}.")
        if now < found.not_valid_before_utc:
            raise ConfigError(
                f"The {what} is valid from {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC and this machine's clock "
                f"says {now:%Y-%m-%d %H:%M}; set the clock."
            )
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ConfigError(
            f"{folder / 'server.crt'} was not signed by {folder / 'ca.crt'}, so no node will trust it; {renew}."
        ) from error
    try:
        key = serialization.load_pem_private_key((folder / "server.key").read_bytes(), password=None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{folder / 'server.key'} cannot be read ({error}); {renew}.") from error
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{folder / 'server.key'} is not the key of {folder / 'server.crt'}; {renew}.")


def read_certificate(path: Path) -> x509.Certificate:
    """Return the certificate in a PEM file; raises ``ConfigError`` if there is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"The certificate {path} cannot be read: {error}.") from error


def require_private(path: Path, what: str) -> None:
    """Raise ``ConfigError`` unless the file exists and nobody but its owner may read it."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"The {what} {path} cannot be read: {error.strerror}.") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"The {what} {path} may be read by others (mode {stat.S_IMODE(mode):o}); run: chmod 600 {path}"
        )


def write_private(path: Path, data: bytes) -> None:
    """Write a new file that only its owner may read, from its first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
