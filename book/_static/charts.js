// Draw every chart of the page with the bundled Vega; readers with a keyboard or a screen reader get the description.
for (const box of document.querySelectorAll(".vega-chart")) {
  const spec = JSON.parse(box.nextElementSibling.textContent);
  window.vegaEmbed(box, spec, { actions: false, renderer: "svg", ast: true });
}
