"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const original = [...body.rows];
  const key = (row, column) => {
    const cell = row.cells[column];
    const given = cell.dataset.sort;
    if (given === "inf") return Infinity;
    const text = given || cell.textContent.trim();
    const number = Number(text);
    return text !== "" && !Number.isNaN(number) ? number : text;
  };
  const compare = (a, b) => {
    if (a === b) return 0;
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b));
  };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      let rows = original;
      if (before !== "descending") {
        const way = before === "ascending" ? -1 : 1;
        head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
        rows = [...original].sort((a, b) => way * compare(key(a, column), key(b, column)));
      }
      body.append(...rows);
    });
  });
}
