// Elements from plain values. Text is always text (textContent): nothing that a person or a model wrote becomes markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "line", "rect", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function fill(node, ...children) {
  node.replaceChildren(...children.filter((child) => child !== null));
}

export function options(select, names, first = []) {
  const chosen = select.value;
  fill(select, ...first, ...names.map((name) => make("option", { value: name }, name)));
  if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
}

// A prompt is a text, or messages.
export function showPrompt(node, prompt) {
  if (typeof prompt === "string") return fill(node, make("div", { dir: "auto" }, prompt.trim()));
  const alone = prompt.length === 1 && prompt[0].role === "user";
  fill(node, ...prompt.map((turn) => make("p", { dir: "auto" }, alone ? null : make("b", {}, `${turn.role}: `), turn.content)));
}

export const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"));
export const percent = (value) => `${Math.round(100 * value)}\u00a0%`;
