"""`--config`: a file's keys are the options of the command, with the same checks; the command line has precedence."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from hetis.cli.main import parse
from hetis.core.config import EngineConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.yaml"


def options(file: Path, content: str, *arguments: str, command: str = "serve") -> argparse.Namespace:
    file.write_text(content)
    return parse([*command.split(), "--config", str(file), *arguments])


def test_keys_are_the_options_of_the_command(file: Path) -> None:
    content = """
        model: ./model
        port: 8123
        max_num_seqs: 16          # underscores are dashes
        kv-cache-memory: {0: 1GiB, 1: 2GiB}
        theta: 0.25
        enforce-eager: true
        oversubscribe: false
        no-progress: true
        served-model-name: [first, second]
        api-key: secret
        log-format: json
    """
    found = options(file, content)
    expected: dict[str, Any] = {
        "model": "./model",
        "port": 8123,
        "max_num_seqs": 16,
        "kv_cache_memory": {0: 1 << 30, 1: 2 << 30},
        "theta": 0.25,
        "enforce_eager": True,
        "oversubscribe": False,
        "progress": False,
        "served_model_name": ["first", "second"],
        "api_key": ["secret"],
        "log_format": "json",
    }
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("given", [["--port", "9"], ["--port=9"], ["--por", "9"], ["--po=9"]])
def test_the_command_line_has_precedence(file: Path, given: list[str]) -> None:
    content = "port: 1\nserved-model-name: [a, b]\nmodel: x\n"
    found = options(file, content, *given, "--served-model-name", "c", "y")
    assert (found.port, found.served_model_name, found.model) == (9, ["c"], "y")


def test_an_empty_file_changes_nothing(file: Path) -> None:
    found = vars(options(file, "# nothing\n"))
    plain = vars(parse(["serve"]))
    assert {name for name in found if found[name] != plain[name]} == {"config"}


@pytest.mark.parametrize("command", ["generate", "bench throughput", "bench latency", "profile"])
def test_every_command_takes_a_file(file: Path, command: str) -> None:
    found = options(file, "max-num-seqs: 3\ndtype: float32\n", command=command)
    assert (found.max_num_seqs, found.dtype) == (3, "float32")
    assert found.block_size == EngineConfig().block_size


def test_a_switch_with_two_forms(file: Path) -> None:
    assert options(file, "echo: true\n", command="generate").echo is True
    assert options(file, "echo: false\n", command="generate").echo is False
    assert options(file, "echo: false\n", "--echo", command="generate").echo is True


@pytest.mark.parametrize(
    ("content", "code", "sentence"),
    [
        ("max-num-seq: 3", 1, "unknown key max-num-seq (did you mean max-num-seqs?); the keys are the options"),
        ("config: other.yaml", 1, "unknown key config"),
        ("help: true", 1, "unknown key help"),
        ("port: [1, 2]", 1, "port is a list; give one value."),
        ("port:", 1, "port is None; write the value as on the command line."),
        ("port: true", 1, "port is True; write"),
        ("enforce-eager: 1", 1, "enforce-eager is 1; it must be true or false."),
        ("revision: 1.10", 1, "revision is the number 1.1, but must be text; write it in quotes."),
        ("api-key: 0123", 1, "api-key is the number 83, but must be text"),
        ("api-key: [0123]", 1, "api-key is the number 83, but must be text"),
        ("- port", 1, "holds no options; write lines like"),
        ("port", 1, "holds no options"),
        ("1: 2", 1, "holds no options"),
        ("port: 8000\nhost: [", 1, "is not YAML (line "),
        ("!!python/object/apply:os.system ['true']", 1, "is not YAML"),
        ("port: 70000", 2, "--port is 70000: it must be from 0"),
        ("max-num-seqs: 0", 2, "--max-num-seqs is 0: it must be at least 1."),
        ("dtype: float8", 2, "--dtype is 'float8' (did you mean float32?)"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(
    file: Path, content: str, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        options(file, content)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (code, "", 1), err
    assert err.startswith("hetis: --")
    assert sentence in err


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, reason in (("missing", "No such file"), ("binary", "it is not UTF-8"), (".", "Is a directory")):
        with pytest.raises(SystemExit):
            parse(["serve", f"--config={tmp_path / name}"])
        assert f"--config {tmp_path / name} cannot be read ({reason}" in capsys.readouterr().err


def test_the_example_of_the_documentation_is_accepted() -> None:
    for file in (Path(__file__).parent.parent.parent / "docs" / "deploy").glob("*.yaml"):
        if "apiVersion" not in file.read_text():  # else it is Kubernetes'
            parse(["serve", "--config", str(file)])
