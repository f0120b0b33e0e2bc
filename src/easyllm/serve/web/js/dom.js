/** Small helpers to build elements. */

export const byId = id => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

/**
 * Returns an element. Properties: `class`, `dataset`, `on` (listeners by event), `t` (key of its
 * text), `label` (key of its accessible name and tooltip); all others are attributes.
 * Children are nodes or texts; a text is never read as HTML.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "on")
      for (const [event, action] of Object.entries(value)) element.addEventListener(event, action);
    else if (name === "t") element.dataset.t = value;
    else if (name === "label") element.dataset.tLabel = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat().filter(child => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** Returns an icon of the page's sprite, which assistive technology ignores. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", "#i-" + name);
  svg.append(use);
  return svg;
}

/** Returns a button that shows only an icon; `label` is the key of its name. */
export function iconButton(name, label, action, properties = {}) {
  return h(
    "button",
    {
      type: "button",
      label,
      ...properties,
      class: "quiet " + (properties.class || ""),
      on: { click: action },
    },
    icon(name),
  );
}

/** Offers a text as a file to download. */
export function download(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Copies a text; works without the clipboard API too, which browsers hide from plain HTTP. */
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      /* not permitted: try the old way */
    }
  }
  const area = h("textarea", { class: "offscreen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
}
