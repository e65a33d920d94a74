// The changes: a list that is switched on and off, and an editor that starts from what is chosen in the view.

// What each kind of change asks for, beside the place of a step.
const CHANGES = {
  zero: ["set to 0", "place"],
  scale: ["multiply by", "place", "number"],
  set: ["set to", "place", "number"],
  add: ["add", "place", "number"],
  mean: ["set to the mean over the tokens", "place"],
  swap: ["exchange with another token", "place", "other"],
  patch: ["take from the pass of another text", "place", "text"],
  freeze: ["keep as it is without changes", "place"],
  window: ["move the window", "window"],
  theta: ["change theta", "theta"],
  bug: ["plant a bug", "bug"],
};
const changesBox = el("section", { class: "card stack", "aria-label": "Changes" });
const shownBox = el("div", { class: "choices shown", role: "group", "aria-label": "Which pass is shown" });

const isOn = ({ on }) => on !== false;
let rested = "after"; // which pass was shown when the last change was switched off

// Shows the passes with other changes. Without changes there is one pass; the first change shows the pass after it.
function change(changes) {
  const had = question.changes.some(isOn),
    has = changes.some(isOn);
  if (had && !has) rested = passes.shown;
  const first = changes.length > question.changes.length ? "after" : rested;
  show({ changes }, !has ? "before" : had ? passes.shown : first);
}

// The model has one window and one theta: another one takes the place of the one before.
const ONLY_ONE = ["window", "theta"];
function add(one) {
  const others = question.changes.filter(({ kind }) => kind !== one.kind || !ONLY_ONE.includes(kind));
  change([...others, one]);
}

// What a change is that the server cannot put into words.
function plainWords({ kind, on, ...fields }) {
  const name = Object.hasOwn(CHANGES, kind) ? CHANGES[kind][0] : JSON.stringify(kind);
  const values = Object.entries(fields).map(([field, value]) => `${field} ${typeof value === "string" ? value : JSON.stringify(value)}`);
  return [name, ...values].join(", ");
}

// The words of the changes that are made at a step, or at a head of it.
function changesAt(name, head) {
  const matches = (glob) => new RegExp(`^${glob.replace(/[.+^${}()|[\]\\]/g, "\\$&").replaceAll("*", ".*")}$`).test(name);
  return question.changes.flatMap((one, index) =>
    isOn(one) &&
    typeof one.step === "string" &&
    matches(one.step) &&
    (head === undefined || [undefined, null, head].includes(one.head))
      ? [passes.after.changes.words[index]].filter(Boolean)
      : [],
  );
}

function drawShown() {
  shownBox.hidden = !question.changes.some(isOn);
  shownBox.replaceChildren(
    el("span", { class: "muted small" }, "shown"),
    ...SHOWN.map((name) => choice(`shown ${name}`, name === passes.shown, () => showOther(name), name)),
  );
}

function drawChanges() {
  const { words, problems } = passes.after.changes;
  if (editing >= question.changes.length) stopEditing();
  const items = question.changes.map((one, index) => {
    const name = words[index] || plainWords(one);
    const set = (on) => change(question.changes.map((other, at) => (at === index ? { ...other, on } : other)));
    const box = el("input", {
      type: "checkbox",
      checked: isOn(one),
      "data-key": `on ${index}`,
      onchange: () => set(box.checked),
    });
    const act = (sign, key, label, onclick) =>
      el("button", { type: "button", "data-key": `${key} ${index}`, "aria-label": `${label}: ${name}`, title: label, onclick }, sign);
    return el(
      "li",
      { class: index === editing ? "edited" : "" },
      el("label", null, box, el("bdi", null, name)),
      act("✎", "edit", "Edit", () => edit(index)),
      act("✕", "remove", "Remove", () => {
        stopEditing();
        change(question.changes.filter((_, at) => at !== index));
      }),
      problems[index] !== undefined && el("p", { class: "problem small", role: "alert" }, problems[index]),
    );
  });
  changesBox.replaceChildren(
    el("h3", null, "Changes"),
    items.length === 0 ? "" : el("ul", { class: "changes" }, items),
    editor,
    actions,
  );
}
