// Two answers token by token, coloured by how likely each token was.
import { call } from "./api.js";
import { byId, fill, make, number, options } from "./dom.js";

let answers = [];

export function prepare(about) {
  const names = about.models.map((model) => model.name);
  const form = byId("playground-form").elements;
  options(form.one, names);
  options(form.two, names, [make("option", { value: "" }, "none")]);
  options(form.reference, names, [make("option", { value: "" }, "none")]);
  if (names.length > 1) form.two.value = names[1];
  form.reference.value = names[0] ?? "";
}

export function open() {}

const colour = () => document.querySelector("[name=colour]:checked").value;

byId("playground-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = byId("playground-form").elements;
  const body = {
    prompt: form.prompt.value, models: [form.one.value, form.two.value].filter(Boolean), reference: form.reference.value || null,
    temperature: Number(form.temperature.value), max_tokens: Number(form.max_tokens.value), seed: Number(form.seed.value),
  };
  const status = byId("playground-status");
  status.textContent = "Drawing …";
  status.classList.add("busy");
  try {
    ({ answers } = await call("/page/playground", { body }));
    fill(byId("playground-answers"), ...answers.map(show));
    const valued = answers.some((answer) => answer.tokens.some((token) => token.value !== undefined));
    byId("by-value").hidden = !valued;
    if (!valued && colour() === "value") document.querySelector("[name=colour][value=logprob]").checked = true;
    paint();
    status.textContent = "Click a token, or walk through them with ← and →.";
  } catch (error) {
    status.textContent = error.message;
  }
  status.classList.remove("busy");
});

for (const input of document.querySelectorAll("[name=colour]")) input.addEventListener("change", paint);

// nats that the model is surer of the token than the reference; null without one
const gap = (token) => (token.reference_logprob === undefined ? null : token.logprob - token.reference_logprob);

function show(answer, place) {
  const tokens = make("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": `Tokens of ${answer.model}` },
    ...answer.tokens.map((token, index) => make("span", { "data-place": index }, token.token)));
  const told = make("p", { class: "figures", "aria-live": "polite" });
  let picked = -1;
  const pick = (index) => {
    if (!(index in answer.tokens)) return;
    tokens.children[picked]?.classList.remove("picked");
    tokens.children[index].classList.add("picked");
    picked = index;
    told.textContent = words(answer.tokens[index]);
  };
  tokens.addEventListener("click", (event) => pick(Number(event.target.dataset.place)));
  tokens.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    pick(picked + (event.key === "ArrowRight" ? 1 : -1));
  });
  const figures = [`log-prob ${number(answer.logprob)} in ${answer.tokens.length} tokens`];
  if (answer.kl !== null) figures.push(`KL ${number(answer.kl)} nats`);
  if (answer.reward !== null) figures.push(`reward ${number(answer.reward)}`);
  if (answer.reward_error) figures.push(answer.reward_error);
  figures.push(`seed ${answer.seed}`);
  return make("article", { "aria-labelledby": `playground-${place}` },
    make("h2", { id: `playground-${place}` }, `${answer.model}, version ${answer.version}`), tokens,
    make("p", { class: "hint" }, figures.join(" · ")), told);
}

function words(token) {
  const found = [`“${token.token}”: log-prob ${number(token.logprob)} (${number(100 * Math.exp(token.logprob), 1)} %)`];
  if (token.value !== undefined) found.push(`value before it ${number(token.value)}`);
  if (gap(token) !== null) found.push(`reference ${number(token.reference_logprob)}, difference ${number(gap(token))}`);
  return found.join("; ");
}

// 0 to 1: 5 nats and more are full colour, as are a difference of 2 and the value that is farthest from 0 in what is shown.
function paint() {
  const values = answers.flatMap((answer) => answer.tokens.map((token) => Math.abs(token.value ?? 0)));
  const farthest = Math.max(...values, 1e-9);
  const shades = {
    logprob: (token) => -token.logprob / 5,
    kl: (token) => (gap(token) ?? 0) / 2,
    value: (token) => (token.value ?? 0) / farthest,
  };
  document.querySelectorAll(".tokens").forEach((tokens, place) => {
    answers[place].tokens.forEach((token, index) => {
      const by = shades[colour()](token);
      const node = tokens.children[index];
      node.classList.toggle("less", by < 0);
      node.style.setProperty("--at", String(Math.min(Math.abs(by), 1)));
    });
  });
}
