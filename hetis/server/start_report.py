"""What the log says when the server starts: defaults of sampling, where it listens, and how to try it."""

import json
import logging
import shlex

from hetis.core.sampling_params import SamplingParams
from hetis.server.context import Server

_TRIAL = "A list is"
_log = logging.getLogger("hetis")


def report_defaults(server: Server) -> None:
    """Logs the sampling parameters of requests that name none: files of models change them unseen."""
    if not server.sampling_defaults:
        why = "as in OpenAI's API; the model's generation_config.json " + (
            "sets none" if server.options.generation_config == "auto" else "is ignored (--generation-config vllm)"
        )
    else:
        why = "by the model's generation_config.json; --generation-config vllm ignores it"
    defaults = SamplingParams()
    names = dict.fromkeys(["temperature", "top_p", "top_k", *server.sampling_defaults])
    shown = ", ".join(f"{name} {server.sampling_defaults.get(name, getattr(defaults, name))}" for name in names)
    _log.info("sampling defaults: %s (%s).", shown, why)


def report_ready(server: Server, url: str) -> None:
    """Logs in one line where the server listens, what it serves, and a command that tries it."""
    options, plan = server.options, server.llm.config.plan
    where, reach = url, "this machine only; --host 0.0.0.0: all" if options.is_local else "other machines, too"
    if options.uds is not None:
        where, reach = f"unix socket {options.uds}", "this machine only"
    _log.info(
        "ready on %s (reachable from %s), model %s, plan %s, API key %s. Try: %s",
        where,
        reach,
        ", ".join(server.model_names),
        plan if isinstance(plan, str) else "of the dict",
        "on" if options.api_key_digests else "off",
        trial_command(server, url),
    )
    if not options.api_key_digests and not options.is_local:
        _log.warning("no API key is set: all who reach %s may use this server; --api-key-file FILE sets one.", where)


def trial_command(server: Server, url: str) -> str:
    """A curl command for a shell."""
    options = server.options
    body = {"model": server.model_names[0], "prompt": _TRIAL, "max_tokens": 32}
    words = ["curl", *(["--unix-socket", options.uds] if options.uds is not None else [])]
    words += ["--cacert", options.ssl_ca_certs or "FILE"] if options.ssl_certfile else []
    words += [f"{url}{options.root_path}/v1/completions", "-H", "Content-Type: application/json"]
    command = shlex.join([*words, "-d", json.dumps(body)])
    # in double quotes, so that the shell inserts the key
    return command + (' -H "Authorization: Bearer $HETIS_API_KEY"' if options.api_key_digests else "")
