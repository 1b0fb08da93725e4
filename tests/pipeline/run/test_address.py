"""Addresses as people give them, and servers that are no cluster."""

from __future__ import annotations

import pytest

from depthvar.errors import InputError
from pipeline.run import address
from pipeline.run.address import (
    DASHBOARD_VARIABLE,
    ClusterAddress,
    cluster_address,
    dashboard_url,
    require_listener,
    who_answers,
)
from tests.fake_servers import SERVERS, serving


@pytest.mark.parametrize(
    ("flag", "variable", "wanted"),
    [
        (None, None, None),
        (None, "", None),
        (None, "  ", None),
        ("local", "head:1", None),
        (None, "local", None),
        ("head:6379", "other:1", ("--address", "head:6379")),
        (" head:6379\n", None, ("--address", "head:6379")),
        ("[::1]:6379", None, ("--address", "[::1]:6379")),
        (None, "10.0.0.1:6379", ("RAY_ADDRESS", "10.0.0.1:6379")),
        ("auto", None, ("--address", "auto")),
        ("auto", "head:6379", ("RAY_ADDRESS", "head:6379")),
        (None, "auto", ("RAY_ADDRESS", "auto")),
    ],
)
def test_the_cluster_is_the_flags_or_the_variables_or_none(
    flag: str | None, variable: str | None, wanted: tuple[str, str] | None
):
    environ = {} if variable is None else {"RAY_ADDRESS": variable}
    found = cluster_address(flag, environ)
    assert found == (None if wanted is None else ClusterAddress(*wanted))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ray://head:10001", ["Ray Client", "--address head:6379", "http://head:8265"]),
        ("ray://head", ["Ray Client", "--address head:6379"]),
        ("RAY://head:10001", ["Ray Client"]),
        ("http://head:8265", ["`depthvar submit`", "--address head:6379", "http://head:8265"]),
        ("https://u:p@head/x", ["`depthvar submit`", "--address head:6379"]),
        ("http://[::1]:8265", ["--address [::1]:6379"]),
        ("http://[::1", ["--address HOST:6379"]),
        ("tcp://head:6379", ["no address of a Ray cluster", "--address head:6379"]),
        ("head", ["wanted HOST:PORT", "head:6379"]),
        ("head:", ["wanted HOST:PORT"]),
        (":6379", ["wanted HOST:PORT"]),
        ("head:x", ["wanted HOST:PORT"]),
        ("head:0", ["wanted HOST:PORT"]),
        ("head:65536", ["wanted HOST:PORT"]),
        ("head:-1", ["wanted HOST:PORT"]),
        ("::1:6379", ["wanted HOST:PORT", "[::1]:6379"]),
        ("head:6379/", ["wanted HOST:PORT"]),
        ("a:1,b:2", ["wanted HOST:PORT"]),
        ("my head:1", ["wanted HOST:PORT"]),
        ("AUTO", ["wanted HOST:PORT"]),
    ],
)
def test_what_is_no_address_of_a_cluster_is_named_with_the_one_to_use(text: str, parts: list[str]):
    for flag, environ in ((text, {}), (None, {"RAY_ADDRESS": text})):
        with pytest.raises(InputError) as caught:
            cluster_address(flag, environ)
        said = str(caught.value)
        source = "--address" if flag else "RAY_ADDRESS"
        assert said.startswith(f"{source} is {text}, ")
        assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("flag", "variable", "wanted"),
    [
        (None, None, "http://127.0.0.1:8265"),
        (None, "http://head:1/", "http://head:1"),
        ("https://head:8265/", "http://other:1", "https://head:8265"),
    ],
)
def test_a_job_is_handed_in_at_the_flags_dashboard_or_the_variables_or_this_machines(
    flag: str | None, variable: str | None, wanted: str
):
    assert dashboard_url(flag, {} if variable is None else {DASHBOARD_VARIABLE: variable}) == wanted


@pytest.mark.parametrize(
    "text", ["auto", "head:6379", "ray://head:10001", "http://", "http://[::1"]
)
def test_what_is_no_dashboard_is_refused_with_the_one_to_use(text: str):
    with pytest.raises(InputError, match=r"--address is .*, wanted .* http://HEAD:8265"):
        dashboard_url(text, {})


@pytest.mark.parametrize("flag", ["", "  "])
def test_an_empty_address_is_not_taken_for_none(flag: str):
    with pytest.raises(InputError, match="empty --address"):
        cluster_address(flag, {"RAY_ADDRESS": "head:6379"})


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_is_named_by_what_it_says(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(address, "_LISTEN_S", 0.3)
    talk, who = SERVERS[kind]
    with serving(talk) as where:
        require_listener(where)
        assert who in who_answers(where)


@pytest.mark.parametrize("text", ["127.0.0.1:1", "[::1]:1", "no.such.host.invalid:6379"])
def test_nothing_that_answers_is_said(text: str):
    with pytest.raises(InputError, match="nothing answers"):
        require_listener(ClusterAddress("--address", text))
