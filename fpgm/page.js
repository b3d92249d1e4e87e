for (const head of document.querySelectorAll("th button")) head.onclick = () => {
  const th = head.parentElement, body = th.closest("table").tBodies[0];
  const down = th.getAttribute("aria-sort") === "ascending";
  for (const other of th.parentElement.children) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => { const c = row.cells[th.cellIndex];
    return c.dataset.value === undefined ? c.textContent : parseFloat(c.dataset.value); };
  const order = (a, b) => { const x = value(a), y = value(b);
    return typeof x === "number" && typeof y === "number" ? x - y : `${x}`.localeCompare(`${y}`); };
  body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
};
