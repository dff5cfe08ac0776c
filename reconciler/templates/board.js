"use strict";
// Sorts and hides rows of the board, keeps ages right, and, where a server is behind it, asks for the newest rows.
// What is chosen stands in the address, so that a view can be passed on.
(() => {
  const at = id => document.getElementById(id);
  const chosen = new URLSearchParams(location.hash.slice(1));
  const find = at("find");
  const picked = new Set((chosen.get("outcome") || "").split(",").filter(Boolean));
  let order = (chosen.get("sort") || "").split(":").filter(Boolean);
  const texts = new WeakMap();
  const rows = () => [...at("rows").rows];
  const text = row => {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  };

  function ages() {
    const units = [["d", 86400], ["h", 3600], ["min", 60]];
    for (const time of document.querySelectorAll("#rows time")) {
      const seconds = Math.max(0, (Date.now() - Date.parse(time.dateTime)) / 1000);
      const unit = units.find(([, size]) => seconds >= 2 * size) || ["s", 1];
      const said = `${Math.floor(seconds / unit[1])} ${unit[0]} ago`;
      if (time.textContent !== said) time.textContent = said;
    }
  }

  function show() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows()) {
      const fits = (!picked.size || picked.has(row.dataset.outcome)) && words.every(word => text(row).includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    for (const button of document.querySelectorAll(".pick"))
      button.setAttribute("aria-pressed", picked.has(button.dataset.outcome));
    const all = rows().length;
    const said = shown === all ? `${all} target${all === 1 ? "" : "s"}` : `${shown} of ${all} targets`;
    if (at("said").textContent !== said) at("said").textContent = said;
    const kept = new URLSearchParams();
    if (find.value) kept.set("find", find.value);
    if (picked.size) kept.set("outcome", [...picked].join(","));
    if (order.length) kept.set("sort", order.join(":"));
    history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname + location.search);
  }

  function sort() {
    const heads = [...document.querySelectorAll("#board thead th")];
    heads.forEach((head, number) => {
      const way = order[0] === String(number) ? order[1] : null;
      if (way) head.setAttribute("aria-sort", way);
      else head.removeAttribute("aria-sort");
    });
    if (!order.length || !heads[order[0]]) return;
    const column = Number(order[0]);
    const numbers = heads[column].dataset.sort !== "text";
    const key = row => {
      const cell = row.cells[column];
      const value = cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value;
      return numbers ? Number(value) : value;
    };
    const sign = order[1] === "descending" ? -1 : 1;
    const keyed = rows().map(row => [key(row), row]);
    keyed.sort(([one], [other]) => sign * (numbers ? one - other : one < other ? -1 : one > other ? 1 : 0));
    at("rows").append(...keyed.map(([, row]) => row));
  }

  document.querySelectorAll("#board thead th[data-sort]").forEach((head, number) => {
    if (!head.dataset.sort) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.textContent = head.textContent;
    button.addEventListener("click", () => {
      const down = head.dataset.sort === "number" ? "descending" : "ascending";
      const other = down === "ascending" ? "descending" : "ascending";
      order = [String(number), head.getAttribute("aria-sort") === down ? other : down];
      sort();
      show();
    });
    head.replaceChildren(button);
  });
  at("controls").addEventListener("submit", event => event.preventDefault());
  find.addEventListener("input", show);
  at("outcomes").addEventListener("click", event => {
    const button = event.target.closest(".pick");
    if (!button) return;
    if (!picked.delete(button.dataset.outcome)) picked.add(button.dataset.outcome);
    show();
  });
  document.addEventListener("keydown", event => {
    if (event.key === "/" && document.activeElement !== find) {
      event.preventDefault();
      find.focus();
    }
  });

  let seen = "";
  async function again() {
    try {
      const answer = await fetch(location.pathname, { headers: seen ? { "If-None-Match": seen } : {}, cache: "no-store" });
      if (answer.status === 304) return;
      if (!answer.ok) throw new Error(`${answer.status}`);
      seen = answer.headers.get("ETag") || "";
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = new Set(rows().filter(row => row.querySelector("details[open]")).map(row => row.dataset.name));
      const focus = document.activeElement && document.activeElement.closest("#rows tr");
      const name = focus && focus.dataset.name;
      for (const id of ["head", "outcomes", "rows"]) at(id).replaceChildren(...page.getElementById(id).childNodes);
      for (const row of rows()) {
        const more = row.querySelector("details");
        if (more && open.has(row.dataset.name)) more.open = true;
        if (more && row.dataset.name === name) more.querySelector("summary").focus();
      }
      document.title = page.title;
    } catch (error) {
      at("said").textContent = `The server does not answer (${error.message}); this is what it said last.`;
      return;
    }
    sort();
    show();
    ages();
  }

  find.value = chosen.get("find") || "";
  at("controls").hidden = false;
  sort();
  show();
  ages();
  setInterval(ages, 10000);
  if (document.body.dataset.refresh) setInterval(again, 1000 * document.body.dataset.refresh);
})();
