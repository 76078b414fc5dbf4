"use strict";
// Runs before the body is drawn, so that a dark page never flashes white.
const theme = {
  system: matchMedia("(prefers-color-scheme: dark)"),
  listeners: [],
  choice: "system",
  get dark() {
    return this.choice === "dark" || (this.choice === "system" && this.system.matches);
  },
  apply() {
    document.documentElement.dataset.theme = this.dark ? "dark" : "light";
    for (const listener of this.listeners) listener();
  },
  choose(choice) {
    this.choice = choice;
    try { localStorage.setItem("steadynorm-theme", choice); } catch { /* private browsing */ }
    this.apply();
  },
};
try {
  const stored = localStorage.getItem("steadynorm-theme");
  if (["system", "light", "dark"].includes(stored)) theme.choice = stored;
} catch { /* a page opened from a file may have no storage */ }
theme.apply();
theme.system.addEventListener("change", () => theme.apply());
addEventListener("DOMContentLoaded", () => {
  for (const input of document.querySelectorAll(".theme input")) {
    input.checked = input.value === theme.choice;
    input.addEventListener("change", () => theme.choose(input.value));
  }
});
