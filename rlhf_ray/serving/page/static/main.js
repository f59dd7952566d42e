// The shell: which view is shown, who votes, and the colours.
import { call, me, Refused, takeToken } from "./api.js";
import { byId } from "./dom.js";
import * as chat from "./chat.js";
import * as compare from "./compare.js";
import * as playground from "./playground.js";
import * as results from "./results.js";

const views = { chat, compare, results, playground };
let about = null;
let current = null;

// -- colours
const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const showTheme = () => byId("theme").setAttribute("aria-pressed", String(dark()));
byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
  showTheme();
});

// -- who votes
let answered = () => {};

function showName() {
  byId("who").textContent = about?.rater ?? (me.name || "Your name");
  byId("who").disabled = Boolean(about?.rater);
}

export function askName(why = "") {
  byId("sign-why").textContent = why;
  byId("sign-why").hidden = !why;
  byId("sign-key-label").hidden = !(about === null || about.invited_only);
  byId("sign-name").value = me.name;
  if (!byId("sign").open) byId("sign").showModal();
  byId("sign-name").focus();
  return new Promise((done) => { answered = done; });
}

byId("sign-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  me.name = byId("sign-name").value.trim();
  if (byId("sign-key").value) me.token = byId("sign-key").value.trim();
  byId("sign-key").value = "";
  byId("sign").close();
});
byId("sign-close").addEventListener("click", () => byId("sign").close());
byId("sign").addEventListener("close", async () => {
  showName();
  if (about === null) await start();
  answered(Boolean(me.name));
});
byId("who").addEventListener("click", async () => {
  await askName();
  show();
});

// What requests about votes carry; null: nobody wants to say who votes.
export async function rater(why = "Say who votes before the first vote.") {
  if (about?.rater) return {};
  if (!me.name && !(await askName(why))) return null;
  return { rater: me.name };
}

// -- views
async function show() {
  if (about === null) return;
  const name = location.hash.slice(1) in views ? location.hash.slice(1) : about.votes ? "compare" : "chat";
  for (const each of Object.keys(views)) byId(`view-${each}`).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${byId(`${name}-title`).textContent} · rlhf_ray`;
  if (current !== name && current !== null) byId("main").focus();
  current = name;
  await views[name].open(about);
}

async function start() {
  try {
    about = await call("/page/about", { tries: 1000, waiting: () => { byId("who").textContent = "No connection"; } });
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      me.token = "";
      return askName(error.message);
    }
    throw error;
  }
  showName();
  for (const view of Object.values(views)) view.prepare(about);
  await show();
}

addEventListener("hashchange", () => {
  if (location.hash.startsWith("#token=")) {
    takeToken();
    location.reload();
  } else if (location.hash !== "#main") show();
});
takeToken();
showTheme();
start();
