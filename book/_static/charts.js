// Draw every chart of the page with the bundled Vega, in the page's colours and fitted to the width there is.
//
// A chart is drawn again when the reader switches between light and dark, turns the phone, or prints. All widths are taken
// before the first chart is drawn: a drawing in progress can widen the column for a moment.
(() => {
  // Charts are made for a white page, darkest colour first. On a dark page each colour has a partner of the opposite lightness, so the
  // order by lightness, which survives greyscale, is kept.
  const ON_DARK = {
    "#440154": "#fde725", "#472c7a": "#c9e34a", "#3b518b": "#8fd858", "#2c718e": "#55c98a",
    "#21908d": "#3fb8b0", "#27ad81": "#58a6cf", "#5cc863": "#8f97dd", "#aadc32": "#b487d0",
    black: "#f0f0f0",
  };

  const boxes = [...document.querySelectorAll(".vega-chart")];
  const specs = boxes.map((box) => box.nextElementSibling.textContent); // before hints come between
  let views = [];

  function ink(dark) {
    const text = dark ? "#d5dae0" : "#2b2f36";
    const grid = dark ? "#3a4048" : "#dddddd";
    return {
      background: "transparent",
      view: { stroke: grid },
      axis: { labelColor: text, titleColor: text, gridColor: grid, domainColor: text, tickColor: text },
      legend: { labelColor: text, titleColor: text, orient: "bottom" },
      title: { color: text },
      point: { stroke: dark ? "#000000" : "#333333", strokeWidth: 0.6 },
    };
  }

  async function draw(dark) {
    const widths = boxes.map((box) => box.clientWidth);
    views.forEach((view) => view.finalize());
    views = [];
    for (const [k, box] of boxes.entries()) {
      const colours = dark ? specs[k].replace(/"(#[0-9a-f]{6}|black)"/g, (all, name) => `"${ON_DARK[name] ?? name}"`) : specs[k];
      const spec = JSON.parse(colours);
      const width = widths[k];
      const narrow = width < 600;
      const config = ink(dark);
      config.legend.columns = width < 420 ? 2 : narrow ? 3 : 5;
      Object.assign(config.axis, { titleLimit: width - 60, titleFontSize: narrow ? 9 : 11 });
      config.axisY = { titleLimit: 300 };
      spec.width = width;
      spec.autosize = { type: "fit-x", contains: "padding" };
      if (box.closest(".welcome")) { // the first page fits one screen
        if (window.innerWidth < 640) spec.height = 140;
        config.legend.title = null;
        config.legend.columns = narrow ? 3 : 5; // its names are short
      }
      delete spec.config;
      for (const param of spec.params ?? []) {
        if (param.bind !== "scales") continue;
        // a wheel or a finger that passes over a chart scrolls the page
        param.select.zoom = "wheel![event.ctrlKey || event.metaKey]";
        param.select.translate = "[pointerdown[event.pointerType === 'mouse'], window:pointerup] > window:pointermove!";
      }
      const result = await window.vegaEmbed(box, spec, {
        actions: false, renderer: "svg", ast: true, config, tooltip: { theme: dark ? "dark" : "light" },
      });
      views.push(result);
    }
    document.documentElement.dataset.chartsDrawn = dark ? "dark" : "light";
  }

  for (const box of boxes) {
    const hint = document.createElement("p");
    hint.className = "vega-hint";
    hint.textContent = "Point at a mark for its numbers. Drag to move, Ctrl and wheel to zoom, double click to reset.";
    box.after(hint);
  }

  const isDark = () => document.documentElement.dataset.theme === "dark";
  let queue = draw(isDark());
  const again = (dark) => { queue = queue.then(() => draw(dark)); };

  new MutationObserver(() => again(isDark())).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar changes the height only
    width = window.innerWidth;
    again(isDark());
  });
})();
