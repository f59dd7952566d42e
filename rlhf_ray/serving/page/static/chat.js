// A chat with one model, streamed.
import { asked, refusal } from "./api.js";
import { byId, make, options } from "./dom.js";

let messages = [];
let stop = null;
let plain = new Set();

export function prepare(about) {
  plain = new Set(about.models.filter((model) => !model.chat).map((model) => model.name));
  options(byId("chat-model"), about.models.map((model) => model.name));
  byId("chat-plain").hidden = !plain.has(byId("chat-model").value);
}

export function open() {}

byId("chat-model").addEventListener("change", () => {
  byId("chat-plain").hidden = !plain.has(byId("chat-model").value);
});
byId("chat-new").addEventListener("click", () => {
  stop?.abort();
  messages = [];
  byId("chat-log").replaceChildren();
  byId("chat-heard").replaceChildren();
  byId("chat-text").focus();
});
byId("chat-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("chat-form").requestSubmit();
  }
});

function turn(role, text) {
  const who = role === "user" ? "You" : byId("chat-model").value;
  const node = make("div", { class: `turn ${role}`, dir: "auto", role: "article", "aria-label": who }, text);
  byId("chat-log").append(node);
  return node;
}

// What a screen reader says of an answer: each sentence once, when it is whole. The log itself changes with every token.
let heard = 0;
function hear(text, whole) {
  const rest = text.slice(heard);
  const found = whole ? rest : (rest.match(/^[^]*(?:[.!?]\s|\n)/)?.[0] ?? "");
  heard += found.length;
  if (found.trim()) byId("chat-heard").append(make("p", {}, found.trim()));
}

byId("chat-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (stop !== null) return stop.abort();
  const text = byId("chat-text").value;
  if (!text.trim()) return;
  byId("chat-text").value = "";
  messages.push({ role: "user", content: text });
  turn("user", text);
  const node = turn("assistant", "");
  node.classList.add("busy");
  node.scrollIntoView({ block: "nearest" });
  stop = new AbortController();
  byId("chat-send").textContent = "Stop";
  byId("chat-status").textContent = "";
  let said = "";
  heard = 0;
  byId("chat-heard").replaceChildren();
  try {
    for await (const piece of pieces({ model: byId("chat-model").value, messages }, stop.signal)) {
      said += piece;
      node.classList.remove("busy");
      node.textContent = said;
      hear(said, false);
      byId("chat-form").scrollIntoView({ block: "nearest" });
    }
    if (!said) node.textContent = "(nothing)";
  } catch (error) {
    if (error.name !== "AbortError") {
      node.classList.add("failed");
      node.textContent = `${said}${said ? "\n\n" : ""}${error instanceof TypeError ? "The server can't be reached." : error.message}`;
    } else if (!said) node.textContent = "(stopped)";
  }
  hear(node.textContent, true);
  // What a model takes: turns that alternate. A question without an answer is asked again, not kept.
  if (said) messages.push({ role: "assistant", content: said });
  else messages.pop();
  node.classList.remove("busy");
  stop = null;
  byId("chat-send").textContent = "Send";
});

// The text of each server-sent event: a chunk of a chat, or of a completion.
async function* pieces(body, signal) {
  const response = await fetch("/page/chat", { ...asked(body), signal });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer ended early.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      yield choice?.delta?.content ?? choice?.text ?? "";
    }
  }
}
