// The editor of a change. It starts from what is chosen in the view, or from a change that is in the list.

// A field that the reader has filled stays until the change is added; the others follow the view.
const filled = {};
const field = (name, { words = name, ...attributes } = {}) =>
  el("input", {
    type: "text",
    "aria-label": words,
    "data-key": `edit ${words}`,
    autocomplete: "off",
    spellcheck: "false",
    placeholder: "all",
    oninput: (event) => {
      filled[name] = event.target.value;
      drawEditor();
    },
    ...attributes,
  });
const fields = {
  step: field("step", { placeholder: "a step, or layers.*.heads", list: "steps" }),
  token: field("token"),
  head: field("head"),
  neuron: field("neuron"),
  number: field("number", { placeholder: "0.5", value: "2" }),
  other: field("other", { words: "other token", placeholder: "a token" }),
  text: field("text", { words: "other text", placeholder: "a text of as many tokens" }),
  window: field("window", { placeholder: "all keys" }),
  theta: field("theta", { placeholder: "a number" }),
  bug: el(
    "select",
    { "aria-label": "bug", "data-key": "edit bug", onchange: () => drawEditor() },
    Object.entries(live.bugs).map(([name]) => el("option", { value: name }, name)),
  ),
};
const PLACE = ["step", "token", "head", "neuron"];
const stepNames = el(
  "datalist",
  { id: "steps" },
  [...page.steps.map(({ name }) => name), ...Object.keys(page.kinds).filter((kind) => !isEnd(kind)).map((kind) => `layers.*.${kind}`)].map(
    (value) => el("option", { value }),
  ),
);
const kindField = el(
  "select",
  { "aria-label": "What to change", "data-key": "edit kind", onchange: () => drawEditor() },
  Object.entries(CHANGES)
    .filter(([kind]) => kind !== "bug" || Object.keys(live.bugs).length)
    .map(([kind, [words]]) => el("option", { value: kind }, words)),
);
const editorFields = el("div", { class: "fields" });
const submitButton = el("button", { type: "submit", "data-key": "add change" });
const doneButton = el("button", { type: "button", "data-key": "edited", onclick: () => (stopEditing(), drawEditor(), drawChanges()) }, "Done");
const editor = el(
  "form",
  {
    class: "editor",
    "aria-label": "A change",
    onsubmit: (event) => {
      event.preventDefault();
      const one = edited();
      if (editing !== null) return change(question.changes.map((other, at) => (at === editing ? one : other)));
      followView();
      add(one);
    },
  },
  kindField,
  editorFields,
  el("div", { class: "submit" }, submitButton, doneButton),
  stepNames,
);

let editing = null; // the number of the change in the list that the editor shows
function followView() {
  for (const name of PLACE) {
    delete filled[name];
    fields[name].value = "";
  }
}
function stopEditing() {
  if (editing !== null) followView();
  editing = null;
}
function edit(index) {
  const { kind, ...one } = question.changes[index];
  if (!Object.hasOwn(CHANGES, kind)) return;
  editing = index;
  kindField.value = kind;
  for (const name of PLACE) filled[name] = "";
  for (const [name, value] of Object.entries(one)) {
    if (!Object.hasOwn(fields, name)) continue;
    fields[name].value = filled[name] = value === null ? "" : String(value);
  }
  for (const name of PLACE) fields[name].value = filled[name];
  drawEditor();
  drawChanges();
  (editorFields.querySelector("[data-key='edit number'], [data-key='edit other text']") ?? editorFields.querySelector("input"))?.focus();
}

// What is chosen in the view: a step and a head of it; in the views of heads, what these heads have gathered.
function chosenPlace() {
  const name = ["attention", "heads"].includes(state.view) ? nameOf("heads", state.layer) : state.name;
  const step = stepByName.get(name);
  return { step: name, head: headAxis(step) ? String(axisHead(step, state.head)) : "" };
}

const fieldLabel = (name, node, ...more) => el("label", null, el("span", null, name), node, more);
const only = (name) =>
  el("button", {
    type: "button",
    class: "tiny",
    "data-key": `this ${name}`,
    onclick: (event) => {
      fields[name].value = filled[name] = event.target.value;
    },
  });
