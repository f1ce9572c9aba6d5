// Draw every chart of the page with the bundled Vega, fitted to the width there is.
for (const box of document.querySelectorAll(".vega-chart")) {
  const spec = JSON.parse(box.nextElementSibling.textContent);
  const narrow = box.clientWidth < 600;
  const config = {
    legend: { orient: "bottom", columns: narrow ? 3 : 5 },
    axis: { titleLimit: box.clientWidth - 60, titleFontSize: narrow ? 9 : 11 },
    axisY: { titleLimit: 300 },
  };
  spec.autosize = { type: "fit-x", contains: "padding" };
  window.vegaEmbed(box, spec, { actions: false, renderer: "svg", ast: true, config });
}
