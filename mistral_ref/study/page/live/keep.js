// What the reader takes along: the changes as Python, and all of it as a link or a file.

const said = el("span", { class: "small muted", role: "status" });
async function say(words, promise) {
  try {
    await promise;
    said.textContent = words;
  } catch (error) {
    said.textContent = error.message;
  }
}
const action = (name, onclick) => el("button", { type: "button", class: "tiny", "data-key": name, onclick }, name);
const copied = async (text) => navigator.clipboard.writeText(await text);

function save() {
  const kept = { mistral_ref: "explore", ...question, shown: passes.shown, view: place() };
  const address = URL.createObjectURL(new Blob([JSON.stringify(kept, null, 2)], { type: "application/json" }));
  el("a", { href: address, download: "explore.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

const fileBox = el("input", {
  type: "file",
  accept: ".json",
  hidden: true,
  onchange: () => say("opened", open(fileBox.files[0])),
});
async function open(file) {
  fileBox.value = "";
  let kept;
  try {
    kept = JSON.parse(await file.text());
  } catch {
    kept = null;
  }
  if (typeof kept?.view === "string") {
    history.replaceState(null, "", `#${kept.view}`);
    readAddress();
  }
  if (!restore(kept)) throw new Error(`${file.name} holds no text and changes of this page`);
}

const restored = { token: NaN }; // the token that a link names: its text may not be there yet

// Shows what a link or a file says; returns whether it says anything.
function restore(kept, token = kept?.view?.split?.("/")[4]) {
  if (typeof kept?.text !== "string" || !Array.isArray(kept.changes)) return false;
  if (!kept.changes.every((one) => one !== null && typeof one === "object")) return false;
  const { text, changes, more = [] } = kept,
    shown = SHOWN.includes(kept.shown) ? kept.shown : "after";
  if (!Array.isArray(more)) return false;
  if (JSON.stringify({ text, changes, more }) === JSON.stringify(question)) {
    passes.shown = shown;
    return true;
  }
  textBox.value = text;
  restored.token = Number(token);
  show({ text, changes, more }, shown);
  return true;
}

const actions = el(
  "div",
  { class: "choices" },
  action("Copy as Python", () => say("copied", copied(partOf("python", null, "after")))),
  action("Copy link", () => say("copied", copied(location.href))),
  action("Save", save),
  action("Open", () => fileBox.click()),
  fileBox,
  said,
);

hooks.keep = () => {
  const kept = encodeURIComponent(JSON.stringify({ ...question, shown: passes.shown }));
  return kept.length < 20_000 ? `/${kept}` : ""; // a longer text is not a part of the address
};
hooks.restore = (kept, token) => {
  try {
    restore(JSON.parse(decodeURIComponent(kept)), token);
  } catch {
    // an address that leads nowhere is left aside
  }
};
