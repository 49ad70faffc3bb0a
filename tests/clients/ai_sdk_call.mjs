// The Vercel AI SDK: one streamed call through `@ai-sdk/openai-compatible`. Run as SCRIPT URL FOLDER-OF-node_modules; prints JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, folder] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${folder}/package.json`));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { jsonSchema, stepCountIs, streamText, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const provider = createOpenAICompatible({ name: "gemcutter", baseURL: `${url}/v1`, apiKey: "none" });
const f = tool({
  description: "Return a text in capitals.",
  inputSchema: jsonSchema({ type: "object", properties: { x: { type: "string" } } }),
  execute: async ({ x }) => x.toUpperCase(),
});
const result = streamText({
  model: provider("demo"),
  prompt: "What is a lantern?",
  tools: { f },
  temperature: 0,
  maxOutputTokens: 64,
  maxRetries: 0,
  stopWhen: stepCountIs(3),
});
const found = { text: [], calls: [], results: [], errors: [] };
for await (const part of result.fullStream) {
  if (part.type === "tool-call") found.calls.push([part.toolName, part.input]);
  if (part.type === "tool-result") found.results.push(part.output);
  if (part.type === "error") found.errors.push(String(part.error));
}
for (const step of await result.steps) found.text.push(step.text);
console.log(JSON.stringify({ ...found, reason: await result.finishReason }));
