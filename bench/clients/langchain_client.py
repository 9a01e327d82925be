"""LangChain against a server: completions and chat, at once and streamed. Arguments: base URL, model."""

import sys

from langchain_openai import ChatOpenAI, OpenAI

base_url, model = sys.argv[1:]
common = {"base_url": base_url, "api_key": "none", "model": model, "max_tokens": 16, "max_retries": 0}
completion, chat = OpenAI(**common), ChatOpenAI(**common)
assert completion.invoke("A list is")
assert "".join(completion.stream("A list is"))
answer = chat.invoke([("system", "Be short."), ("user", "What is a list?")])
assert answer.content
assert answer.usage_metadata["output_tokens"] == 16
assert "".join(str(piece.content) for piece in chat.stream("What is a list?"))
assert len(chat.batch(["What is a list?", "What is a tuple?", "What is a set?"])) == 3
print("7 requests, 0 failed")
