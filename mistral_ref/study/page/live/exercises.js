// The course's exercises with the demonstration model: each asks for changes. The server says whether they do what it asks.

const EXERCISES = Object.entries(live.exercises);
const exerciseBox = el("section", { class: "card stack", "aria-label": "Exercises" });
const exercise = { name: live.exercise, done: new Set(), hasHint: false };

function beginExercise(name) {
  Object.assign(exercise, { name, hasHint: false });
  if (name === null) return drawExercise();
  const { text } = live.exercises[name];
  textBox.value = text;
  state.token = tokens.length - 1; // the last one, whatever the text
  show({ text, changes: [] }, "before");
}

function drawExercise() {
  exerciseBox.hidden = EXERCISES.length === 0;
  if (!exerciseBox.hidden) fill(exerciseBox, exerciseParts());
}

async function exerciseParts() {
  const { name } = exercise;
  const verdict =
    name === null ? null : await partOf("exercise", name, "after").catch((error) => ({ isDone: false, words: error.message }));
  if (verdict?.isDone) exercise.done.add(name);
  const numbers = el(
    "div",
    { class: "choices", role: "group", "aria-label": "Exercise" },
    EXERCISES.map(([other], index) =>
      choice(
        `exercise ${other}`,
        other === name,
        () => beginExercise(other === name ? null : other),
        exercise.done.has(other) ? `${index + 1} ✓` : index + 1,
      ),
    ),
  );
  if (name === null) return [el("h3", null, "Exercises of the course"), numbers];
  const { chapter, task, hint } = live.exercises[name],
    number = EXERCISES.findIndex(([other]) => other === name) + 1;
  return [
    el("h3", null, `Exercise ${number}, of chapter ${chapter}`),
    numbers,
    el("p", null, task),
    exercise.hasHint ? el("p", { class: "muted" }, hint) : hintButton(),
    el("p", { role: "status", class: verdict.isDone ? "right" : "muted" }, verdict.isDone && el("b", null, "Done. "), verdict.words),
  ];
}

function hintButton() {
  const onclick = () => {
    exercise.hasHint = true;
    drawExercise();
  };
  return el("button", { type: "button", class: "tiny", "data-key": "hint", onclick }, "A hint");
}
