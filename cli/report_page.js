"use strict";
// Replaces the drawn pictures by ones that answer: values under the pointer, builds picked by a click in the legend.
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const options = {
  mode: "vega-lite",
  renderer: "svg",
  actions: false,
  ast: true, // expressions are interpreted: the page's policy forbids to compile them
  defaultStyle: false,
  tooltip: { disableDefaultStyle: true, theme: "custom" },
};
pictures.forEach((spec, i) => {
  vegaEmbed(`#picture-${i}`, spec, options).then(
    ({ view }) => view.container().setAttribute("data-drawn", ""),
    (error) => console.error(error),
  );
});