const onlyThis = { token: only("token"), head: only("head"), neuron: only("neuron") };
const labels = Object.fromEntries(Object.entries(fields).map(([name, node]) => [name, fieldLabel(node.ariaLabel, node, onlyThis[name] ?? [])]));
const bugWords = el("p", { class: "small muted" }),
  otherWords = el("p", { class: "small muted", role: "status" });
// What stands in the editor, by what a kind of change asks for.
const editorRows = {
  place: [labels.step, el("div", { class: "three" }, labels.token, labels.head, labels.neuron)],
  text: [labels.text, otherWords],
  bug: [labels.bug, bugWords],
};

// The buttons below the fields of a place, which put in what is chosen in the view; a step without heads has no field for one.
function drawPlace({ step: name, head }) {
  const step = stepByName.get(fields.step.value.replace("*", "0")),
    last = page.kinds[stepByName.get(name).kind].axes.at(-1),
    chosen = { token: state.token, head: head || undefined, neuron: picked.get(name) };
  labels.head.hidden = step !== undefined && !headAxis(step);
  for (const [field, button] of Object.entries(onlyThis)) {
    button.hidden = chosen[field] === undefined;
    button.value = chosen[field];
    button.textContent = `only ${field === "neuron" ? `${last.replaceAll("_", " ")} ` : ""}${chosen[field]}`;
    button.ariaLabel = `only the ${field} that is chosen, ${chosen[field]}`;
  }
}

let drawnKind = null;
function drawEditor() {
  const kind = kindField.value,
    [, ...asked] = CHANGES[kind],
    place = chosenPlace(),
    { windows, theta } = passes.before.config;
  if (filled.step === undefined) {
    fields.step.value = place.step;
    if (filled.head === undefined) fields.head.value = place.head;
  }
  if (filled.text === undefined) fields.text.value = question.text;
  if (kind !== drawnKind) editorFields.replaceChildren(...asked.flatMap((name) => editorRows[name] ?? labels[name]));
  drawnKind = kind;
  drawPlace(place);
  if (asked.includes("text")) countOther();
  const now = windows[state.layer] === null ? "all" : grouped(windows[state.layer]);
  labels.window.firstChild.textContent = `how many keys a query sees; without changes ${now}`;
  labels.theta.firstChild.textContent = `theta; without changes ${grouped(theta)}`;
  bugWords.textContent = live.bugs[fields.bug.value];
  submitButton.textContent = editing === null ? "Add this change" : "Change it";
  doneButton.hidden = editing === null;
}

// Says of the other text, while it is typed, whether it has as many tokens as the text.
async function countOther() {
  const text = fields.text.value,
    expected = tokens.length - question.more.length;
  const found = await ask("tokens", { text }).then((typed) => typed.length, () => null);
  if (text !== fields.text.value) return;
  otherWords.textContent =
    found === null
      ? ""
      : text === question.text
        ? "This is the text itself: put other words into it."
        : found === expected
          ? `${counted(found, "token")}, as many as the text`
          : `${counted(found, "token")}; expected ${expected}, as many as the text`;
}

// What the fields say, as plain data. Whether it can be done the server says, beside the change.
function edited() {
  const kind = kindField.value,
    [, ...asked] = CHANGES[kind],
    found = { kind };
  const number = (text) => (text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text);
  for (const name of asked.includes("place") ? PLACE.slice(1) : [])
    if (!labels[name].hidden && fields[name].value.trim() !== "") found[name] = number(fields[name].value);
  if (asked.includes("place")) found.step = fields.step.value.trim();
  if (asked.includes("number")) found.number = number(fields.number.value);
  if (asked.includes("other")) found.other = number(fields.other.value);
  if (asked.includes("text")) found.text = fields.text.value;
  if (asked.includes("bug")) found.bug = fields.bug.value;
  if (asked.includes("window")) found.window = fields.window.value.trim() === "" ? null : number(fields.window.value);
  if (asked.includes("theta")) found.theta = number(fields.theta.value);
  return found;
}
