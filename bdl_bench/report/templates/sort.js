"use strict";
(() => {
  const value = (row, column) => {
    const entry = row.cells[column];
    if (column === 0) return entry.textContent.trim().toLowerCase();
    return entry.dataset.v === undefined ? NaN : Number(entry.dataset.v);
  };
  const compare = (a, b) => {
    if (typeof a === "string") return a < b ? -1 : a > b ? 1 : 0;
    return a - b;
  };
  const sort = (table, column, rising) => {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row) => [value(row, column), row]);
    const missing = (key) => typeof key === "number" && Number.isNaN(key);
    rows.sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      return rising ? compare(a, b) : compare(b, a);
    });
    body.append(...rows.map(([, row]) => row));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = Array.from(table.tHead.rows[0].cells);
    headers.forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...Array.from(header.childNodes));
      header.append(button);
      button.addEventListener("click", (event) => {
        if (event.target.closest("a")) return;
        const rising = header.getAttribute("aria-sort") !== "ascending";
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", rising ? "ascending" : "descending");
        sort(table, column, rising);
      });
    });
  }
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = Array.from(document.querySelectorAll("details:not([open])"));
    closed.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((part) => { part.open = false; }));
})();
