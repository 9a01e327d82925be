"""LiteLLM against a server: completions and chat, at once and streamed. Arguments: base URL, model."""

import sys

import litellm

base_url, model = sys.argv[1:]
common = {"model": f"hosted_vllm/{model}", "api_base": base_url, "api_key": "none", "max_tokens": 16, "num_retries": 0}
messages = [{"role": "user", "content": "What is a list?"}]
answer = litellm.completion(messages=messages, **common)
assert answer.choices[0].message.content
assert answer.usage.completion_tokens == 16
streamed = litellm.completion(messages=messages, stream=True, **common)
assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
assert (
    litellm.text_completion(prompt="A list is", **(common | {"model": f"text-completion-openai/{model}"}))
    .choices[0]
    .text
)
print("3 requests, 0 failed")
