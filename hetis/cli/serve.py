"""`hetis serve`: an HTTP server with OpenAI's interface."""

import argparse
import logging
import sys
from pathlib import Path
from typing import get_args, get_type_hints

from hetis.cli.arguments import Group, add_engine_arguments, engine_arguments
from hetis.cli.numbers import field_of, size_of
from hetis.server.options import KEY_VARIABLE, ServerOptions, key_digests

EXAMPLES = """examples:
  hetis serve                                          the small model in the package, on http://127.0.0.1:8000
  hetis serve Qwen/Qwen3-0.6B --plan 1+2 --served-model-name qwen --api-key-file keys.txt --host 0.0.0.0
  hetis serve ./model --config server.yaml --port 8001
"""
_DEFAULT = ServerOptions()

_log = logging.getLogger("hetis")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `hetis serve`."""
    _add_address(parser.add_argument_group("address"))
    _add_model(parser.add_argument_group("names and defaults"))
    _add_access(parser.add_argument_group("access"))
    _add_operation(parser.add_argument_group("limits and operation"))
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def _choices(field: str) -> tuple[str, ...]:
    return get_args(get_type_hints(ServerOptions)[field])


def _add_address(group: Group) -> None:
    add = group.add_argument
    host = "address to listen on; 0.0.0.0: all of this machine, so that others reach it"
    add("--host", default=_DEFAULT.host, metavar="ADDRESS", help=host)
    port = "port to listen on; 0: any that is free"
    add("--port", type=field_of(ServerOptions, "port", int), metavar="N", default=_DEFAULT.port, help=port)
    add("--uds", metavar="PATH", help="listen on a unix socket, not on a port")
    prefix = "path under which a proxy serves this server, like /llm"
    add("--root-path", metavar="PREFIX", help=prefix)


def _add_model(group: Group) -> None:
    add = group.add_argument
    name = "name by which clients ask for the model; may be repeated, the first one is shown; default: MODEL"
    add("--served-model-name", action="append", metavar="NAME", help=name)
    template = "Jinja file with the chat template; default: that of the tokenizer"
    add("--chat-template", type=Path, metavar="FILE", help=template)
    defaults = "auto: sampling defaults of the model's generation_config.json; vllm: of OpenAI's API"
    add("--generation-config", default=_DEFAULT.generation_config, choices=_choices("generation_config"), help=defaults)


def _add_access(group: Group) -> None:
    add = group.add_argument
    key = (
        f"API key that clients must send; may be repeated; the process list shows it: better a file, or {KEY_VARIABLE}"
    )
    add("--api-key", action="append", metavar="KEY", help=key)
    add("--api-key-file", type=Path, metavar="FILE", help="file with one API key per line; # begins a comment")
    origins = "web page, like https://chat.example.org, that may use this server (CORS); may be repeated; *: all"
    add("--allowed-origins", action="append", metavar="ORIGIN", help=origins)
    add("--ssl-certfile", metavar="FILE", help="certificate (PEM) of this server: serve HTTPS")
    add("--ssl-keyfile", metavar="FILE", help="key (PEM) of the certificate; default: in the same file")
    add("--ssl-ca-certs", metavar="FILE", help="certificates (PEM) of those that issue certificates of clients")
    required = "certificates of clients: 0: none, 1: checked if there is one, 2: required"
    add("--ssl-cert-reqs", type=int, default=_DEFAULT.ssl_cert_reqs, choices=(0, 1, 2), help=required)


def _add_operation(group: Group) -> None:
    add = group.add_argument
    queued = "most sequences that wait; more are refused with 503; default: 4 x --max-num-seqs"
    add("--max-queued-requests", type=field_of(ServerOptions, "max_queued_requests", int), metavar="N", help=queued)
    body = "largest body of a request"
    size = f"{_DEFAULT.max_body_bytes >> 20}MiB"
    add("--max-body-bytes", type=size_of(ServerOptions, "max_body_bytes"), metavar="SIZE", default=size, help=body)
    seconds = field_of(ServerOptions, "shutdown_timeout", float)
    end = "seconds that running requests have to finish after SIGTERM or Ctrl-C; 0: abort them at once"
    add("--shutdown-timeout", type=seconds, metavar="SECONDS", default=_DEFAULT.shutdown_timeout, help=end)
    seconds = field_of(ServerOptions, "health_timeout", float)
    health = "seconds without progress of running requests, or without a rank, after which /health is 503"
    add("--health-timeout", type=seconds, metavar="SECONDS", default=_DEFAULT.health_timeout, help=health)
    prefix = "prefix of the names of metrics; vllm: dashboards and tools for vLLM work unchanged"
    add("--metrics-prefix", default=_DEFAULT.metrics_prefix, metavar="PREFIX", help=prefix)
    traces = "send OpenTelemetry spans to this collector (OTLP over HTTP), like http://localhost:4318"
    add("--otlp-traces-endpoint", metavar="URL", help=traces)
    lines = "lines of the log on stderr: text, or JSON objects"
    add("--log-format", default=_DEFAULT.log_format, choices=_choices("log_format"), help=lines)


def server_options(options: argparse.Namespace) -> ServerOptions:
    """The server's options from parsed ones. Raises ValueError for values and files that cannot be used."""
    template = None
    if options.chat_template is not None:
        from hetis.frontend.template_file import read_template

        template = read_template(options.chat_template, "--chat-template")
    special = ("root_path", "served_model_names", "allowed_origins", "chat_template", "api_key_digests")
    plain = [name for name in ServerOptions.__struct_fields__ if name in options and name not in special]
    return ServerOptions(
        **{name: getattr(options, name) for name in plain},
        root_path=options.root_path or "",
        served_model_names=tuple(options.served_model_name or ()),
        allowed_origins=tuple(options.allowed_origins or ()),
        chat_template=template,
        api_key_digests=key_digests(options.api_key or (), options.api_key_file),
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    checked = server_options(options)
    if options.api_key and any(word.startswith("--api-key=") or word == "--api-key" for word in sys.argv):
        _log.warning("--api-key shows the key in the process list; --api-key-file FILE or %s does not.", KEY_VARIABLE)
    from hetis.server.serving import serve

    return serve(checked, engine_arguments(options))
