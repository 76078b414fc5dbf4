"use strict";
// Both need JavaScript, so they show only where it runs.
const spoken = document.createElement("p"); // what a screen reader is to say
spoken.className = "spoken";
spoken.setAttribute("role", "status");
document.body.append(spoken);

for (const button of document.querySelectorAll(".copy button")) {
  button.hidden = false;
  const code = button.parentElement.querySelector("code");
  let waiting;
  button.addEventListener("click", async () => {
    let done = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch { // no permission, or a page that the browser does not trust: select it instead
      getSelection().selectAllChildren(code);
      done = document.execCommand("copy");
    }
    button.textContent = spoken.textContent = done ? "Copied" : "Selected";
    clearTimeout(waiting);
    waiting = setTimeout(() => { button.textContent = "Copy"; spoken.textContent = ""; }, 2000);
  });
}

for (const form of document.querySelectorAll(".filter")) {
  const section = form.closest("section");
  const cards = [...section.querySelectorAll(".card")].map((card) => ({
    card,
    words: card.textContent.toLowerCase(),
    rows: [...card.querySelectorAll(".rows tbody tr")].map((row) => [row, row.textContent.toLowerCase()]),
  }));
  const search = form.querySelector("input[type=search]");
  const levels = [...form.querySelectorAll("[name=level]")];
  const code = form.querySelector("[name=code]");
  const output = form.querySelector("output");
  const nothing = section.querySelector(".nothing");

  const apply = () => {
    const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const holds = (text) => asked.every((word) => text.includes(word));
    let shown = 0;
    for (const { card, words, rows } of cards) {
      const level = levels.find((box) => box.value === card.dataset.level);
      const fits = holds(words) && (level?.checked ?? true)
        && (!code?.value || code.value === card.dataset.code);
      card.parentElement.hidden = !fits;
      shown += fits;
      // Among many layers, only those asked for; all of them where the words stand elsewhere.
      const some = asked.length > 0 && rows.some(([, text]) => holds(text));
      for (const [row, text] of rows) row.hidden = some && !holds(text);
      if (rows.length) card.querySelector(".rows").open = some;
    }
    output.textContent = `${shown} of ${cards.length} ${output.dataset.noun}`;
    nothing.hidden = shown > 0;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  nothing.querySelector(".reset").addEventListener("click", () => {
    form.reset();
    apply();
    search.focus();
  });
  form.hidden = false;
  apply();
}
