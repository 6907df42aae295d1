"use strict";
// A tooltip over the charts, and a legend that switches runs off and on. Without it all is shown.
const tip = document.getElementById("tip");

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, i) => {
    if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i;
  });
  return best;
}

function lines(chart, update) {
  return chart.series
    .filter(series => !document.querySelector(`button[data-run="${series.run}"][aria-pressed="false"]`))
    .map(series => {
      const i = nearest(series.x, update);
      return { update: series.x[i], text: `${series.label}: ${series.y[i]}` };
    });
}

for (const svg of document.querySelectorAll("svg.chart")) {
  const chart = JSON.parse(svg.dataset.chart);
  const [left, right, width] = chart.box;
  const [first, last] = chart.x;
  const cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", event => {
    const place = svg.getBoundingClientRect();
    const x = Math.min(Math.max((event.clientX - place.left) / place.width * width, left), right);
    const found = lines(chart, first + (x - left) / (right - left) * (last - first));
    if (!found.length) return;
    const at = left + (found[0].update - first) / (last - first) * (right - left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(...[`update ${found[0].update.toLocaleString("en")}`, ...found.map(line => line.text)]
      .map(text => Object.assign(document.createElement("span"), { textContent: text })));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const besides = event.clientX + 16 + box.width < innerWidth ? event.clientX + 16 : event.clientX - 16 - box.width;
    tip.style.left = `${Math.max(4, besides)}px`;
    tip.style.top = `${Math.max(4, event.clientY - box.height - 12)}px`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    tip.hidden = true;
  });
}

for (const button of document.querySelectorAll("button[data-run]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const series of document.querySelectorAll(`.series[data-run="${button.dataset.run}"]`)) {
      series.classList.toggle("off", !shown);
    }
  });
}
