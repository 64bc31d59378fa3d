
"use strict";
// Hides the kernels that do not contain what is typed; without this script the page shows them all.
const box = document.getElementById("filter");
const input = box.querySelector("input");
const found = box.querySelector("output");
const kernels = [...document.querySelectorAll("li[id]")].map((li) => [li, li.textContent.toLowerCase()]);
const layers = [...document.querySelectorAll("details")];
const unfolded = layers.map((layer) => layer.open);
box.hidden = false;
input.addEventListener("input", () => {
  const wanted = input.value.trim().toLowerCase();
  let count = 0;
  for (const [li, text] of kernels) {
    li.hidden = !text.includes(wanted);
    count += li.hidden ? 0 : 1;
  }
  layers.forEach((layer, i) => {
    layer.open = wanted ? true : unfolded[i];
    layer.hidden = !layer.querySelector("li[id]:not([hidden])");
  });
  found.textContent = wanted ? `${count} of ${kernels.length}` : "";
});
// A link from the strip leads into a layer that may be folded.
window.addEventListener("hashchange", () => {
  const target = document.getElementById(location.hash.slice(1));
  target?.closest("details")?.setAttribute("open", "");
  target?.scrollIntoView();
});
