// Two answers, blind: one vote per comparison, whatever the network does and however many tabs there are.
import { call, me, newKey, query, Refused } from "./api.js";
import { byId, showPrompt } from "./dom.js";
import { askName, rater } from "./main.js";

const SAID = { left: "answer 1 is better", right: "answer 2 is better", tie: "a tie", both_bad: "both bad" };
const KEYS = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", 3: "tie", 4: "both_bad" };

let current = null; // the comparison that is shown, with `replace` where its vote is being changed
let shownAt = 0;
let sending = false;
let last = null;
let skipped = [];
let ahead = null; // the next comparison, asked for while this one is read
let votes = false;

const say = (text, busy = false) => {
  byId("compare-status").textContent = text;
  byId("compare-status").classList.toggle("busy", busy);
};
const details = () => byId("compare-details").elements;

export function prepare(about) {
  votes = about.votes;
  byId("keys").checked = localStorage.getItem("keys") !== "off";
}

export async function open(about) {
  if (!votes) {
    byId("own").hidden = byId("compare-skip").hidden = true;
    return say("This server keeps no votes. Start it with --votes votes.db to compare answers here.");
  }
  if (!(await sendPending()) || current !== null || sending) return;
  if (!about.prompts) byId("own").open = true;
  await next();
}

// -- what is shown
async function ask(who, wish) {
  const waiting = (seconds) => say(`The server is busy; asking again in ${seconds} s.`, true);
  return call("/page/comparisons", { body: { ...who, ...wish }, waiting });
}

async function next(wish = {}) {
  hide();
  say("");
  const who = await rater();
  if (who === null) return say("Say who you are to vote: the button above asks for your name.");
  say("Two models are writing …", true);
  try {
    const found = (Object.keys(wish).length ? null : await ahead) ?? (await ask(who, { skip: skipped.slice(-100), ...wish }));
    ahead = null;
    show(found);
    const without = [...skipped, found.comparison].slice(-100);
    if (!wish.prompt) ahead = ask(who, { skip: without }).catch(() => null);
  } catch (error) {
    ahead = null;
    if (error.status === 401) return askName(error.message).then((told) => told && next(wish));
    if (error.code === "no_prompts") {
      byId("own").open = true;
      return say("This server has no list of prompts. Ask something of your own.");
    }
    say(error.message);
  }
}

function hide() {
  current = null;
  byId("compare-card").hidden = true;
  byId("compare-details").reset();
  byId("edit-label").hidden = true;
  byId("compare-more").open = false;
}

function show(found, replace = false) {
  current = { ...found, replace };
  showPrompt(byId("compare-prompt"), found.prompt);
  byId("compare-left").textContent = found.left.text.trim();
  byId("compare-right").textContent = found.right.text.trim();
  byId("compare-card").hidden = false;
  enable(true);
  say(replace ? "Your vote is being changed; the new one takes its place." : "");
  if (document.activeElement === document.body || byId("view-compare").contains(document.activeElement)) {
    byId("compare-prompt-title").focus({ preventScroll: true });
  }
  scrollTo({ top: 0 });
  shownAt = performance.now();
}

function enable(on) {
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = !on;
}

// -- votes
function told() {
  const form = details();
  const texts = { reason: form.reason.value, flag: form.flag.value };
  if (form.edit_of.value) Object.assign(texts, { edit_of: form.edit_of.value, edit: form.edit.value });
  const given = Object.entries(texts).filter(([, value]) => value.trim());
  const found = Object.fromEntries(given);
  if (!found.edit) delete found.edit_of;
  if (form.rating.value) found.rating = Number(form.rating.value);
  return found;
}

async function vote(choice) {
  if (current === null || sending) return;
  sending = true;
  const who = await rater();
  if (who === null) {
    sending = false;
    return;
  }
  const body = {
    ...who, comparison: current.comparison, key: newKey(), choice, seconds: (performance.now() - shownAt) / 1000,
    replace: current.replace, ...told(),
  };
  localStorage.setItem("pending", JSON.stringify(body)); // a tab that is closed now sends it when it opens again
  enable(false);
  sending = false;
  if (await sendPending()) await next();
}

