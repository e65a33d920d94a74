// Everything is there: the page is drawn.

readAddress();
draw();

// For the curious, in the browser's console.
Object.assign(globalThis, {
  page,
  ringAt,
  ropeScore,
  reach,
  values: async (name) => numbersOf(await part("values", name)),
});
