// The text: typed or pasted, with its tokens, and the merges that made the one that is chosen.

const textBox = el(
  "textarea",
  {
    rows: 2,
    spellcheck: "false",
    "aria-label": "Text",
    "data-key": "text",
    placeholder: "Type or paste a text",
    oninput: () => type(textBox.value),
  },
  question.text,
);
const problem = el("p", { class: "problem", role: "alert", hidden: true });
const status = el("p", { class: "status small muted", role: "status" });
const bar = el("progress", { "aria-label": "The pass", hidden: true });
// On a narrow screen the changes stand below the view.
const toChanges = el(
  "button",
  { type: "button", class: "tiny narrow", "data-key": "to changes", onclick: () => kindField.focus() },
  "Change something ↓",
);
const merging = el("div", { class: "merges small", "aria-live": "polite" });

const MOST_TYPED = 200_000; // characters: the server takes a megabyte
function type(text) {
  if (text.length > MOST_TYPED) return showProblem(`The text is too long: at most ${grouped(MOST_TYPED)} characters.`);
  drawTyped(text);
  show({ text });
}

// The tokens of what is typed, while its pass is not there yet.
async function drawTyped(text) {
  let typed;
  try {
    typed = await ask("tokens", { text });
  } catch {
    return; // the pass says it
  }
  if (text !== question.text || bar.hidden) return;
  const typedToken = ({ piece }, index) => el("span", null, pieceText(piece), el("small", null, index));
  withButton = typed.slice(0, fillStrip(typed, typedToken));
  tokenStrip.scrollLeft = tokenStrip.scrollWidth;
}

function showProblem(text) {
  problem.hidden = !text;
  problem.textContent = text;
}

let poll = null,
  begun = 0,
  seconds = live.seconds; // that the newest question took
function showBusy(isBusy) {
  clearInterval(poll);
  bar.hidden = !isBusy;
  if (!isBusy) {
    seconds = (performance.now() - begun) / 1e3;
    status.textContent = `computed in ${duration(seconds)}`;
    return;
  }
  begun = performance.now();
  bar.removeAttribute("value");
  poll = setInterval(async () => {
    try {
      const place = await ask("place");
      if (bar.hidden) return;
      status.textContent = place ? `step ${place[0]} of ${place[1]}` : "waiting for another computation";
      if (place) [bar.value, bar.max] = place;
    } catch {
      // the server has gone: the page says so
    }
  }, 250);
}

// How the word was made that the chosen token is a part of.
let merged = "";
async function drawMerges() {
  const { token } = state,
    { text } = question,
    key = JSON.stringify([text, token]);
  if (token >= tokens.length - question.more.length) {
    merging.replaceChildren(el("span", { class: "muted" }, placeNodes(start + token), " has been chosen to follow the text"));
    merged = "";
    return;
  }
  if (key === merged) return;
  merged = key;
  try {
    const { states, why } = await ask("merges", { index: token });
    if (key !== merged) return;
    const isByte = states.length > 0 && !states.at(-1).includes(pieceAt(start + token));
    const words = why ? ` ${why}` : isByte ? " is a byte of a character that is no token, in " : " is made of: ";
    merging.replaceChildren(
      el("span", { class: "muted" }, placeNodes(start + token), words),
      ...(isByte ? states.slice(-1) : states).map((parts, index) => [
        index > 0 && el("span", { class: "muted", "aria-label": "then" }, " → "),
        el("span", { class: "state" }, parts.map((one) => pieceText(one))),
      ]).flat().filter(Boolean),
    );
  } catch {
    merging.replaceChildren();
  }
}

tokenStrip.before(el("div", { class: "typed" }, textBox, el("div", { class: "doing" }, status, bar, toChanges)), problem);
tokenStrip.after(merging);
