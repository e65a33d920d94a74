// Where the live page has its passes from: it asks its server, and keeps the answers of the text that is shown.

const { live } = page;
const question = { text: live.text };
const reader = crypto.randomUUID(); // this tab
let answers = new Map(); // the parts of the passes of `question` that have been asked for, as promises
let wanted = new Map(); // those that were asked for since the page was drawn: they are asked for at once with a new text

class Stale extends Error {} // something else has been asked for meanwhile

async function ask(what, more) {
  let response;
  try {
    response = await fetch(what, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ reader, ...question, ...more }),
    });
    response = await response.json();
  } catch {
    showServer(false);
    throw new Error("The server does not answer, so this cannot be computed.");
  }
  showServer(true);
  if (response.stale) throw new Stale("Something else has been asked for meanwhile.");
  if (response.error !== undefined) throw new Error(response.error);
  return response.answer;
}

const valueOf = ({ value, error }) => {
  if (error !== undefined) throw new Error(error);
  return value;
};

// One question for all that is asked for in the same turn of the script.
let together = [];
function askTogether(one) {
  return new Promise((resolve, reject) => {
    together.push({ one, resolve, reject });
    if (together.length > 1) return;
    queueMicrotask(async () => {
      const asked = together;
      together = [];
      try {
        const found = await ask("parts", { parts: asked.map(({ one }) => one) });
        asked.forEach(({ resolve }, index) => resolve(found[index]));
      } catch (error) {
        asked.forEach(({ reject }) => reject(error));
      }
    });
  });
}

function partOf(name, of, shown) {
  const one = { name, of, shown },
    key = JSON.stringify(one);
  wanted.set(key, one);
  if (!answers.has(key)) {
    const kept = answers,
      answer = askTogether(one).then(valueOf);
    answer.catch(() => kept.delete(key)); // what failed may be asked for again
    kept.set(key, answer);
  }
  return answers.get(key);
}
part = (name, of) => partOf(name, of, passes.shown);
howToKeep = () => ["They are too many to send."];

// The passes of the question: what is known of each, and which one is shown.
const passes = { before: page, shown: "before" };

// Asks for another text, and shows it once its pass is there.
let turn = 0;
async function show(next) {
  Object.assign(question, next);
  const mine = ++turn,
    asked = [{ name: "about", shown: "before" }, ...wanted.values()];
  showBusy(true);
  try {
    const found = await ask("parts", { parts: asked });
    if (mine !== turn) return;
    passes.before = valueOf(found[0]);
    answers = new Map(asked.map((one, index) => [JSON.stringify(one), answered(found[index])]));
    showProblem("");
    showPass();
  } catch (error) {
    if (!(error instanceof Stale) && mine === turn) showProblem(error.message);
  }
  if (mine === turn) showBusy(false);
}

function answered(found) {
  const answer = (async () => valueOf(found))();
  answer.catch(() => {}); // it is shown where it is asked for
  return answer;
}

function showPass() {
  const wasLast = state.token === tokens.length - 1;
  load(passes[passes.shown]);
  if (wasLast || state.token >= tokens.length) state.token = tokens.length - 1;
  wanted = new Map();
  history.replaceState(null, "", address());
  draw();
}
