"""`hetis serve`: its command line becomes options of the server and of the fleet."""

import argparse
from pathlib import Path

import pytest

from hetis.cli import serve
from hetis.cli.main import parse
from hetis.server.options import ServerOptions, digest


def options(*arguments: str) -> ServerOptions:
    return serve.server_options(parse(["serve", *arguments]))


def test_the_defaults_are_those_of_the_structure() -> None:
    assert options() == ServerOptions()


def test_every_option_of_the_server_has_an_argument() -> None:
    parsed = vars(parse(["serve"]))
    named = {"served_model_names": "served_model_name", "api_key_digests": "api_key"}
    assert {named.get(name, name) for name in ServerOptions.__struct_fields__} <= parsed.keys()


def test_arguments_become_options(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}")
    (tmp_path / "keys").write_text("second\n")
    found = options(
        *("--host", "::1", "--port", "0", "--root-path", "/llm", "--max-body-bytes", "1MiB"),
        *("--served-model-name", "a", "--served-model-name", "b", "--allowed-origins", "https://x.example"),
        *("--api-key", "first", "--api-key-file", str(tmp_path / "keys")),
        *("--chat-template", str(tmp_path / "chat.jinja"), "--shutdown-timeout", "0", "--max-queued-requests", "0"),
    )
    assert found == ServerOptions(
        host="::1",
        port=0,
        root_path="/llm",
        max_body_bytes=1 << 20,
        served_model_names=("a", "b"),
        allowed_origins=("https://x.example",),
        api_key_digests=(digest("first"), digest("second")),
        chat_template="{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
        shutdown_timeout=0,
        max_queued_requests=0,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--api-key", ""], "--api-key is empty"),
        (["--ssl-keyfile", "key.pem"], "ssl_certfile is missing"),
        (["--allowed-origins", "x"], "allowed_origins has 'x'"),
        (["--root-path", "x"], "root_path is 'x'"),
        (["--chat-template", "missing.jinja"], "--chat-template missing.jinja cannot be read (No such file"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        options(*arguments)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{% for %}", "is no Jinja template (line 1"),
        ("a\n{{ b", "is no Jinja template (line 2"),
        ("  \n", "is empty"),
        ("{{ raise_exception('no') }}", None),
        ("{{ bos_token.x.y }}", None),
        ("{% generation %}{{ messages }}{% endgeneration %}", None),
    ],
)
def test_a_chat_template_is_checked_at_the_start(text: str, problem: str | None, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(text)
    if problem is None:
        assert options("--chat-template", str(file)).chat_template == text
    else:
        with pytest.raises(ValueError) as error:
            options("--chat-template", str(file))
        assert problem in str(error.value)


@pytest.mark.parametrize("is_on_the_command_line", [True, False])
def test_a_key_on_the_command_line_is_a_warning_without_the_key(
    is_on_the_command_line: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    import hetis.server.serving

    served: list[tuple[ServerOptions, dict[str, object]]] = []
    monkeypatch.setattr(hetis.server.serving, "serve", lambda *given: served.append(given) or 7)
    monkeypatch.setattr("sys.argv", ["hetis", "serve", *(["--api-key=secret"] if is_on_the_command_line else [])])
    logging.getLogger("hetis").propagate = True
    parsed: argparse.Namespace = parse(["serve", "--api-key", "secret", "--max-num-seqs", "3"])
    assert serve.run(parsed) == 7
    assert ("process list" in caplog.text) == is_on_the_command_line
    assert "secret" not in caplog.text
    [(_, engine)] = served
    assert engine["max_num_seqs"] == 3
