// What the reader takes along: the changes as Python, and all of it as a link or a file.

const said = el("p", { class: "small muted", role: "status" });
let silence = null;
async function say(words, promise) {
  clearTimeout(silence);
  said.textContent = await Promise.resolve(promise).then(() => words, (error) => error.message);
  silence = setTimeout(() => (said.textContent = ""), 12_000);
}
const action = (name, onclick) => el("button", { type: "button", class: "tiny", "data-key": name, onclick }, name);
const copied = async (text) => navigator.clipboard.writeText(await text);

// The text, the changes and what is drawn from the next token: what a link, a file and the address hold.
function whole() {
  const isFirst = JSON.stringify(drawing) === JSON.stringify(AT_FIRST);
  return { ...question, shown: passes.shown, ...(isFirst ? {} : { drawing }) };
}

function save() {
  const kept = { mistral_ref: "explore", ...whole(), view: place() };
  const address = URL.createObjectURL(new Blob([JSON.stringify(kept, null, 2)], { type: "application/json" }));
  el("a", { href: address, download: "explore.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

const fileBox = el("input", {
  type: "file",
  accept: ".json",
  hidden: true,
  onchange: () => say("opened", openFile(fileBox.files[0])),
});
async function openFile(file) {
  fileBox.value = "";
  const kept = parsed(await file.text());
  if (!opened(kept, kept?.view)) throw new Error(`${file.name} holds no text and changes of this page`);
}

const parsed = (text) => {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
};

// Shows what has been opened, as another place to which Back leads; returns whether it says anything.
function opened(kept, view) {
  if (!isKept(kept)) return false;
  if (typeof view === "string") {
    history.pushState(null, "", `#${view}`);
    readAddress();
  }
  restore(kept, String(view).split("/")[4]);
  draw();
  return true;
}

async function link() {
  if (hooks.keep() === "") throw new Error("The text is too long for a link: save it to a file.");
  return location.href;
}

// A link may be that of another server, or of one that has ended: what stands behind its # is what counts.
const linkBox = el("input", {
  type: "text",
  "aria-label": "a link",
  "data-key": "link",
  placeholder: "or paste a link here",
  autocomplete: "off",
  spellcheck: "false",
  oninput: () => say("opened", openLink(linkBox.value)),
});
async function openLink(link) {
  const [, view, kept] = /#((?:[^/]*\/){4}[^/]*)\/(.+)$/.exec(link.trim()) ?? [];
  if (!opened(parsed(unquoted(kept ?? "")), view)) throw new Error("This link holds no text and changes of this page.");
  linkBox.value = "";
  openBox.hidden = true;
}
const unquoted = (text) => {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
};
const openBox = el("div", { class: "open-box", hidden: true }, action("Choose a file", () => fileBox.click()), linkBox);

const restored = { token: NaN }; // the token that a link names: its text may not be there yet

const isKept = (kept) =>
  typeof kept?.text === "string" &&
  Array.isArray(kept.changes) &&
  kept.changes.every((one) => one !== null && typeof one === "object") &&
  Array.isArray(kept.more ?? []);

// Shows what a link or a file says; returns whether it says anything.
function restore(kept, token) {
  if (!isKept(kept)) return false;
  const { text, changes, more = [] } = kept,
    shown = !changes.some(isOn) ? "before" : SHOWN.includes(kept.shown) ? kept.shown : "after";
  setDrawing(kept.drawing ?? {});
  if (JSON.stringify({ text, changes, more }) === JSON.stringify(question)) {
    passes.shown = shown;
    load(shown === "before" ? passes.before : passes.after);
    return true;
  }
  textBox.value = text;
  restored.token = Number(token);
  show({ text, changes, more }, shown, false);
  return true;
}

const actions = el(
  "div",
  { class: "actions" },
  el(
    "div",
    { class: "choices" },
    action("Copy as Python", () => say("copied", copied(partOf("python", null, "after")))),
    action("Copy link", () => say("copied; Open shows it, also on another server", copied(link()))),
    action("Save", save),
    action("Open", () => {
      openBox.hidden = !openBox.hidden;
      if (!openBox.hidden) linkBox.focus();
    }),
    fileBox,
  ),
  openBox,
  said,
);

hooks.keep = () => {
  const kept = encodeURIComponent(JSON.stringify(whole()));
  return kept.length < 20_000 ? `/${kept}` : ""; // a longer text is not a part of the address
};
hooks.restore = (kept, token) => {
  try {
    restore(JSON.parse(decodeURIComponent(kept)), token);
  } catch {
    // an address that leads nowhere is left aside
  }
};
