// A list of the book's published versions, beside this one on the server. Only a build that is published loads this script.
(() => {
  const root = new URL(document.documentElement.dataset.content_root, location.href);
  const list = new URL("../versions.json", root);

  fetch(list).then((answer) => (answer.ok ? answer.json() : [])).then((versions) => {
    const here = root.pathname.replace(/\/$/, "").split("/").pop();
    if (versions.length < 2 && versions.includes(here)) return;
    const label = document.createElement("label");
    label.className = "book-versions";
    label.textContent = "Version ";
    const select = document.createElement("select");
    for (const version of versions) select.add(new Option(version, version, version === here, version === here));
    const page = location.pathname.slice(root.pathname.length);
    select.addEventListener("change", async () => {
      const same = new URL(`../${select.value}/${page}`, root);
      const found = await fetch(same, { method: "HEAD" }).then((answer) => answer.ok, () => false);
      location.href = found ? same : new URL(`../${select.value}/index.html`, root);
    });
    label.append(select);
    document.querySelector(".bd-sidebar-primary .sidebar-primary__section, .sidebar-primary-item").append(label);
  }).catch(() => {});
})();
