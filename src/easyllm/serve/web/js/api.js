/** Requests to the server. */

/** An error that is shown to the user: `word` is the key of its text, `values` go into the text. */
export class Problem extends Error {
  constructor(word, values = {}, status = 0) {
    super(values.message || word);
    Object.assign(this, { word, values, status });
  }
}

export const key = {
  value: "",
  /** Called when the server asks for a key; `wrong` if it refused the one that was sent. */
  asked: () => {},
  set(value) {
    this.value = value;
    try {
      sessionStorage.setItem("easyllm-key", value);
    } catch {
      /* forgotten on reload */
    }
  },
};
try {
  key.value = sessionStorage.getItem("easyllm-key") || "";
} catch {
  /* storage may be forbidden */
}

/** Returns the response of a request, or raises a Problem. */
export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.value) headers.Authorization = "Bearer " + key.value;
  if (options.json !== undefined) {
    headers["Content-Type"] = "application/json";
    options = { ...options, body: JSON.stringify(options.json) };
  }
  const response = await fetch(path, { ...options, headers }).catch(cause => {
    throw cause.name === "AbortError" ? cause : new Problem("unreachable");
  });
  if (response.ok) return response;
  if (response.status === 401) {
    const problem = new Problem(key.value ? "keyWrong" : "keyNeeded", {}, 401);
    key.asked(problem);
    throw problem;
  }
  const body = await response.json().catch(() => null);
  const message = body?.error?.message || `${response.status} ${response.statusText}`;
  throw new Problem("serverSaid", { message }, response.status);
}

export async function getJSON(path) {
  return (await request(path)).json();
}
export async function postJSON(path, json, options = {}) {
  return (await request(path, { ...options, method: "POST", json })).json();
}

/** Yields the parsed `data:` events of a streamed response; a line may arrive in several chunks. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
