// The ledger's filter. Without scripts the form stays hidden and every claim is shown.
// The choice is kept in the address, so that a filtered ledger can be linked to: ledger.html?part=lowrank&verdict=holds
(() => {
  const form = document.querySelector(".ledger-filter");
  const claims = [...document.querySelectorAll(".claim")];
  const count = form.querySelector("output");
  const fields = ["part", "verdict"].map((name) => form.elements[name]);

  function show() {
    const query = new URLSearchParams();
    for (const field of fields) if (field.value) query.set(field.name, field.value);
    let shown = 0;
    for (const claim of claims) {
      const fits = fields.every((field) => !field.value || claim.dataset[field.name] === field.value);
      claim.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown === claims.length ? `All ${shown} claims` : `${shown} of ${claims.length} claims`;
    return query;
  }

  const asked = new URLSearchParams(location.search);
  for (const field of fields) {
    const value = asked.get(field.name);
    if ([...field.options].some((option) => option.value === value)) field.value = value;
  }
  show();
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    const query = show().toString();
    history.replaceState(null, "", query ? `?${query}` : location.pathname);
  });
  form.addEventListener("reset", () => setTimeout(() => form.dispatchEvent(new Event("input"))));

  // A link to one claim shows it, whatever the filter.
  function unhide() {
    const claim = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (claim?.hidden) form.reset();
    claim?.scrollIntoView();
  }
  window.addEventListener("hashchange", unhide);
  if (location.hash) unhide();
})();
