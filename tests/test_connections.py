"""What a client of servers takes from the environment: certificates and proxies."""

import datetime
import ipaddress
import shutil
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import certifi
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from specrag.errors import ServerError
from specrag.models import GenerationRequest, OpenAILM, Stage, Turn
from specrag.models._connections import client

ASK = GenerationRequest((Turn.of("user", "hi"),), (Stage("Answer:", 4),))


class QuietHandler(BaseHTTPRequestHandler):
    """Has no methods: every request gets status 501."""

    def log_message(self, *args):
        pass


@pytest.fixture
def certificates(monkeypatch):
    """The SSL context that a new client is given."""
    monkeypatch.setattr(httpx, "AsyncClient", lambda **options: options["verify"])
    return lambda: client({})


def test_certificates_are_checked_and_read_once_until_the_environment_names_others(certificates, tmp_path, monkeypatch):
    first = certificates()
    assert first.verify_mode == ssl.CERT_REQUIRED and first.check_hostname and first.get_ca_certs()
    assert certificates() is first
    other = tmp_path / "others.pem"
    shutil.copy(certifi.where(), other)
    monkeypatch.setenv("SSL_CERT_FILE", str(other))
    assert certificates() is not first and certificates() is certificates()


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_cannot_be_read_are_named(certificates, tmp_path, monkeypatch, content):
    file = tmp_path / "trusted.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(ServerError, match=rf"SSL_CERT_FILE={file} \(.*\): give a file of PEM certificates"):
        certificates()


@pytest.mark.parametrize(
    ("proxy", "advice"),
    [
        ("socks5://someone:word@127.0.0.1:9", r"pip install 'httpx\[socks\]'"),
        ("ftp://someone:word@127.0.0.1:9", "give it as http://HOST:PORT"),
        ("http://someone:word@127.0.0.1:no", "give it as http://HOST:PORT"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_clear_error(monkeypatch, proxy, advice):
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ServerError, match=rf"the proxy of HTTPS_PROXY, .* cannot be used .*: {advice}") as error:
        client({})
    assert "word" not in str(error.value)


@pytest.fixture
def own_certificate(tmp_path):
    """A file with a certificate of 127.0.0.1 that no authority signed, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file = tmp_path / "own.pem"
    file.write_bytes(
        made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(serialization.Encoding.PEM, *plain)
    )
    return file


def test_a_certificate_that_is_not_trusted_is_the_cause_that_is_named(own_certificate, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), QuietHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own_certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}/v1"
    try:
        with pytest.raises(ServerError, match="name a file with the certificate of its authority in SSL_CERT_FILE"):
            OpenAILM("m", url, retries=0).generate([ASK])
        monkeypatch.setenv("SSL_CERT_FILE", str(own_certificate))
        with pytest.raises(ServerError, match="501"):  # it is asked, and has no such method
            OpenAILM("m", url, retries=0).generate([ASK])
    finally:
        server.shutdown()
        server.server_close()
