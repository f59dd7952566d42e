"""What `rlhf-ray submit` says of an address, a header or a token that can't be. No cluster."""

import pytest

from rlhf_ray.actors.dashboard import connect
from rlhf_ray.errors import UserError


@pytest.mark.parametrize("address", ["http://h:99999", "http://h:port", "http://[::1", "ftp://h", "http://:8265", "ray://h:10001"])
def test_what_is_no_address(address):
    with pytest.raises(UserError, match="is not a dashboard address; give http://HEAD:8265"):
        connect(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", f"http://{'a' * 64}.example:8265"])
def test_where_nobody_answers(address):
    with pytest.raises(UserError, match=f"no Ray dashboard answers at {address} "):
        connect(address)


@pytest.fixture
def somebody():
    """A port that takes connections."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("headers", ["{", "3", "[1, 2]", '"a"'])
def test_headers_of_the_environment(somebody, monkeypatch, headers):
    monkeypatch.setenv("RAY_JOB_HEADERS", headers)
    with pytest.raises(UserError, match="RAY_JOB_HEADERS is .*, which is no JSON object; correct or unset it"):
        connect(somebody)


def test_a_token_that_is_no_text(somebody, monkeypatch, tmp_path):
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(UserError, match="Ray's token can't be read from .*token .*; mend that, or set RAY_AUTH_TOKEN"):
        connect(somebody)
