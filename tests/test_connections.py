"""What a client of servers takes from the environment: certificates and proxies."""

import shutil
import ssl
import sys

import certifi
import httpx
import pytest

from specrag.errors import ServerError
from specrag.models._connections import client


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
