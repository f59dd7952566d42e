// What the votes say, and each vote to read again.
import { call, me, query } from "./api.js";
import { byId, fill, make, number, options, percent, showPrompt } from "./dom.js";

const SAID = { left: "answer 1 is better", right: "answer 2 is better", tie: "a tie", both_bad: "both bad" };
let votes = false;
let following = null;
let me_ = null;

export function prepare(about) {
  votes = about.votes;
  me_ = about.rater;
}

const filters = () => Object.fromEntries(new FormData(byId("results-filters")));

export async function open() {
  byId("results-filters").hidden = !votes;
  if (!votes) {
    byId("results-status").textContent = "This server keeps no votes. Start it with --votes votes.db to compare answers here.";
    return;
  }
  byId("results-status").textContent = "Counting the votes …";
  try {
    const [figures, page] = await Promise.all([call(`/page/results${query(filters())}`), readVotes()]);
    showFigures(figures);
    fill(byId("results-votes"), make("h2", { class: "part" }, "Votes"), ...page);
    byId("results-status").textContent = figures.votes ? "" : "No votes yet.";
  } catch (error) {
    byId("results-status").textContent = error.message;
  }
}

async function readVotes(before) {
  const found = await call(`/page/votes${query({ ...filters(), before, open_to: me_ ?? me.name })}`);
  following = found.next;
  byId("results-older").hidden = following === null;
  return found.votes.map(showVote);
}

byId("results-filters").addEventListener("change", open);
byId("results-older").addEventListener("click", async () => {
  try {
    byId("results-votes").append(...(await readVotes(following)));
  } catch (error) {
    byId("results-status").textContent = error.message;
  }
});

// -- figures
const tile = (value, name) => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, name));
const between = (figure, say) => make("small", {}, ` ${say(figure.low)} to ${say(figure.high)}`);

function table(caption, heads, rows) {
  const head = make("thead", {}, make("tr", {}, ...heads.map((text) => (text ? make("th", { scope: "col" }, text) : make("td")))));
  const body = rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name),
    ...cells.map((cell) => make("td", {}, ...(Array.isArray(cell) ? cell : [cell])))));
  return [make("h2", { class: "part" }, caption), make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    make("table", {}, head, make("tbody", {}, ...body)))];
}

// A figure with its interval on an axis from low to high; `middle` is where nothing is better than anything.
function range(figure, low, high, middle) {
  const at = (value) => String((100 * (value - low)) / (high - low));
  return make("svg", { class: "range", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    make("line", { class: "axis", x1: at(middle), x2: at(middle), y1: "0", y2: "10" }),
    make("line", { x1: at(figure.low), x2: at(figure.high), y1: "5", y2: "5", "stroke-width": "2" }),
    make("rect", { x: String(Number(at(figure.mean)) - 0.6), y: "1.5", width: "1.2", height: "7" }));
}

function showFigures(figures) {
  const { versions, agreement, raters } = figures;
  options(byId("results-filters").elements.rater, Object.keys(raters), [make("option", { value: "" }, "all")]);
  options(byId("results-filters").elements.version, versions.names, [make("option", { value: "" }, "all")]);
  const alpha = agreement.krippendorff_alpha;
  const parts = [make("div", { class: "tiles" },
    tile(String(figures.votes), "votes"), tile(String(figures.comparisons), "comparisons"),
    tile(String(Object.keys(raters).length), "raters"), tile(alpha ? number(alpha.mean) : "–", "agreement (α)"))];
  const scores = Object.entries(versions.scores).filter(([, score]) => score !== null);
  if (scores.length) {
    scores.sort((one, other) => other[1].mean - one[1].mean);
    const low = Math.min(...scores.map(([, score]) => score.low), -0.5);
    const high = Math.max(...scores.map(([, score]) => score.high), 0.5);
    parts.push(...table("Versions", ["Version", "Wins", "", "Score", "", "Votes"], scores.map(([name, score]) => {
      const { win_rate: rate, votes: count } = versions.overall[name];
      return [name, [percent(rate.mean), between(rate, percent)], [range(rate, 0, 1, 0.5)],
        [number(score.mean), between(score, number)], [range(score, low, high, 0)], String(count)];
    })));
    parts.push(make("p", { class: "hint" }, "Wins: ties and “both bad” are half a win. Score: Bradley–Terry, log-odds, mean 0. Intervals hold 95 %."));
    if (versions.groups.length > 1) parts.push(make("p", { class: "hint" }, `Scores compare within a group only: ${versions.groups.map((group) => group.join(", ")).join("; ")}.`));
    parts.push(...table("One against the other", ["Version", "Against", "Wins", "", "Votes"], versions.win_rates.map((met) => [
      met.of, met.against, [percent(met.win_rate.mean), between(met.win_rate, percent)], [range(met.win_rate, 0, 1, 0.5)], String(met.votes)])));
  }
  if (figures.votes) {
    parts.push(...table("Raters", ["Rater", "Votes", "Seconds each", "Left in"], Object.entries(raters).map(([name, rater]) => [
      name, String(rater.votes), number(rater.median_seconds, 1), percent(rater.left)])));
    const pairs = agreement.cohen_kappa.map((two) => `${two.raters.join(" and ")}: κ ${number(two.kappa)} on ${two.comparisons}`);
    parts.push(make("p", { class: "hint" }, alpha
      ? `Agreement on ${agreement.comparisons_with_two_raters} comparisons with two raters or more: Krippendorff’s α ${number(alpha.mean)} (${number(alpha.low)} to ${number(alpha.high)}); 1 is perfect, 0 is chance. ${pairs.join("; ")}`
      : "No comparison has two raters yet, so nothing is known of their agreement."));
    const days = Object.entries(figures.by_day);
    const most = Math.max(...days.map(([, count]) => count));
    parts.push(...table("By day (UTC)", ["Day", "", "Votes"], days.slice(-30).map(([day, count]) => [day,
      [make("svg", { class: "range", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
        make("rect", { x: "0", y: "2", width: String((100 * count) / most), height: "6" }))], String(count)])));
  }
  fill(byId("results-figures"), ...parts);
}

// -- each vote
function showVote(vote) {
  const notes = [["Rating", vote.rating], ["Reason", vote.reason], ["Flag", vote.flag],
    [vote.edit_of === "left" ? "Answer 1 rewritten" : "Answer 2 rewritten", vote.edit]].filter(([, value]) => value);
  const prompt = make("div", { class: "prompt" });
  showPrompt(prompt, vote.prompt);
  const answer = (side, name) => make("article", { class: vote.choice === side ? "chosen" : "" },
    make("h3", {}, `${name}: ${vote[side].model}@${vote[side].version}`), make("div", { class: "text", dir: "auto" }, vote[side].text.trim()));
  const asked = typeof vote.prompt === "string" ? vote.prompt : vote.prompt.at(-1).content;
  const short = asked.trim().length > 80 ? `${asked.trim().slice(0, 80)} …` : asked.trim();
  const when = new Date(1000 * vote.voted_at).toLocaleString();
  return make("details", { class: "vote" },
    make("summary", {}, `${short} `, make("small", {}, `${vote.rater}: ${SAID[vote.choice]}${vote.flag ? ", flagged" : ""}`)),
    prompt, make("div", { class: "two" }, answer("left", "Answer 1"), answer("right", "Answer 2")),
    ...notes.map(([name, value]) => make("p", { class: "text", dir: "auto" }, make("b", {}, `${name}: `), String(value))),
    make("p", { class: "hint" }, `${when}, ${number(vote.seconds, 1)} s`));
}
