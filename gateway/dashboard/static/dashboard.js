// Charts of the last minutes, and the banner that says that the dashboard does not answer.
"use strict";

const EVERY_MS = 2000;
const NAMES = {waiting: "waiting", in_flight: "in flight", rows_per_s: "rows/s", p50_ms: "p50", p95_ms: "p95"};

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const time = (at, length) => new Date(at * 1000).toTimeString().slice(0, length);
const dark = matchMedia("(prefers-color-scheme: dark)");

function options(names, width) {
  const axis = {stroke: colour("--soft"), grid: {stroke: colour("--line"), width: 1}, ticks: {show: false}};
  const lines = names.map((name, at) => ({label: NAMES[name] || name, stroke: colour(`--line-${at + 1}`), width: 2, points: {show: false}}));
  const times = {...axis, space: 64, values: (u, ticks, at, space, step) => ticks.map((tick) => time(tick, step < 60 ? 8 : 5))};
  return {
    width, height: 140, series: [{label: "time", value: (u, at) => at ? time(at, 8) : "--"}, ...lines],
    axes: [times, {...axis, size: 48}], cursor: {drag: {x: false, y: false}},
    scales: {y: {range: (u, low, high) => [0, Math.max(1, (high || 0) * 1.1)]}},
  };
}

function draw(figure, history) {
  const names = figure.dataset.chart.split(" ");
  const data = [history.series[0], ...names.map((name) => history.series[1 + history.names.indexOf(name)])];
  if (figure.chart && figure.drawnDark === dark.matches) {
    figure.chart.setData(data);
    return;
  }
  figure.chart?.destroy();
  figure.drawnDark = dark.matches;
  figure.chart = new uPlot(options(names, figure.clientWidth - 24), data, figure);
}

async function refresh() {
  const charts = document.querySelector("[data-history]");
  if (!charts || document.hidden) return;
  try {
    const answer = await fetch(charts.dataset.history);
    if (!answer.ok) return;
    const history = await answer.json();
    charts.querySelectorAll("figure").forEach((figure) => draw(figure, history));
  } catch {
    // The banner says it already: the page itself is fetched as often.
  }
}

document.addEventListener("htmx:before:request", (event) => {
  if (document.hidden) event.preventDefault();
});
document.addEventListener("htmx:error", () => { document.getElementById("away").hidden = false; });
document.addEventListener("htmx:after:request", () => { document.getElementById("away").hidden = true; });
dark.addEventListener("change", refresh);
addEventListener("resize", () => {
  document.querySelectorAll("figure").forEach((figure) => figure.chart?.setSize({width: figure.clientWidth - 24, height: 140}));
});
setInterval(refresh, EVERY_MS);
refresh();
