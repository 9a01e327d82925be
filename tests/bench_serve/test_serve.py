"""`hetis bench serve` and `hetis bench plot` against a stand-in server."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hetis
from hetis.cli.bench_serve import PLOT_EXAMPLES, SERVE_EXAMPLES
from hetis.cli.bench_serve_options import settings_of
from hetis.cli.main import parse
from tests.bench_serve.stand_in_server import StandIn, serving

# the keys of vLLM's benchmark for a run at a rate, with --percentile-metrics ttft,tpot,itl,e2el and --save-detailed
VLLM_KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"),
    *("request_rate", "burstiness", "max_concurrency"),
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times"),
    *("generated_texts", "errors", "max_output_tokens_per_s", "max_concurrent_requests"),
    *(
        f"{figure}_{name}_ms"
        for name in ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
        for figure in ("mean", "median", "std", "p99")
    ),
}
OURS = {
    *("dataset_name", "prompts", "output_tokens_from", "empty_first_chunks", "failures"),
    *("max_event_loop_delay_ms", "p99_event_loop_delay_ms"),
}
DETAILS = {"input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times"}
DETAILS |= {"generated_texts", "errors"}

[TOKENIZER] = (path.parent for path in (Path(hetis.__file__).parent / "assets").rglob("tokenizer.json"))


@pytest.fixture
def server() -> Iterator[StandIn]:
    stand_in = StandIn()
    with serving(stand_in):
        yield stand_in


def run(server: StandIn, *arguments: str) -> int:
    """The exit code of a small benchmark of `server`."""
    small = ("--num-prompts", "6", "--input-len", "12", "--output-len", "4", "--no-progress")
    options = parse(["bench", "serve", "--base-url", server.address, *small, *arguments])
    return int(options.run(options) or 0)


def measured(server: StandIn, path: str = "/v1/completions") -> list[Any]:
    """Bodies of the measured requests that came to `path`."""
    return [body for where, _, body in server.seen if where == path and body.get("stream") and first_of(body) != 1]


def first_of(body: Any) -> Any:
    return body.get("max_tokens") or body.get("max_completion_tokens")


def test_the_result_has_vllms_keys(server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "out.json"
    options = ["--save-result", "--save-detailed", "--result-dir", str(file.parent), "--result-filename", file.name]
    assert run(server, *options, "--metadata", "card=A100", "note=x=y") == 0
    out, err = capsys.readouterr()
    saved, shown = json.loads(file.read_text()), json.loads(out)
    assert saved.keys() == VLLM_KEYS | OURS | {"card", "note"}
    assert {**shown} == {key: value for key, value in saved.items() if key not in DETAILS}
    assert (saved["completed"], saved["failed"], saved["failures"]) == (6, 0, {})
    assert (saved["total_input_tokens"], saved["total_output_tokens"]) == (72, 24)
    assert (saved["request_rate"], saved["model_id"], saved["card"], saved["note"]) == (
        "inf",
        "stand-in",
        "A100",
        "x=y",
    )
    assert [len(saved[key]) for key in sorted(DETAILS)] == [6] * len(DETAILS)
    assert saved["itls"][0] == [*map(float, saved["itls"][0])]
    assert (len(saved["itls"][0]), saved["generated_texts"][0]) == (3, " a a a a")
    assert saved["output_tokens_from"] == "usage"
    assert "requests completed" in err
    assert "results are in" in err


def test_requests_ask_for_what_was_given(server: StandIn) -> None:
    extra = ["--extra-body", '{"temperature": 0, "min_p": 0.5}', "--header", "X-Team=a b", "X-Other=c=d"]
    assert run(server, *extra, "--api-key", "secret") == 0
    bodies = measured(server)
    assert len(bodies) == 6
    for body in bodies:
        assert len(body.pop("prompt")) == 12
        assert body == {
            **{"model": "stand-in", "max_tokens": 4, "ignore_eos": True, "temperature": 0, "min_p": 0.5},
            **{"stream": True, "stream_options": {"include_usage": True}},
        }
    headers = server.seen[-1][1]
    assert (headers["x-team"], headers["x-other"], headers["authorization"]) == ("a b", "c=d", "Bearer secret")
    assert len({headers["x-request-id"] for _, headers, _ in server.seen if "x-request-id" in headers}) == 7


def test_the_seed_decides_the_prompts_and_runs_differ(server: StandIn) -> None:
    def prompts(*arguments: str) -> list[Any]:
        server.seen.clear()
        assert run(server, "--max-concurrency", "1", *arguments) == 0
        return [body["prompt"] for body in measured(server)]

    first = prompts()
    assert first == prompts()
    assert first != prompts("--seed", "1")
    both = prompts("--request-rate", "inf,inf")
    assert both[:6] == first
    assert len({*map(tuple, both)}) == 12


def test_several_rates_give_a_table_and_a_line_each(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(server, "--request-rate", "500,1000,inf", "--append-result", "--result-dir", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    results = json.loads(out)
    assert [result["request_rate"] for result in results] == [500.0, 1000.0, "inf"]
    [path] = tmp_path.iterdir()
    assert path.name.startswith("openai-500_1000_infqps-stand-in-")
    assert [json.loads(line)["request_rate"] for line in path.read_text().splitlines()] == [500.0, 1000.0, "inf"]
    table = [line.split() for line in err.splitlines()]
    assert [words[0] for words in table if words[1:3] == ["6", "0"]] == ["500", "1000", "inf"]


def test_chats_send_messages(server: StandIn) -> None:
    assert run(server, "--backend", "openai-chat") == 0
    [*bodies] = measured(server, "/v1/chat/completions")
    assert len(bodies) == 6
    assert {body["messages"][0]["role"] for body in bodies} == {"user"}
    assert {(body["max_completion_tokens"], "max_tokens" in body) for body in bodies} == {(4, False)}


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, "token ids up to 10000"),
        ({"vocab_size": 40_000}, "token ids up to 30000"),
        ({"takes_token_ids": False}, "by the server's /tokenize"),
        ({"takes_token_ids": False, "is_llama_cpp": True}, "by the server's /tokenize"),
    ],
)
def test_prompts_are_made_as_the_server_allows(
    server: StandIn, changes: dict[str, Any], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    vars(server).update(changes)
    assert run(server) == 0
    found = json.loads(capsys.readouterr().out)
    assert how in found["prompts"]
    assert found["total_input_tokens"] == 72


def test_the_models_root_has_the_tokenizer(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.root = str(TOKENIZER)
    assert run(server) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["tokenizer_id"]) == (f"text by the tokenizer {server.root}", server.root)
    assert {type(body["prompt"]) for body in measured(server)} == {str}


def test_a_server_without_any_way_to_make_prompts_needs_a_tokenizer(server: StandIn) -> None:
    server.takes_token_ids = server.has_tokenizer = False
    with pytest.raises(ValueError, match="give --tokenizer DIR"):
        run(server)


def test_shared_prefixes(server: StandIn) -> None:
    assert run(server, "--dataset-name", "shared-prefix", "--prefix-len", "30", "--num-prefixes", "2") == 0
    prompts = [body["prompt"] for body in measured(server)]
    assert {len(prompt) for prompt in prompts} == {42}
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 2
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 6


def test_a_trace_is_replayed_at_its_times(server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n10,30,3\n12,5000,5\n18,50,7\n14,40,1\n")
    out = tmp_path / "out.json"
    server.max_model_len = 1000
    arguments = ["--dataset-name", "trace", "--dataset-path", str(trace), "--trace-speed", "100"]
    saving = ["--save-detailed", "--result-dir", str(tmp_path), "--result-filename", out.name]
    assert run(server, *arguments, "--trace-scale", "2", *saving) == 0
    found = json.loads(out.read_text())
    assert (found["input_lens"], found["output_lens"]) == ([60, 80, 100], [6, 2, 14])
    due = [start - queue for start, queue in zip(found["start_times"], found["queue_times"], strict=True)]
    assert due == pytest.approx([0.0, 0.04, 0.08])
    assert min(found["queue_times"]) >= 0
    assert "1 request of the trace left out: longer than the server's 1000 tokens" in capsys.readouterr().err
    assert run(server, *arguments, "--request-rate", "inf") == 0
    server.max_model_len = 10
    with pytest.raises(ValueError, match="no request of the trace fits the server's 10 tokens; lower --trace-scale"):
        run(server, *arguments)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ({"kind": "status", "code": 503}, "HTTP 503", "as asked"),
        ({"kind": "disconnect", "after": 2}, "connection closed early", "the server closed the connection after"),
        ({"kind": "unframed", "after": 2}, "connection closed early", "without [DONE]"),
        ({"kind": "error", "after": 2}, "error in the stream", "the engine died"),
        ({"kind": "garbage", "after": 1}, "malformed response", "{not json"),
        ({"kind": "not-http"}, "malformed response", "is not HTTP/1.1"),
        ({"kind": "empty"}, "no output", "without a chunk"),
        ({"kind": "silent"}, "timed out", "within 0.2 s"),
    ],
)
def test_failures_are_counted_with_their_first_message(
    server: StandIn, fault: dict[str, Any], kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.dumps({"fault": {**fault, "every": 2}})  # the first request is the check
    limit = ["--request-timeout", "0.2"] if kind == "timed out" else []
    assert run(server, "--extra-body", body, "--max-concurrency", "1", *limit) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["completed"], found["failed"]) == (3, 3)
    assert [*found["failures"]] == [kind]
    assert found["failures"][kind]["count"] == 3
    assert message in found["failures"][kind]["first"]
    assert f"hetis: 3 requests failed: {kind}: " in err


def test_a_server_without_usage_counts_chunks(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--extra-body", '{"fault": {"kind": "no-usage"}}') == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["output_tokens_from"], found["total_output_tokens"], found["total_input_tokens"]) == (
        "chunks",
        24,
        72,
    )
    assert "sends no usage" in err


def test_a_stream_that_begins_without_text_is_noticed(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--backend", "openai-chat", "--extra-body", '{"fault": {"kind": "role"}}') == 0
    assert "began with a chunk without text" in capsys.readouterr().err


def test_concurrency_is_limited_and_the_wait_is_reported(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.itl = 0.002
    assert run(server, "--max-concurrency", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert server.most_running == 2
    assert found["max_concurrent_requests"] <= 2
    assert found["mean_client_queue_time_ms"] > 0
    total = found["mean_e2el_ms"] + found["mean_client_queue_time_ms"]
    assert found["mean_e2el_including_client_queue_ms"] == pytest.approx(total)


def test_a_duration_ends_sending(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.itl = 0.005
    arguments = ["--max-concurrency", "1", "--duration", "0.1", "--num-prompts", "1000"]
    assert run(server, *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["completed"] == found["num_prompts"] == len(measured(server)) < 1000


def test_warm_ups_come_first_and_have_prompts_of_their_own(server: StandIn) -> None:
    assert run(server, "--num-warmups", "3") == 0
    prompts = [tuple(body["prompt"]) for body in measured(server)]
    assert len(prompts) == len({*prompts}) == 9


def test_goodput(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--goodput", "ttft:60000", "e2el:60000") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["request_goodput"] == found["request_throughput"]
    assert run(server, "--goodput", "e2el:0.000001") == 0
    assert json.loads(capsys.readouterr().out)["request_goodput"] == 0


def test_chosen_metrics_and_percentiles(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--percentile-metrics", "ttft", "--metric-percentiles", "50,99.9") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"p50_ttft_ms", "p99.9_ttft_ms", "p50_client_queue_time_ms"} < found.keys()
    assert not {"p99_ttft_ms", "mean_tpot_ms"} & found.keys()


def test_a_model_that_is_not_listed_may_still_be_accepted(server: StandIn) -> None:
    server.unlisted = True
    assert run(server, "--model", "stand-in") == 0


def test_a_server_that_starts_later_is_waited_for(server: StandIn) -> None:
    server.unready = 1
    assert run(server) == 0


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"unready": 99}, ["--ready-check-timeout-sec", "0"], r"not ready after 0 s \(HTTP 503\)"),
        ({"key": "right"}, ["--api-key", "wrong"], "refuses /v1/models with 401: give its key"),
        ({}, ["--model", "other", "--tokenizer", str(TOKENIZER)], "the first request failed .*no model 'other'"),
        ({"unlisted": True}, [], "/v1/models answers with 404 and names no model; check the address, or give --model"),
        ({}, ["--input-len", "4096"], r"requests of up to 4100 tokens .* limit of 4096"),
        ({}, ["--extra-body", '{"model": "x"}'], r"the first request failed \(HTTP 404: no model 'x'\)"),
    ],
)
def test_wrong_options_are_one_sentence(
    server: StandIn, changes: dict[str, Any], arguments: list[str], message: str
) -> None:
    vars(server).update(changes)
    with pytest.raises(ValueError, match=message):
        run(server, *arguments)
    assert not measured(server)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    options = parse(["bench", "serve", "--port", port, "--ready-check-timeout-sec", "0"])
    with pytest.raises(ValueError, match=rf"not ready after 0 s \(connection failed: 127.0.0.1 port {port}: "):
        options.run(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--request-rate 1,0", "--request-rate is '0': it must be a number above 0 or inf"),
        ("--burstiness 0", "--burstiness is 0.0: it must be above 0"),
        ("--range-ratio 1", "--range-ratio is 1.0: it must be from 0"),
        ("--duration inf", "--duration is inf: it must be a number above 0"),
        ("--goodput itl:5", "--goodput is 'itl:5': write METRIC:MS with one of ttft, tpot, e2el"),
        ("--goodput ttft:x", "--goodput is 'x': it must be a number above 0"),
        ("--percentile-metrics ttft,speed", "--percentile-metrics is 'ttft,speed': it must be some of ttft"),
        ("--metric-percentiles 50,101", "--metric-percentiles is '50,101': it must be numbers from 0 to 100"),
        ("--extra-body [1]", "--extra-body is '\\[1\\]': it must be a JSON object"),
        ("--metadata a", "--metadata is 'a': write KEY=VALUE"),
        ("--dataset-name sharegpt", "--dataset-name is 'sharegpt'.* one of random, shared-prefix, trace"),
    ],
)
def test_values_of_options_are_checked(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["bench", "serve", *arguments.split()])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset-name trace", "belong together; give both or none"),
        ("--dataset-path x.csv", "belong together; give both or none"),
        ("--ramp-up-strategy linear", "belong together; give all three or none"),
        ("--ramp-up-strategy linear --ramp-up-start-rps 2 --ramp-up-end-rps 1", "above --ramp-up-end-rps 1"),
        (
            "--ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 2 --request-rate 1",
            "exclude each other",
        ),
        ("--plot x.txt", "--plot x.txt must end in .png, .pdf or .svg"),
        ("--plot /nowhere/x.png", "--plot /nowhere/x.png cannot be written"),
        ("--save-result --result-dir /proc/x", "--result-dir /proc/x cannot be written"),
        ("--base-url nonsense://x", "is not an address"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(arguments: str, message: str) -> None:
    options = parse(["bench", "serve", *arguments.split()])
    with pytest.raises(ValueError, match=message):
        options.run(options)


@pytest.mark.parametrize("line", [*SERVE_EXAMPLES.splitlines()[1:], *PLOT_EXAMPLES.splitlines()[1:]])
def test_examples_of_the_help_can_be_parsed(line: str) -> None:
    options = parse(line.split()[1:])
    if options.kind == "serve":
        settings_of(options)


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ("", "http://127.0.0.1:8000"),
        ("--host ::1 --port 81", "http://[::1]:81"),
        ("--base-url https://x/v1 --port 81", "https://x/v1"),
    ],
)
def test_addresses(arguments: str, address: str) -> None:
    assert settings_of(parse(["bench", "serve", *arguments.split()])).base_url == address


def test_the_key_comes_from_the_environment_or_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a")
    assert settings_of(parse(["bench", "serve"])).headers == {"authorization": "Bearer a"}
    assert settings_of(parse(["bench", "serve", "--api-key", "b"])).headers == {"authorization": "Bearer b"}


def test_a_duration_and_a_rate_make_the_number_of_requests(server: StandIn) -> None:
    options = parse(["bench", "serve", "--base-url", server.address, "--request-rate", "100", "--duration", "0.1"])
    options.run(options)
    assert len(measured(server)) == 10


def test_a_ramp_is_recorded(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    ramp = ["--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "200", "--ramp-up-end-rps", "800"]
    assert run(server, *ramp) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[f"ramp_up_{key}"] for key in ("strategy", "start_rps", "end_rps")] == ["exponential", 200.0, 800.0]


# --- plots ------------------------------------------------------------------------------------------------------------

PNG = b"\x89PNG"


def test_rates_are_drawn_and_files_compared(server: StandIn, tmp_path: Path) -> None:
    first, second = tmp_path / "first.png", tmp_path / "both.png"
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        saving = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", file.name]
        assert run(server, "--request-rate", "500,inf", *saving, "--plot", str(first)) == 0
    assert first.read_bytes().startswith(PNG)
    options = parse(["bench", "plot", *map(str, files), "--output", str(second)])
    options.run(options)
    assert second.read_bytes().startswith(PNG)


def test_curves_are_percentiles_in_order_of_the_rate() -> None:
    from hetis.bench_serve.plot import curves

    results = [
        {"request_rate": 4.0, "median_ttft_ms": 8.0, "p99_ttft_ms": 9.0, "mean_ttft_ms": 1.0},
        {"request_rate": "inf", "request_throughput": 5.5, "median_ttft_ms": 20.0, "p99_ttft_ms": 30.0},
        {"request_rate": 1.0, "median_ttft_ms": 2.0, "p99_ttft_ms": 3.0, "p99_tpot_ms": 7.0},
    ]
    assert curves(results, "ttft") == {
        "median": [(1.0, 2.0), (4.0, 8.0), (5.5, 20.0)],
        "p99": [(1.0, 3.0), (4.0, 9.0), (5.5, 30.0)],
    }
    assert curves(results, "tpot") == {"p99": [(1.0, 7.0)]}


def test_files_of_vllm_and_lists_can_be_read(tmp_path: Path) -> None:
    from hetis.bench_serve.report import read_results

    path, one = tmp_path / "x.json", {"request_rate": 1.0}
    for text in ('{"request_rate": 1.0}', '\n{"request_rate": 1.0}\n{"request_rate": 1.0}', '[{"request_rate": 1.0}]'):
        path.write_text(text)
        assert read_results(path) == [one] * text.count("rate")
    for text in ("", "{}", "[1]", "{", '{"request_rate": 1.0} x'):
        path.write_text(text)
        with pytest.raises(ValueError, match="has no results of a benchmark"):
            read_results(path)


def test_a_missing_matplotlib_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from hetis.bench_serve import plot

    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--plot needs matplotlib: pip install 'hetis\[bench\]'"):
        plot.check_plot(Path("x.png"), "--plot")
