// openai for Node against a server: completions and chat, at once, streamed, and cut. Arguments: base URL, model.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is a list?" }];

function check(holds, what) {
  if (!holds) throw new Error(what);
}

const models = await client.models.list();
check(models.data[0].id === model, "the model is listed");
const text = await client.completions.create({ model, prompt: "A list is", max_tokens: 16 });
check(text.choices[0].text && text.usage.completion_tokens === 16, "a completion");
const chat = await client.chat.completions.create({ model, messages, max_tokens: 16, logprobs: true, top_logprobs: 2 });
check(chat.choices[0].message.content, "an answer");
check(chat.choices[0].logprobs.content.length === 16, "its log-probabilities");

const stream = await client.chat.completions.create({ model, messages, max_tokens: 16, stream: true, stream_options: { include_usage: true } });
let streamed = "";
let usage = null;
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
check(streamed && usage.completion_tokens === 16, "a stream");

const long = await client.completions.create({ model, prompt: "A list is", max_tokens: 400, ignore_eos: true, stream: true });
for await (const chunk of long) {
  check(chunk.choices.length === 1, "a chunk");
  break; // closes the connection
}

try {
  await client.completions.create({ model, prompt: "A list is", temperature: 9 });
  check(false, "a wrong temperature is refused");
} catch (error) {
  check(error.status === 400 && error.param === "temperature", `the refusal names the field: ${error}`);
}
console.log("7 requests, 0 failed");
