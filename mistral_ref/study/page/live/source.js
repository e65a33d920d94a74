// Where the live page has its passes from: it asks its server, and keeps the answers to the question that is shown.

const { live } = page;
const reader = crypto.randomUUID(); // this tab
const question = { text: live.text, changes: [], more: [] }; // more: the ids of tokens that follow the text
const SHOWN = ["before", "after", "difference"];
// What is known of each pass, which one is shown, and the question that they belong to.
const passes = { before: page, after: page, shown: "before", question: { ...question } };
let answers = new Map(); // the parts of these passes that have been asked for, as promises
let wanted = new Map(); // those that the view asks for: they are asked for at once with the next question

class Stale extends Error {} // something else has been asked for meanwhile
class Gone extends Error {} // the server does not answer

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
    throw new Gone("The server does not answer, so this cannot be computed.");
  }
  showServer(true);
  if (response.stale) throw new Stale("…");
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

// What can wait is asked for by itself: whatever else is asked for comes first.
const askAlone = async (one) => (await ask("parts", { parts: [one], canWait: true }))[0];

// A part of one of the passes: the views ask for those of the pass that is shown.
function partOf(name, of, shown, askFor = askTogether) {
  const key = JSON.stringify([name, of, shown]);
  if (!answers.has(key)) {
    const kept = answers,
      answer = askFor({ name, of, shown }).then(valueOf);
    answer.catch(() => kept.delete(key)); // what failed may be asked for again
    kept.set(key, answer);
  }
  return answers.get(key);
}
part = (name, of = null) => {
  wanted.set(JSON.stringify([name, of]), { name, of });
  return partOf(name, of, passes.shown);
};
howToKeep = () => ["They are too many to send: a shorter text has all of them."];
hooks.was = async (name) => (passes.shown === "difference" ? partOf(name, null, "before") : null);

let isBehind = false; // whether another question has been asked than the one whose passes are shown

// Asks another question, and shows its passes once they are there. The parts that the view has asked for come with them.
// Other changes are another place to which the browser's Back leads.
let turn = 0;
async function show(next, shown = passes.shown, isPlace = next.changes !== undefined) {
  Object.assign(question, next.text === undefined ? {} : { more: [] }, next); // another text has no tokens behind it yet
  isBehind = true;
  const mine = ++turn,
    asked = ["before", "after"].map((shown) => ({ name: "about", of: null, shown }));
  asked.push(...[...wanted.values()].map((one) => ({ ...one, shown })));
  showBusy(true);
  try {
    const found = await ask("parts", { parts: asked });
    if (mine !== turn) return;
    [passes.before, passes.after] = found.slice(0, 2).map(valueOf);
    passes.shown = shown;
    passes.question = { ...question };
    isBehind = false;
    answers = new Map(
      asked.map(({ name, of, shown }, index) => [JSON.stringify([name, of, shown]), answered(found[index])]),
    );
    showProblem("");
    showBusy(false);
    showPass(isPlace);
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof Stale) return show({}, shown, isPlace); // an older question of this page has come to the server later
    isBehind = false;
    Object.assign(question, passes.question); // the views go on with what is shown
    showProblem(error.message);
    showBusy(false);
    if (error instanceof Gone) return; // what is there stays
    answers = new Map(); // some may have been asked for with the question that failed
    draw();
  }
}

function answered(found) {
  const answer = (async () => valueOf(found))();
  answer.catch(() => {}); // it is shown where it is asked for
  return answer;
}

function showPass(isPlace = false) {
  const wasLast = state.token === tokens.length - 1;
  load(passes.shown === "before" ? passes.before : passes.after);
  if (restored.token < tokens.length) state.token = restored.token;
  else if (wasLast || state.token >= tokens.length) state.token = tokens.length - 1;
  restored.token = NaN;
  wanted = new Map();
  history[isPlace ? "pushState" : "replaceState"](null, "", address());
  draw();
}

function showOther(shown) {
  passes.shown = shown;
  showPass();
}
