// The chat page: streams /v1/chat/completions, or /v1/completions for models without a chat template. No libraries.
"use strict";

const byId = (id) => document.getElementById(id);

let conversation = []; // messages in OpenAI's form
let running = null; // AbortController of the answer that is streamed
let model = null;

function addMessage(role, text) {
  const box = document.createElement("div");
  box.className = `message ${role}`;
  box.textContent = text;
  byId("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return box;
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
}

// --- the request -----------------------------------------------------------------------------------------------------

function requestOf(text) {
  const settings = {
    model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number(byId("temperature").value),
    top_p: Number(byId("top-p").value),
    max_tokens: Number(byId("max-tokens").value),
  };
  if (byId("mode").value === "text") return ["v1/completions", { ...settings, prompt: text }];
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  return ["v1/chat/completions", { ...settings, messages }];
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status} ${response.statusText}`;
  }
}

/** Events of a response: objects from its `data:` lines, until [DONE]. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

const newText = (choice) => (choice.delta ? choice.delta.content || "" : choice.text || "");

async function stream(text, box) {
  const [path, body] = requestOf(text);
  const begin = performance.now();
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal: running.signal,
  });
  if (!response.ok) throw new Error(await errorOf(response));
  let first = null;
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      first = first ?? performance.now();
      box.textContent += newText(choice);
    }
    if (event.usage) showSpeed(event.usage.completion_tokens, begin, first);
    box.scrollIntoView({ block: "end" });
  }
}

function showSpeed(tokens, begin, first) {
  const now = performance.now();
  const rate = first !== null && tokens > 1 ? `, then ${((1000 * (tokens - 1)) / (now - first)).toFixed(1)} tokens/s` : "";
  const wait = first === null ? "" : `; first token after ${(first - begin).toFixed(0)} ms`;
  byId("note").textContent = `${tokens} tokens${wait}${rate}`;
}

// --- events ----------------------------------------------------------------------------------------------------------

async function send(event) {
  event.preventDefault();
  const text = byId("prompt").value;
  if (running !== null || !text.trim()) return;
  byId("prompt").value = "";
  byId("note").textContent = "";
  addMessage("user", text);
  conversation.push({ role: "user", content: text });
  const box = addMessage("assistant", "");
  setRunning(new AbortController());
  try {
    await stream(text, box);
  } catch (error) {
    if (error.name !== "AbortError") addMessage("error", error.message);
  } finally {
    setRunning(null);
  }
  if (box.textContent) {
    conversation.push({ role: "assistant", content: box.textContent });
  } else {
    box.remove();
    conversation.pop(); // the question without an answer
  }
  byId("prompt").focus();
}

function clear() {
  if (running !== null) running.abort();
  conversation = [];
  byId("messages").replaceChildren();
  byId("note").textContent = "";
}

async function start() {
  const isChat = document.body.dataset.chatTemplate === "yes";
  byId("mode").value = isChat ? "chat" : "text";
  if (!isChat) {
    byId("note").textContent = "This model has no chat template: it continues the text that you write.";
    byId("mode").querySelector("[value=chat]").disabled = true;
  }
  try {
    const response = await fetch("v1/models");
    if (!response.ok) throw new Error(await errorOf(response));
    model = (await response.json()).data[0].id;
    byId("model").textContent = model;
  } catch (error) {
    addMessage("error", error.message);
  }
}

byId("form").addEventListener("submit", send);
byId("stop").addEventListener("click", () => running !== null && running.abort());
byId("clear").addEventListener("click", clear);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
start();
