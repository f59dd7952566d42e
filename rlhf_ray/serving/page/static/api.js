// The server, asked again where it may be: what is asked twice is done once.

export class Refused extends Error {
  constructor(status, error, retryAfter) {
    super(error?.message ?? `The server answered with status ${status}.`);
    Object.assign(this, { status, code: error?.code ?? null, retryAfter });
  }
}

export const me = {
  get name() { return localStorage.getItem("rater") ?? ""; },
  set name(value) { localStorage.setItem("rater", value); },
  get token() { return localStorage.getItem("token") ?? ""; },
  set token(value) { value ? localStorage.setItem("token", value) : localStorage.removeItem("token"); },
};

// A token comes in the part of the link that browsers don't send; it leaves the address at once.
export function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  me.token = token;
  me.name = "";
  history.replaceState(null, "", "#compare");
}

export function asked(body) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (me.token) headers.Authorization = `Bearer ${me.token}`;
  return { method: body === undefined ? "GET" : "POST", headers, body: body === undefined ? undefined : JSON.stringify(body) };
}

export async function refusal(response) {
  const error = await response.json().then((found) => found.error, () => undefined);
  return new Refused(response.status, error, Number(response.headers.get("Retry-After")) || 0);
}

const sleep = (ms, signal) => new Promise((done, stop) => {
  const timer = setTimeout(done, ms);
  signal?.addEventListener("abort", () => { clearTimeout(timer); stop(signal.reason); }, { once: true });
});

// tries: how often at most; waiting(seconds, error) is told before each further one.
export async function call(path, { body, signal, tries = 4, waiting = () => {} } = {}) {
  for (let failed = 1; ; failed += 1) {
    let error;
    try {
      const response = await fetch(path, { ...asked(body), signal });
      if (response.ok) return await response.json();
      error = await refusal(response);
      if (![408, 429, 500, 502, 503, 504].includes(error.status)) throw error;
    } catch (caught) {
      if (caught.name === "AbortError" || (caught instanceof Refused && caught !== error)) throw caught;
      if (caught instanceof Refused && ![408, 429, 500, 502, 503, 504].includes(caught.status)) throw caught;
      error = caught; // a TypeError: no connection
    }
    if (failed >= tries) throw error instanceof Refused ? error : new Error("The server can't be reached.");
    const seconds = Math.max(error.retryAfter || 0, Math.min(2 ** (failed - 1), 15));
    waiting(seconds, error);
    await sleep(1000 * seconds, signal);
  }
}

export function query(values) {
  const found = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) if (value) found.append(name, value);
  return found.size ? `?${found}` : "";
}

// crypto.randomUUID is missing on plain http, this is not.
export const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
