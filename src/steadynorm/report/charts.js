"use strict";
// Colours that keep apart for most kinds of colour blindness, one set for each background.
const palettes = {
  light: ["#0b62b0", "#c8500a", "#0a7d5a", "#9c3c8b", "#8a6a00", "#4b5a6e", "#b3263c"],
  dark: ["#79b8ff", "#ff9f5a", "#4fd1a5", "#e79bd6", "#e3c14f", "#b3bfce", "#ff8597"],
};

// From sound to broken, as the cards have it.
const states = {
  light: ["#4b5a6e", "#0b62b0", "#a86e00", "#b3202f"],
  dark: ["#b3bfce", "#79b8ff", "#f0b95a", "#ff8b95"],
};

function config(width) {
  const css = getComputedStyle(document.documentElement);
  const color = (name) => css.getPropertyValue(name).trim();
  const font = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
  const ink = color("--ink"), soft = color("--soft"), grid = color("--grid");
  return {
    background: "transparent",
    font,
    view: { stroke: null },
    axis: {
      labelColor: soft, titleColor: soft, tickColor: grid, domainColor: soft, gridColor: grid,
      labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, labelOverlap: true, tickCount: 6,
    },
    legend: {
      labelColor: ink, titleColor: soft, labelFontSize: 12, titleFontSize: 12, orient: "top",
      direction: "horizontal", columns: Math.max(1, Math.floor(width / 150)), symbolType: "stroke",
      symbolStrokeWidth: 3, symbolOpacity: 1, title: null, labelLimit: 220, offset: 6,
    },
    header: { labelColor: ink, titleColor: soft },
    rule: { color: soft },
    text: { color: soft },
    range: {
      category: theme.dark ? palettes.dark : palettes.light,
      ordinal: theme.dark ? states.dark : states.light,
    },
  };
}

async function draw(figure) {
  const target = figure.querySelector(".chart");
  const spec = JSON.parse(figure.querySelector("script.spec").textContent);
  for (const { name, bind } of spec.params ?? []) { // what the reader chose outlives the drawing
    if (bind?.input && target.view) spec.params.find((p) => p.name === name).value = target.view.signal(name);
  }
  if (target.view) target.view.finalize();
  const result = await vegaEmbed(target, spec, {
    config: config(target.clientWidth), renderer: "svg", actions: false,
    tooltip: { disableDefaultStyle: true },
  });
  target.view = result.view;
  target.drawn = true;
}

const figures = [...document.querySelectorAll("figure:has(script.spec)")];
const redraw = () => Promise.all(figures.map(draw)).then(() => {
  document.documentElement.dataset.charts = "drawn";
});
theme.listeners.push(redraw);
let width = innerWidth;
let waiting;
addEventListener("resize", () => {
  if (innerWidth === width) return; // phones fire it when the address bar hides
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(redraw, 150);
});
redraw();