// Whether nothing is left to send.
async function sendPending() {
  const text = localStorage.getItem("pending");
  if (text === null || sending) return text === null;
  sending = true;
  const body = JSON.parse(text);
  say("Saving your vote …");
  const waiting = (seconds, error) => say(`Your vote is not saved yet (${error instanceof Refused ? error.message : "no connection"}); trying again in ${seconds} s.`, true);
  try {
    const receipt = await call("/page/votes", { body, tries: Infinity, waiting });
    done(body, receipt, `Your vote: ${SAID[receipt.choice]}.`);
  } catch (error) {
    if (error.status === 401 || error.status === 400 || error.status === 413) {
      if (error.status !== 401) localStorage.removeItem("pending");
      enable(true);
      say(`Your vote was not taken: ${error.message}`);
      if (error.status === 401 && (await askName(error.message))) localStorage.setItem("pending", JSON.stringify({ ...body, rater: me.name }));
      return false;
    }
    done(body, null, error.status === 409 ? `Not taken: ${error.message}` : error.message);
  } finally {
    sending = false;
  }
  say("");
  return true;
}

function done(body, receipt, text) {
  if (localStorage.getItem("pending") === JSON.stringify(body)) localStorage.removeItem("pending");
  last = { comparison: body.comparison, receipt };
  byId("compare-last").hidden = false; // before its text: what changes in what is hidden is not read out
  byId("last-text").textContent = text;
  byId("last-change").hidden = false;
  byId("last-who").hidden = receipt === null;
}

byId("last-who").addEventListener("click", () => {
  const { left, right } = last.receipt;
  byId("last-text").textContent += ` Answer 1 is by ${left.model} (version ${left.version}), answer 2 by ${right.model} (version ${right.version}).`;
  byId("last-who").hidden = byId("last-change").hidden = true; // a vote that knows who wrote what is none
});

byId("last-change").addEventListener("click", async () => {
  const found = await call(`/page/comparisons/${encodeURIComponent(last.comparison)}${query(await rater())}`).catch((error) => say(error.message));
  if (!found) return;
  if (current !== null && !current.replace) ahead = Promise.resolve(current); // comes back after the change
  hide();
  show(found, true);
  byId("compare-last").hidden = true;
  const { rating, reason, edit_of, edit, flag } = found.vote ?? {};
  Object.entries({ reason, edit_of, edit, flag }).forEach(([name, value]) => { details()[name].value = value ?? ""; });
  if (rating) details().rating.value = String(rating);
  byId("edit-label").hidden = !edit_of;
  byId("compare-more").open = Boolean(rating || reason || edit_of || flag);
});

for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => vote(button.dataset.choice));

addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input:not([type=checkbox]), textarea, select, dialog");
  if (byId("view-compare").hidden || !byId("keys").checked || typing || event.repeat) return;
  if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey || !(event.key in KEYS)) return;
  event.preventDefault();
  vote(KEYS[event.key]);
});
byId("keys").addEventListener("change", () => localStorage.setItem("keys", byId("keys").checked ? "on" : "off"));

byId("compare-skip").addEventListener("click", () => {
  if (sending) return;
  if (current !== null && !current.replace) skipped.push(current.comparison);
  next();
});
details().edit_of.addEventListener("change", () => {
  const side = details().edit_of.value;
  byId("edit-label").hidden = !side;
  if (side) details().edit.value = current[side].text.trim();
});
byId("compare-details").addEventListener("submit", (event) => event.preventDefault());
byId("own-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = byId("own-text").value;
  if (!prompt.trim() || sending) return;
  byId("own").open = false;
  byId("own-text").value = "";
  next({ prompt });
});
