"""Requests and responses of OpenAI's interface, with vLLM's extensions.

Requests and responses are `msgspec` structures, because streamed chunks are encoded from them, and because the messages
for wrong values are hetis's own; `schemas` describes them in /openapi.json.
"""
