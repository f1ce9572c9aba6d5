// Draw every chart of the page with the bundled Vega, fitted to the width there is. All widths are taken before the first
// chart is drawn: a drawing in progress can widen the column for a moment, and the charts after it would be drawn for that.
const boxes = [...document.querySelectorAll(".vega-chart")].map((box) => [box, box.clientWidth]);
for (const [box, width] of boxes) {
  const spec = JSON.parse(box.nextElementSibling.textContent);
  const narrow = width < 600;
  const config = {
    legend: { orient: "bottom", columns: narrow ? 3 : 5 },
    axis: { titleLimit: width - 60, titleFontSize: narrow ? 9 : 11 },
    axisY: { titleLimit: 300 },
  };
  spec.width = width;
  spec.autosize = { type: "fit-x", contains: "padding" };
  window.vegaEmbed(box, spec, { actions: false, renderer: "svg", ast: true, config });
}
