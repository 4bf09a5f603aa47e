"use strict";
(() => {
  const tables = [...document.querySelectorAll("table.runs")];
  const original = new Map(tables.map((table) => [table, groupsOf(table)]));

  function groupsOf(table) {
    return [...table.tBodies].map((body) => [body, [...body.rows]]);
  }

  // A number where all that the column has are numbers; what is absent goes last either way.
  function compare(a, b, numeric, sign) {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (numeric ? a - b : a.localeCompare(b));
  }

  function sort(table, column, direction) {
    for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
    for (const [body, rows] of original.get(table)) body.append(...rows);
    if (!direction) return;
    table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction);
    const rows = original.get(table).flatMap(([, rows]) => rows);
    const value = (row) => row.cells[column].dataset.value ?? "";
    const numeric = rows.every((row) => !Number.isNaN(Number(value(row))));
    const sign = direction === "ascending" ? 1 : -1;
    rows.sort((a, b) => compare(value(a), value(b), numeric, sign));
    table.tBodies[0].append(...rows);
  }

  // Numbers begin with the largest, texts with the first of the alphabet; the third time is a reset.
  function next(head) {
    const order = head.classList.contains("text")
      ? [null, "ascending", "descending"]
      : [null, "descending", "ascending"];
    return order[(order.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
  }

  for (const table of tables) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, column, next(head)));
      head.append(button);
    });
    for (const row of table.querySelectorAll("tr[data-folders]")) link(row);
  }

  // Method and average stay where the rest of a wide table scrolls.
  function stick(table) {
    const heads = [...table.tHead.rows[0].cells];
    const places = ["method", "average"].map((name) => heads.findIndex((head) => head.dataset.column === name));
    const known = places.filter((place) => place >= 0);
    let left = 0;
    for (const place of known) {
      for (const row of table.rows) {
        row.cells[place].classList.add("stick");
        row.cells[place].classList.toggle("edge", place === known.at(-1));
        row.cells[place].style.left = `${left}px`;
      }
      left += heads[place].getBoundingClientRect().width;
    }
  }
  const stickAll = () => tables.forEach(stick);
  stickAll();
  addEventListener("resize", stickAll);

  // The method of a row leads to the first of its runs.
  function link(row) {
    const [folder] = row.dataset.folders.split(" ");
    const cell = row.cells[1];
    if (!folder || !document.getElementById(`run-${folder}`)) return;
    const anchor = document.createElement("a");
    anchor.href = `#run-${encodeURIComponent(folder)}`;
    anchor.append(...cell.childNodes);
    cell.append(anchor);
  }

  const filter = document.getElementById("filter");
  const rows = tables.flatMap((table) => [...table.tBodies].flatMap((body) => [...body.rows]));
  const summaries = [...document.querySelectorAll("details.run > summary")];
  const texts = new Map([...rows, ...summaries].map((part) => [part, part.textContent.toLowerCase()]));
  function apply() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = (part) => words.every((word) => texts.get(part).includes(word));
    for (const row of rows) row.hidden = !shown(row);
    for (const summary of summaries) summary.parentElement.hidden = !shown(summary);
    const left = rows.filter((row) => !row.hidden).length;
    const count = words.length ? `${left} of ${rows.length} rows` : "";
    document.getElementById("count").textContent = count;
  }
  filter.addEventListener("input", apply);
  apply();

  const dialog = document.getElementById("enlarged");
  for (const button of document.querySelectorAll(".enlarge")) {
    button.addEventListener("click", () => {
      const image = button.querySelector("img");
      dialog.querySelector("img").src = image.src;
      dialog.querySelector("img").alt = image.alt;
      dialog.querySelector("p").textContent = image.alt;
      dialog.className = button.closest("figure").className;
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.tagName === "IMG") dialog.close();
  });

  function open() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.hidden = false;
      target.scrollIntoView();
    }
  }
  addEventListener("hashchange", open);
  open();
})();
